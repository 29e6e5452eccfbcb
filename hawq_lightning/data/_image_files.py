"""Image files, decoded, cut and normalised as they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files, decoded as they are read, cut to a square and normalised.

    Args:
        files: (path, label) of every image.
        crop: from the decoded image to ``[3, size, size]``, uint8; one of :func:`square_crop`.
        mean: of each channel on the 0 to 1 scale.
        std: of each channel on the same scale.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        crop: Callable[[Image.Image], Tensor],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.files, self.crop = list(files), crop
        self._mean = 255 * torch.tensor(mean).view(-1, 1, 1)
        self._std = 255 * torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``[3, size, size]``, float, and its label."""
        path, label = self.files[index]
        return (self.crop(read_image(path)) - self._mean) / self._std, label


def square_crop(size: int, resize: int | None = None, augment: bool = False) -> Callable[[Image.Image], Tensor]:
    """Torchvision's usual way from an image of any size to a square one.

    Args:
        size: side of the square in pixels.
        resize: short side before the centre crop; ``None``: scale the whole image to the square.
        augment: crop a random 8 to 100% of the image's area and mirror half of the time, instead.

    Returns:
        From a PIL image to ``[3, size, size]``, uint8.

    Raises:
        HawqError: torchvision is missing.
    """
    v2 = require("torchvision.transforms.v2")
    if augment:
        steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    elif resize is not None:
        steps = [v2.Resize(resize), v2.CenterCrop(size)]
    else:
        steps = [v2.Resize((size, size))]
    crop: Callable[[Image.Image], Tensor] = v2.Compose([*steps, v2.PILToTensor()])
    return crop


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
