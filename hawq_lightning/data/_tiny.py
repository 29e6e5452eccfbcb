"""The drawn miniatures as DataModules: every step of ImageNet and COCO at small cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hawq_lightning.data._detection import CocoData
from hawq_lightning.data._image_folder import ImageFolderDataModule
from hawq_lightning.data._image_folder_config import ImageFolderConfig
from hawq_lightning.data._miniatures import write_coco, write_image_folder


class TinyImageFolder(ImageFolderDataModule):
    """A drawn image folder, written on first use.

    Args:
        root: where to write it; an existing folder is used if it is the same miniature.
        classes: 2 to 8.
        images: training images a class.
        val_images: validation images a class.
        pixels: short side of the files, about.
        config: how to read it.
        **overrides: of :class:`ImageFolderDataModule`.
    """

    def __init__(
        self,
        root: str | Path,
        classes: int = 4,
        images: int = 8,
        val_images: int = 4,
        pixels: int = 64,
        config: ImageFolderConfig | None = None,
        **overrides: object,
    ) -> None:
        super().__init__(root, config, **overrides)
        self.recipe = {"classes": classes, "train": images, "val": val_images, "size": pixels}

    def prepare_data(self) -> None:
        """Write the folder unless it is there."""
        write_image_folder(self.root, **self.recipe)


class TinyCoco(CocoData):
    """A drawn COCO folder, written on first use.

    Args:
        root: where to write it; an existing folder is used if it is the same miniature.
        classes: 2 to 8.
        images: training images.
        val_images: validation images.
        pixels: short side of the files, about.
        **rest: of :class:`CocoData`.
    """

    def __init__(
        self,
        root: str | Path,
        classes: int = 3,
        images: int = 16,
        val_images: int = 8,
        pixels: int = 96,
        **rest: Any,
    ) -> None:
        super().__init__(root, **rest)
        self.recipe = {"classes": classes, "train": images, "val": val_images, "size": pixels}

    def prepare_data(self) -> None:
        """Write the folder unless it is there."""
        write_coco(self.root, **self.recipe)
