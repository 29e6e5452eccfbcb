"""LightningModules: classification, detection."""

from hawq_lightning.tasks._classification import ClassificationTask
from hawq_lightning.tasks._detection import DetectionTask
from hawq_lightning.tasks._matching import join, match_image, objects_of
from hawq_lightning.tasks._optimizers import make_optimizer

__all__ = [
    "ClassificationTask",
    "DetectionTask",
    "join",
    "make_optimizer",
    "match_image",
    "objects_of",
]
