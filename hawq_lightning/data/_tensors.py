"""Small images kept in memory, shifted and mirrored as they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset


class TensorImages(Dataset[tuple[Tensor, int]]):
    """Images of one size in memory.

    The random numbers are torch's, so that a restored generator state gives the same images again.

    Args:
        images: ``[N, C, H, W]``, uint8 or float.
        labels: ``[N]``, int64.
        shift: largest random offset in pixels along each axis.
        flip: mirror left and right half of the time.
        fill: what comes in at the border.
        mean: of each channel on the 0 to 1 scale; with ``std`` it turns uint8 images into normalised float ones.
        std: of each channel on the same scale.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        shift: int = 0,
        flip: bool = False,
        fill: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.labels, self.shift, self.flip = labels, shift, flip
        self.size = images.shape[-2:]
        self.images = torch.nn.functional.pad(images, (shift,) * 4, value=fill) if shift else images
        self._mean = None if mean is None else 255 * torch.tensor(mean).view(-1, 1, 1)
        self._std = None if std is None else 255 * torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``[C, H, W]``, float, and its label."""
        image = self.images[index]
        if self.shift:
            top, left = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
            image = image[:, top : top + self.size[0], left : left + self.size[1]]
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        if self._mean is not None and self._std is not None:
            image = (image - self._mean) / self._std
        return image, int(self.labels[index])
