"""Lightning callbacks: hooks only, no maths."""

from hawq_lightning.callbacks.block_order import BlockwiseOrder
from hawq_lightning.callbacks.checkpoint import load_from_checkpoint
from hawq_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from hawq_lightning.callbacks.distillation import Distillation
from hawq_lightning.callbacks.freeze import FreezeSchedule
from hawq_lightning.callbacks.hawq import HAWQ
from hawq_lightning.callbacks.install import InstallPlan
from hawq_lightning.callbacks.measure import MeasureTraces

__all__ = [
    "HAWQ",
    "AtomicCheckpointIO",
    "BlockwiseOrder",
    "Distillation",
    "FreezeSchedule",
    "InstallPlan",
    "MeasureTraces",
    "load_from_checkpoint",
]
