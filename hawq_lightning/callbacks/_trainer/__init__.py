"""The one folder that touches Lightning's internals: its data, its ``training_step``, its hooks' order.

Tested with lightning 2.6; every private name that the package uses is used here.
"""

from hawq_lightning.callbacks._trainer._data import draw_batches, onto_device
from hawq_lightning.callbacks._trainer._patched_step import float_copy, loss_of, replaced_step, restored_step, with_loss
from hawq_lightning.callbacks._trainer._trainer import (
    after_layers_exist,
    at_epoch_end,
    beside,
    builds_later,
    check_namespace,
    copy_again,
    gathered,
    go_first,
    has_parent,
    in_middle_of_epoch,
    is_sharded,
    refuse_sharded,
    renew_train_iterator,
    restore_progress,
    runs_script_again,
    share_of,
    shows_progress,
    signal_handlers,
    sync_averages,
    train_loaders,
)
from hawq_lightning.callbacks._trainer._training_step_loss import borrowed_step

__all__ = [
    "after_layers_exist",
    "at_epoch_end",
    "beside",
    "borrowed_step",
    "builds_later",
    "check_namespace",
    "copy_again",
    "draw_batches",
    "float_copy",
    "gathered",
    "go_first",
    "has_parent",
    "in_middle_of_epoch",
    "is_sharded",
    "loss_of",
    "onto_device",
    "refuse_sharded",
    "renew_train_iterator",
    "replaced_step",
    "restore_progress",
    "restored_step",
    "runs_script_again",
    "share_of",
    "shows_progress",
    "signal_handlers",
    "sync_averages",
    "train_loaders",
    "with_loss",
]
