"""scikit-learn's digits: 1,797 real 8x8 grey images that ship with the package, so that nothing is downloaded."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hawq_lightning._errors import HawqError
from hawq_lightning.data._tensors import TensorImages


class DigitsDataModule(pl.LightningDataModule):
    """A stratified split of the digits that is the same every time.

    Validation and test use the same held-out images: nothing is selected on them here.

    Args:
        batch_size: images a step.
        held_out: images kept for validation and test.
        shift: training images move by up to this many pixels along each axis; 0 switches that off.
        subset: use only this many images of each split (for quick checks).
        split_seed: of the split; keep it to compare runs.
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        held_out: int = 540,
        shift: int = 1,
        subset: int | None = None,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise HawqError(f"data.batch_size={batch_size} must be at least 1.")
        if not 0 <= shift <= 3:
            raise HawqError(f"data.shift={shift} is out of range for 8x8 images (0 to 3).")
        if not 10 <= held_out <= 1700:
            raise HawqError(f"data.held_out={held_out} is out of range (10 to 1700 of 1,797 images).")
        if subset is not None and subset < 1:
            raise HawqError(f"data.subset={subset} must be at least 1.")
        self.batch_size, self.held_out, self.shift = batch_size, held_out, shift
        self.subset, self.split_seed = subset, split_seed
        self._sets: dict[str, Dataset[tuple[Tensor, int]]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, scale to mean 0 and standard deviation 1 over the training pixels, and split."""
        if self._sets:
            return
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise HawqError(f"The digits come with scikit-learn ({error}): pip install scikit-learn.") from error

        raw = load_digits()
        images = torch.from_numpy(raw.images.astype(np.float32)).unsqueeze(1)
        labels = torch.from_numpy(raw.target.astype(np.int64))
        train, val = train_test_split(
            np.arange(len(labels)), test_size=self.held_out, stratify=raw.target, random_state=self.split_seed
        )
        blank = -float(images[train].mean() / images[train].std())  # what black becomes
        images = (images - images[train].mean()) / images[train].std()
        train, val = train[: self.subset], val[: self.subset]
        self._sets = {
            "train": TensorImages(images[train], labels[train], shift=self.shift, fill=blank),
            "val": TensorImages(images[val], labels[val]),
        }

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Shuffled batches ``([B, 1, 8, 8], [B])``."""
        # a last batch of one or two images would spoil BatchNorm's statistics
        whole = len(self._sets["train"]) > self.batch_size  # type: ignore[arg-type]
        return DataLoader(self._sets["train"], self.batch_size, shuffle=True, drop_last=whole)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The held-out images in fixed order."""
        return DataLoader(self._sets["val"], 270)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The held-out images in fixed order."""
        return self.val_dataloader()
