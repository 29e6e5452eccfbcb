"""A COCO folder as a Lightning DataModule: ``train2017``, ``val2017`` and ``annotations/instances_*.json``."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from hawq_lightning._errors import HawqError
from hawq_lightning.data._coco import Annotations, CocoDataset, random_flips, read_coco

Sample = tuple[torch.Tensor, dict[str, torch.Tensor]]
Batch = tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]


class CocoData(LightningDataModule):
    """Batches are (list of images, list of target dicts); images keep their own sizes.

    Args:
        root: folder that holds the image folders and ``annotations``.
        train: split to train on; its images are in ``root/train``, boxes in ``annotations/instances_<train>.json``.
        val: split to validate and test on.
        num_classes: of the model's head; checked against the labels.
        batch_size: images a batch.
        num_workers: decoding processes.
        labels: ``contiguous`` (0, 1, ...) or ``category_id`` (COCO's own numbers).
        longest: shrink images whose longer side has more pixels.
        hflip: mirror left and right in training.
        vflip: mirror up and down in training.
        bad_boxes: ``error``, or ``fix`` to clip and drop (COCO itself has boxes without area).
        subset: use only the first this many images of each split.
    """

    def __init__(
        self,
        root: str | Path,
        train: str = "train2017",
        val: str = "val2017",
        num_classes: int | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        labels: str = "contiguous",
        longest: int | None = None,
        hflip: bool = True,
        vflip: bool = False,
        bad_boxes: str = "error",
        subset: int | None = None,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser()
        self.train, self.val = train, val
        self.num_classes = num_classes
        self.batch_size, self.num_workers = batch_size, num_workers
        self.labels, self.bad_boxes = labels, bad_boxes
        self.longest, self.subset = longest, subset
        self.augment = random_flips(hflip, vflip) if hflip or vflip else None
        self.classes: dict[int, str] = {}
        self.train_set: CocoDataset | None = None
        self.val_set: CocoDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and check the annotations of the splits that ``stage`` needs."""
        if not self.root.is_dir():
            raise HawqError(f"No COCO folder at {self.root}; set data.root=/path/to/it.")
        if stage in (None, "fit") and self.train_set is None:
            annotations = self._read(self.train)
            # an image without boxes trains on background alone; COCO's reference trainings leave it out
            pictures = [p for p in annotations.pictures if bool((~p.crowd).any())]
            if not pictures:
                raise HawqError(f"Split {self.train!r} of {self.root} has no image with a box.")
            self.train_set = CocoDataset(pictures[: self.subset], self.augment, self.longest, crowd=False)
        if self.val_set is None:
            self.val_set = CocoDataset(self._read(self.val).pictures[: self.subset], None, self.longest)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled, augmented."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """In order, not augmented."""
        return self._loader(self.val_set, shuffle=False)

    def test_dataloader(self) -> DataLoader[Sample]:
        """The validation split: COCO's test boxes are not public."""
        return self.val_dataloader()

    def _read(self, split: str) -> Annotations:
        path = self.root / "annotations" / f"instances_{split}.json"
        annotations = read_coco(path, self.root / split, self.labels, self.bad_boxes)
        if self.num_classes is not None and max(annotations.classes) >= self.num_classes:
            last = max(annotations.classes)
            raise HawqError(
                f"{path} needs {last + 1} outputs: label {last} is {annotations.classes[last]!r} with "
                f"labels={self.labels}; the model's head has {self.num_classes}."
            )
        if self.classes and annotations.classes != self.classes:
            raise HawqError(f"Splits {self.train!r} and {self.val!r} of {self.root} have different categories.")
        self.classes = annotations.classes
        return annotations

    def _loader(self, data: Dataset[Sample] | None, shuffle: bool) -> DataLoader[Sample]:
        if data is None:
            raise HawqError("Call setup() before asking for batches.")
        return DataLoader(
            data,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def collate(samples: list[Sample]) -> Batch:
    """A list of images and a list of targets: images of several sizes make no tensor."""
    return [image for image, _ in samples], [target for _, target in samples]
