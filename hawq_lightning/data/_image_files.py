"""Image files, decoded, cut and normalised as they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hawq_lightning._errors import HawqError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files, decoded as they are read, cut to a square and normalised.

    Args:
        files: (path, label) of every image.
        size: side of the square in pixels.
        resize: short side before the centre crop; ``None``: scale the whole image to the square.
        random_crop: crop a random 8 to 100% of the image's area and mirror half of the time, instead.
        mean: of each channel on the 0 to 1 scale.
        std: of each channel on the same scale.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        size: int,
        resize: int | None = None,
        random_crop: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.files, self.size, self.resize, self.random_crop = list(files), size, resize, random_crop
        self._mean = 255 * torch.tensor(mean).view(-1, 1, 1)
        self._std = 255 * torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``[3, size, size]``, float, and its label."""
        path, label = self.files[index]
        return (self.pixels(path) - self._mean) / self._std, label

    def pixels(self, path: Path) -> Tensor:
        """Decode, crop and scale one file: ``[3, size, size]``, uint8.

        Raises:
            HawqError: the file is no image or is damaged.
        """
        image = read_image(path)
        if self.random_crop:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, random_box(*image.size))
            if torch.rand(()) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        elif self.resize is not None:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, self._centre(*image.size))
        elif image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)

    def _centre(self, width: int, height: int) -> tuple[float, float, float, float]:
        # scaling the short side to `resize` and cutting the centre out, in one resampling
        side = min(width, height) * self.size / (self.resize or self.size)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side


def read_image(path: Path, header_only: bool = False) -> Image.Image:
    """Decode one image file to RGB.

    Raises:
        HawqError: it cannot be opened, is no image, or is damaged; the message names the file.
    """
    try:
        with Image.open(path) as image:
            return image if header_only else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise HawqError(f"The image {path} cannot be read: {error}.") from error


def random_box(width: int, height: int) -> tuple[float, float, float, float]:
    """A random crop of 8 to 100% of the area with a side ratio of 3/4 to 4/3; the whole image if none fits."""
    for _ in range(10):
        share, ratio = torch.rand(2).tolist()
        area = width * height * (0.08 + 0.92 * share)
        aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            x, y = torch.rand(2).tolist()
            left, top = x * (width - w), y * (height - h)
            return left, top, left + w, top + h
    return 0.0, 0.0, float(width), float(height)
