"""The one folder that touches Lightning's internals: its data, its ``training_step``, its hooks' order.

Tested with lightning 2.6; every private name that the package uses is used here.
"""

from hawq_lightning.callbacks._trainer._data import held_out_batches, train_batches
from hawq_lightning.callbacks._trainer._namespaces import check_trainer, kind_beside, kinds, namespace_of, overrides
from hawq_lightning.callbacks._trainer._patched_step import (
    StepOutput,
    float_copy,
    loss_of,
    patch_training_step,
    restore_training_step,
    with_loss,
)
from hawq_lightning.callbacks._trainer._scores import scores_begin_anew
from hawq_lightning.callbacks._trainer._skipped import without_skipped
from hawq_lightning.callbacks._trainer._trainer import (
    after_last_batch,
    after_layers_exist,
    at_epoch_end,
    builds_later,
    gathered,
    has_parent,
    in_middle_of_epoch,
    insert_after,
    is_sharded,
    move_to_front,
    optimized,
    refuse_sharded,
    renew_train_iterator,
    rerun_setup,
    restore_progress,
    runs_script_again,
    shard_of,
    shows_progress,
    signal_handlers,
    sync_averages,
    train_loaders,
    trained_by,
)
from hawq_lightning.callbacks._trainer._training_step_loss import loss_from_training_step

__all__ = [
    "StepOutput",
    "after_last_batch",
    "after_layers_exist",
    "at_epoch_end",
    "builds_later",
    "check_trainer",
    "float_copy",
    "gathered",
    "has_parent",
    "held_out_batches",
    "in_middle_of_epoch",
    "insert_after",
    "is_sharded",
    "kind_beside",
    "kinds",
    "loss_from_training_step",
    "loss_of",
    "move_to_front",
    "namespace_of",
    "optimized",
    "overrides",
    "patch_training_step",
    "refuse_sharded",
    "renew_train_iterator",
    "rerun_setup",
    "restore_progress",
    "restore_training_step",
    "runs_script_again",
    "scores_begin_anew",
    "shard_of",
    "shows_progress",
    "signal_handlers",
    "sync_averages",
    "train_batches",
    "train_loaders",
    "trained_by",
    "with_loss",
    "without_skipped",
]
