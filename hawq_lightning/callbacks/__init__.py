"""Lightning callbacks: hooks only, no maths."""

from hawq_lightning.callbacks._adjust_precision import AdjustPrecision
from hawq_lightning.callbacks._apply import ApplyPlan
from hawq_lightning.callbacks._block_order import BlockwiseOrder
from hawq_lightning.callbacks._channels_last import ChannelsLast
from hawq_lightning.callbacks._checkpoint import load_from_checkpoint
from hawq_lightning.callbacks._companion import Companion
from hawq_lightning.callbacks._compress_gradients import CompressGradients
from hawq_lightning.callbacks._distillation import Distillation
from hawq_lightning.callbacks._feasible import preview
from hawq_lightning.callbacks._freeze import FreezeSchedule
from hawq_lightning.callbacks._gradient_compression import GradientCompression, compressed_gradients
from hawq_lightning.callbacks._handoff import weights_hash
from hawq_lightning.callbacks._hawq import HAWQ
from hawq_lightning.callbacks._measure import MeasureTraces
from hawq_lightning.callbacks._mixed_training import MixedTraining
from hawq_lightning.callbacks._post_training import PostTraining
from hawq_lightning.callbacks._trainer import (
    in_middle_of_epoch,
    kinds,
    loss_from_training_step,
    namespace_of,
    overrides,
    refuse_sharded,
    runs_script_again,
    shows_progress,
    train_batches,
)
from hawq_lightning.callbacks.fault_tolerance import AtomicCheckpointIO

__all__ = [
    "HAWQ",
    "AdjustPrecision",
    "ApplyPlan",
    "AtomicCheckpointIO",
    "BlockwiseOrder",
    "ChannelsLast",
    "Companion",
    "CompressGradients",
    "Distillation",
    "FreezeSchedule",
    "GradientCompression",
    "MeasureTraces",
    "MixedTraining",
    "PostTraining",
    "compressed_gradients",
    "in_middle_of_epoch",
    "kinds",
    "load_from_checkpoint",
    "loss_from_training_step",
    "namespace_of",
    "overrides",
    "preview",
    "refuse_sharded",
    "runs_script_again",
    "shows_progress",
    "train_batches",
    "weights_hash",
]
