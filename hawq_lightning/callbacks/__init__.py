"""Lightning callbacks: hooks only, no maths."""

from hawq_lightning.callbacks.checkpoint import load_from_checkpoint
from hawq_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from hawq_lightning.callbacks.hawq import HAWQ
from hawq_lightning.callbacks.install import InstallPlan
from hawq_lightning.callbacks.measure import MeasureTraces

__all__ = ["AtomicCheckpointIO", "HAWQ", "InstallPlan", "MeasureTraces", "load_from_checkpoint"]
