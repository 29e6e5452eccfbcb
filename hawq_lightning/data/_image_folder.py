"""Folders of images, one folder a class: CIFAR-10, ImageNet or your own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning.data._image_files import IMAGENET_MEAN, IMAGENET_STD, ImageFiles, read_image
from hawq_lightning.data._splits import Labelled, Parts
from hawq_lightning.data._tensors import TensorImages

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
AUGMENTATIONS = ("none", "shift_flip", "resized_crop")


class ImageFolderDataModule(pl.LightningDataModule):
    """Images in ``root/train/<class>/`` and ``root/val/<class>/``; classes are numbered in alphabetical order.

    Args:
        root: folder that holds the two splits.
        size: side of the images that the network sees, in pixels.
        batch_size: images a step.
        num_classes: of the model's head; the class folders must be as many.
        augment: of training images: ``none``, ``shift_flip`` (for small images) or ``resized_crop`` (for large ones).
        shift: largest offset of ``shift_flip`` in pixels.
        resize: short side before the centre crop in evaluation (256 for 224 pixels); ``None``: the whole image.
        mean: of each channel on the 0 to 1 scale.
        std: of each channel on the same scale.
        train: folder name of the training split.
        val: folder name of the held-out split, used for validation and test.
        subset: use only this many images of each split, spread evenly over the classes.
        held_out: take this many images, equally many of each class, out of the training split.
        train_subset: train on this many of the others, equally many of each class.
        evaluate_on: ``val``, or ``held_out`` to tune settings without looking at ``val``.
        split_seed: of these draws; keep it to compare runs.
        memory: decode every image once and keep it as uint8; for small images.
        num_workers: decoding processes.
        checked: read every file's header at the start, to find broken ones before training.
    """

    def __init__(
        self,
        root: str | Path,
        size: int = 32,
        batch_size: int = 128,
        num_classes: int | None = None,
        augment: str = "shift_flip",
        shift: int = 4,
        resize: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        train: str = "train",
        val: str = "val",
        subset: int | None = None,
        held_out: int = 0,
        train_subset: int | None = None,
        evaluate_on: str = "val",
        split_seed: int = 0,
        memory: bool = False,
        num_workers: int = 0,
        checked: bool = False,
    ) -> None:
        super().__init__()
        if augment not in AUGMENTATIONS:
            raise HawqError(f"data.augment={augment!r} is unknown; use one of {', '.join(AUGMENTATIONS)}.")
        if augment == "shift_flip" and not memory:
            raise HawqError("data.augment=shift_flip is for small images and needs data.memory=true.")
        if augment == "resized_crop" and memory:
            raise HawqError("data.memory=true keeps images at one size; use data.augment=shift_flip or none with it.")
        if min(size, batch_size, subset or 1) < 1:
            raise HawqError("data.size, data.batch_size and data.subset must be at least 1.")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise HawqError(f"data.mean={list(mean)} and data.std={list(std)} need three channels and positive std.")
        self.root, self.splits = Path(root).expanduser(), {"train": train, "val": val}
        self.size, self.batch_size, self.num_classes = size, batch_size, num_classes
        self.augment, self.shift, self.resize = augment, shift, resize
        self.mean, self.std, self.subset = tuple(mean), tuple(std), subset
        self.parts = Parts(held_out, train_subset, evaluate_on, split_seed)
        self.memory, self.num_workers, self.checked = memory, num_workers, checked
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
        if self.num_classes is not None and len(self.classes) != self.num_classes:
            raise HawqError(
                f"{self.root / self.splits['train']} has {len(self.classes)} class folders, "
                f"the model's head {self.num_classes} outputs; set model.num_classes={len(self.classes)}."
            )
        labelled = {
            split: [(path, label) for label, name in enumerate(self.classes) for path in files_of[name]]
            for split, files_of in files_of_split.items()
        }
        for split, files in self.parts.of(labelled).items():
            if self.subset is not None and self.subset < len(files):
                files = [files[i] for i in np.linspace(0, len(files) - 1, self.subset).round().astype(int)]
            if self.checked:
                for path, _ in files:
                    read_image(path, header_only=True)
            self._sets[split] = self._dataset(files, training=split == "train")

    def _dataset(self, files: Labelled, training: bool) -> Dataset[tuple[Tensor, int]]:
        crop = training and self.augment == "resized_crop"
        decoded = ImageFiles(files, self.size, self.resize, crop, self.mean, self.std)
        if not self.memory:
            return decoded
        images = torch.empty(len(files), 3, self.size, self.size, dtype=torch.uint8)
        for i, (path, _) in enumerate(files):
            images[i] = decoded.pixels(path)
        moving = training and self.augment == "shift_flip"
        labels = torch.tensor([label for _, label in files])
        return TensorImages(images, labels, self.shift if moving else 0, moving, mean=self.mean, std=self.std)

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
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            drop_last=shuffle and len(images) > self.batch_size,  # type: ignore[arg-type]
            persistent_workers=self.num_workers > 0,
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
