"""DataModules: digits, image folders, COCO, generated miniatures."""

from hawq_lightning.data._coco import CocoDataset, load_image, random_flips, read_coco
from hawq_lightning.data._detection import CocoData
from hawq_lightning.data._digits import DigitsDataModule
from hawq_lightning.data._image_folder import ImageFolderDataModule
from hawq_lightning.data._image_folder_config import ImageFolderConfig
from hawq_lightning.data._miniatures import write_coco, write_image_folder
from hawq_lightning.data._tensors import TensorImages
from hawq_lightning.data._tiny import TinyCoco, TinyImageFolder

__all__ = [
    "CocoData",
    "CocoDataset",
    "DigitsDataModule",
    "ImageFolderConfig",
    "ImageFolderDataModule",
    "TensorImages",
    "TinyCoco",
    "TinyImageFolder",
    "load_image",
    "random_flips",
    "read_coco",
    "write_coco",
    "write_image_folder",
]
