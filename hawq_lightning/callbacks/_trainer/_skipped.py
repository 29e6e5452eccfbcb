"""Batches that ``training_step`` skips by returning None are left out of what is measured on."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from hawq_lightning._config import MeasureConfig
from hawq_lightning._errors import HawqError
from hawq_lightning._types import LossFn
from hawq_lightning.sensitivity import OnDevice, isolated_eval, repeatable


class SkippedBatch(HawqError):
    """``training_step`` returned None for a batch, with which Lightning goes on to the next one."""


def without_skipped(module: LightningModule, batches: OnDevice, loss_fn: LossFn, config: MeasureConfig) -> OnDevice:
    """The batches that have a loss; a line is logged where some have none.

    Args:
        module: left as it was.
        batches: as they were drawn.
        loss_fn: of a batch, by ``training_step``.
        config: with a loss of its own nothing is skipped, nor is it by a step that optimizes by hand.

    Raises:
        SkippedBatch: none has a loss.
    """
    if config.loss_fn is not None or not module.automatic_optimization:
        return batches
    run, kept, last = repeatable(module, loss_fn), list[int](), None
    for number in range(len(batches)):
        try:
            with isolated_eval(module), torch.enable_grad():  # a step may ask for gradients
                run(module, batches[number])
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
