"""How a folder of images is read, with each setting's one default and its check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning.data._image_files import IMAGENET_MEAN, IMAGENET_STD
from hawq_lightning.data._splits import EvaluateOn, Parts

Augment = Literal["none", "shift_flip", "resized_crop"]


@dataclass(frozen=True)
class ImageFolderConfig:
    """Settings of :class:`ImageFolderDataModule`.

    Raises:
        HawqError: a value out of range or an unknown name; the nearest valid choice is named.
    """

    size: int = 32
    """Side of the images that the network sees, in pixels."""
    batch_size: int = 128
    """Images a step."""
    num_classes: int | None = None
    """Outputs of the model's head; the class folders must be as many. ``None``: not checked."""
    augment: Augment = "shift_flip"
    """What is done to training images: ``none``, ``shift_flip`` (small images), ``resized_crop`` (large ones)."""
    shift: int = 4
    """Largest offset of ``shift_flip`` in pixels."""
    resize: int | None = None
    """Short side before the centre crop in evaluation (256 for 224 pixels); ``None``: the whole image."""
    mean: Sequence[float] = IMAGENET_MEAN
    """Mean of each channel on the 0 to 1 scale."""
    std: Sequence[float] = IMAGENET_STD
    """Standard deviation of each channel on the same scale."""
    train: str = "train"
    """Folder name of the training split."""
    val: str = "val"
    """Folder name of the held-out split, used for validation and test."""
    subset: int | None = None
    """Use only this many images of each split, spread evenly over the classes."""
    held_out: int = 0
    """Take this many images, equally many of each class, out of the training split."""
    train_subset: int | None = None
    """Train on this many of the others, equally many of each class; ``None``: on all."""
    evaluate_on: EvaluateOn = "val"
    """``val``, or ``held_out`` to tune settings without looking at ``val``."""
    split_seed: int = 0
    """Seed of these draws; keep it to compare runs."""
    memory: bool = False
    """Decode every image once and keep it as uint8; for small images."""
    num_workers: int = 0
    """Decoding processes."""
    checked: bool = False
    """Read every file's header at the start, to find broken ones before training."""

    def __post_init__(self) -> None:
        if self.augment not in get_args(Augment):
            near = nearest(str(self.augment), get_args(Augment))
            raise HawqError(
                f"data.augment={self.augment!r} is unknown; use one of {', '.join(get_args(Augment))}.{near}"
            )
        if self.augment == "shift_flip" and not self.memory:
            raise HawqError("data.augment=shift_flip is for small images and needs data.memory=true.")
        if self.augment == "resized_crop" and self.memory:
            raise HawqError("data.memory=true keeps images at one size; use data.augment=shift_flip or none with it.")
        if min(self.size, self.batch_size, self.subset or 1) < 1:
            raise HawqError("data.size, data.batch_size and data.subset must be at least 1.")
        mean, std = self.mean, self.std
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise HawqError(f"data.mean={list(mean)} and data.std={list(std)} need three channels and positive std.")
        _ = self.parts  # checked here as well

    @property
    def parts(self) -> Parts:
        """Which part of the training split is trained on, and what is evaluated on."""
        return Parts(self.held_out, self.train_subset, self.evaluate_on, self.split_seed)


def image_folder_config(config: ImageFolderConfig | None, overrides: dict[str, object]) -> ImageFolderConfig:
    """A config with some fields replaced.

    Raises:
        HawqError: no such field; the nearest is named.
    """
    names = [f.name for f in fields(ImageFolderConfig)]
    for name in overrides:
        if name not in names:
            raise HawqError(f"ImageFolderConfig has no field {name!r}.{nearest(name, names)}")
    if config is None:
        return ImageFolderConfig(**overrides)  # type: ignore[arg-type]
    return replace(config, **overrides)  # type: ignore[arg-type]
