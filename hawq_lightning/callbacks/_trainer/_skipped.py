"""Batches that ``training_step`` skips by returning None are left out of what is measured on."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._types import LossFn
from hawq_lightning.sensitivity import OnDevice, isolated_eval, repeatable


class SkippedBatch(HawqError):
    """``training_step`` returned None for a batch, with which Lightning goes on to the next one."""


def without_skipped(module: nn.Module, batches: OnDevice, loss_fn: LossFn) -> OnDevice:
    """The batches that have a loss; a line is logged where some have none.

    Args:
        module: left as it was.
        batches: as they were drawn.
        loss_fn: of a batch, by ``training_step``.

    Raises:
        SkippedBatch: none has a loss.
    """
    kept: list[int] = []
    last = None
    for number in range(len(batches)):
        try:
            with isolated_eval(module), torch.enable_grad():  # a step may ask for gradients
                repeatable(module, loss_fn)(module, batches[number])
        except SkippedBatch as skipped:
            last = skipped
            continue
        except Exception:  # what else is wrong with the step is told by whoever measures
            return batches
        kept.append(number)
    if last is None:
        return batches
    if not kept:
        raise SkippedBatch(f"Of {len(batches)} train batches none has a loss: {last}") from last
    rank_zero_info(
        f"HAWQ: training_step returns None for {len(batches) - len(kept)} of {len(batches)} batches: as in training, "
        "they are left out."
    )
    return batches.only(kept)
