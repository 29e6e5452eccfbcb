"""Folders of images, one folder a class: CIFAR-10, ImageNet or your own."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning.data._image_files import ImageFiles, read_image, square_crop
from hawq_lightning.data._image_folder_config import ImageFolderConfig, image_folder_config
from hawq_lightning.data._splits import Labelled
from hawq_lightning.data._tensors import TensorImages

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class ImageFolderDataModule(pl.LightningDataModule):
    """Images in ``root/train/<class>/`` and ``root/val/<class>/``; classes are numbered in alphabetical order.

    Args:
        root: folder that holds the two splits.
        config: how to read it.
        **overrides: fields of :class:`ImageFolderConfig` by name, such as ``size=224``.

    Raises:
        HawqError: an unknown field, or a value out of range.
    """

    def __init__(self, root: str | Path, config: ImageFolderConfig | None = None, **overrides: object) -> None:
        super().__init__()
        self.root, self.config = Path(root).expanduser(), image_folder_config(config, overrides)
        self.splits = {"train": self.config.train, "val": self.config.val}
        self.classes: list[str] = []
        self._sets: dict[str, Dataset[tuple[Tensor, int]]] = {}

    def setup(self, stage: str | None = None) -> None:
        """List the files and check the class folders.

        Raises:
            HawqError: a missing folder, an empty class, classes that differ between the splits or from the head.
        """
        if self._sets:
            return
        files_of_split = {split: list_classes(self.root / name) for split, name in self.splits.items()}
        self.classes = sorted(files_of_split["train"])
        if differ := sorted(set(files_of_split["train"]) ^ set(files_of_split["val"])):
            name = differ[0]
            only, other = ("train", "val") if name in files_of_split["train"] else ("val", "train")
            more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
            raise HawqError(
                f"Class folder {name!r}{more} is in {self.root / self.splits[only]} only, "
                f"not in {self.root / self.splits[other]}.{nearest(name, files_of_split[other])}"
            )
        if self.config.num_classes is not None and len(self.classes) != self.config.num_classes:
            raise HawqError(
                f"{self.root / self.splits['train']} has {len(self.classes)} class folders, "
                f"the model's head {self.config.num_classes} outputs; set model.num_classes={len(self.classes)}."
            )
        labelled = {
            split: [(path, label) for label, name in enumerate(self.classes) for path in files_of[name]]
            for split, files_of in files_of_split.items()
        }
        for split, files in self.config.parts.of(labelled).items():
            if self.config.subset is not None and self.config.subset < len(files):
                files = [files[i] for i in np.linspace(0, len(files) - 1, self.config.subset).round().astype(int)]
            if self.config.checked:
                for path, _ in files:
                    read_image(path, header_only=True)
            self._sets[split] = self._dataset(files, training=split == "train")

    def _dataset(self, files: Labelled, training: bool) -> Dataset[tuple[Tensor, int]]:
        config = self.config
        crop = square_crop(config.size, config.resize, training and config.augment == "resized_crop")
        if not config.memory:
            return ImageFiles(files, crop, tuple(config.mean), tuple(config.std))
        images = torch.empty(len(files), 3, config.size, config.size, dtype=torch.uint8)
        for i, (path, _) in enumerate(files):
            images[i] = crop(read_image(path))
        moving = training and config.augment == "shift_flip"
        labels = torch.tensor([label for _, label in files])
        shift = config.shift if moving else 0
        return TensorImages(images, labels, shift, moving, mean=tuple(config.mean), std=tuple(config.std))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Shuffled, augmented batches ``([B, 3, size, size], [B])``."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The held-out images in fixed order."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The held-out images in fixed order."""
        return self.val_dataloader()

    def _loader(self, split: str, shuffle: bool) -> DataLoader[tuple[Tensor, int]]:
        images = self._sets[split]
        return DataLoader(
            images,
            self.config.batch_size,
            shuffle=shuffle,
            num_workers=self.config.num_workers,
            drop_last=shuffle and len(images) > self.config.batch_size,  # type: ignore[arg-type]
            persistent_workers=self.config.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files in alphabetical order.

    Raises:
        HawqError: no such folder, no class folders in it, or one without images.
    """
    if not folder.is_dir():
        raise HawqError(f"No image folder at {folder}; set data.root to the folder that holds {folder.name}/<class>/.")
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        files_of = {
            name: sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in EXTENSIONS) for name in names
        }
    except OSError as error:
        raise HawqError(f"The image folder {folder} cannot be read: {error}.") from error
    if not files_of:
        raise HawqError(f"{folder} holds no class folders; expected {folder.name}/<class>/<image>.")
    if empty := [name for name, files in files_of.items() if not files]:
        raise HawqError(f"The class folder {folder / empty[0]} holds no image ({', '.join(EXTENSIONS)}).")
    return files_of
