"""scikit-learn's digits: 1,797 real 8x8 grey images that ship with the package, so that nothing is downloaded."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hawq_lightning.errors import HawqError


class ShiftedImages(Dataset[tuple[Tensor, int]]):
    """Images in memory, each moved by a small random offset that depends only on seed, pass and index.

    Args:
        images: ``[N, C, H, W]``, float.
        labels: ``[N]``, int64.
        shift: largest offset in pixels along each axis; zeros fill the border.
        seed: of the offsets.
    """

    def __init__(self, images: Tensor, labels: Tensor, shift: int = 0, seed: int = 0) -> None:
        self.images, self.labels, self.shift, self.seed = images, labels, shift, seed
        self._padded = torch.nn.functional.pad(images, (shift,) * 4) if shift else images
        self._passes = torch.zeros(len(images), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``[C, H, W]`` and its label."""
        label = int(self.labels[index])
        if not self.shift:
            return self.images[index], label
        reads = int(self._passes[index])
        self._passes[index] += 1
        rows, columns = np.random.default_rng((self.seed, index, reads)).integers(0, 2 * self.shift + 1, 2)
        height, width = self.images.shape[-2:]
        return self._padded[index, :, rows : rows + height, columns : columns + width], label


class DigitsDataModule(pl.LightningDataModule):
    """Train, validation and test split of the digits, stratified and the same every time.

    Args:
        batch_size: images a step.
        val_size: held-out images for validation; part of the training images.
        test_size: held-out images for the last word.
        shift: training images move by up to this many pixels; 0 switches that off.
        subset: use only this many training images (for quick checks).
        split_seed: of the split; keep it to compare runs.
        seed: of the augmentation.
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        val_size: int = 180,
        test_size: int = 360,
        shift: int = 0,
        subset: int | None = None,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise HawqError(f"batch_size={batch_size} must be at least 1.")
        if not 0 <= shift <= 3:
            raise HawqError(f"shift={shift} is out of range for 8x8 images (0 to 3).")
        if min(val_size, test_size) < 10 or val_size + test_size > 1500:
            raise HawqError(
                f"val_size={val_size} and test_size={test_size} must be at least 10 and sum to at most 1500."
            )
        if subset is not None and subset < 1:
            raise HawqError(f"subset={subset} must be at least 1.")
        self.batch_size, self.shift, self.subset, self.seed = batch_size, shift, subset, seed
        self.val_size, self.test_size, self.split_seed = val_size, test_size, split_seed
        self._sets: dict[str, Dataset[Any]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and split the images; scaled to mean 0, standard deviation 1 over the training pixels."""
        if self._sets:
            return
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        raw = load_digits()
        images = torch.from_numpy(raw.images.astype(np.float32)).unsqueeze(1) / 16.0
        labels = torch.from_numpy(raw.target.astype(np.int64))
        ids = np.arange(len(labels))
        rest, test = train_test_split(ids, test_size=self.test_size, stratify=raw.target, random_state=self.split_seed)
        train, val = train_test_split(
            rest, test_size=self.val_size, stratify=raw.target[rest], random_state=self.split_seed
        )
        images = (images - images[train].mean()) / images[train].std()
        if self.subset is not None:
            train = train[: self.subset]
        self._sets = {
            "train": ShiftedImages(images[train], labels[train], self.shift, self.seed),
            "val": ShiftedImages(images[val], labels[val]),
            "test": ShiftedImages(images[test], labels[test]),
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches ``([B, 1, 8, 8], [B])``."""
        # a last batch of one or two images would spoil BatchNorm's statistics
        whole = len(self._sets["train"]) > self.batch_size  # type: ignore[arg-type]
        return DataLoader(self._sets["train"], self.batch_size, shuffle=True, drop_last=whole)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches in fixed order."""
        return DataLoader(self._sets["val"], 256)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches in fixed order."""
        return DataLoader(self._sets["test"], 256)
