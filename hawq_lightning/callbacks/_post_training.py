"""Post-training methods in the Trainer: on its own data, alike on every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from hawq_lightning.callbacks._trainer import draw_batches, loss_from_training_step, onto_device, shows_progress
from hawq_lightning.quantization import quantizers
from hawq_lightning.quantization.post_training import post_training


@contextmanager
def outside_of_evaluation(pl_module: LightningModule) -> Iterator[None]:
    """Gradients and training mode in the midst of ``trainer.validate``, which has switched both off."""
    modes = [(m, m.training) for m in pl_module.modules()]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            pl_module.train()  # detectors return losses in training mode only
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def improve(
    trainer: Trainer,
    pl_module: LightningModule,
    methods: bool | Sequence[str],
    images: int,
    seed: int,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Apply post-training methods to an armed module.

    Args:
        trainer: its train data is used, or in ``validate`` its validation data where there is none.
        pl_module: changed in place.
        methods: see :func:`hawq_lightning.quantization.post_training.post_training`.
        images: how many to look at.
        seed: of the draw.
        loss_fn: runs the module instead of ``training_step``.
        progress: show bars where the Trainer does.

    Returns:
        method -> what it reports of each layer.
    """
    with loss_from_training_step(trainer, pl_module, loss_fn) as forward:
        batches = onto_device(trainer, pl_module, draw_batches(trainer, images, seed))
        show = progress and shows_progress(trainer)
        found = post_training(pl_module, batches, methods, forward=forward, progress=show)
    if trainer.world_size > 1:  # one processor's rounding may differ from another's
        mine = {id(t) for q in quantizers(pl_module) for t in (*q.parameters(), *q.buffers())}
        for tensor in (*pl_module.parameters(), *pl_module.buffers()):
            if id(tensor) not in mine:
                tensor.data.copy_(trainer.strategy.broadcast(tensor.data))
    for name, layers in found.items():
        rank_zero_info(f"HAWQ: {name}: {_summary(name, layers)}")
    return found


def _summary(name: str, layers: dict[str, Any]) -> str:
    if not layers:
        return "no layer that it applies to."
    count = len(layers)
    if name == "adaround":
        moved = sum(v["moved"] for v in layers.values()) / count
        after, before = (sum(v[k] for v in layers.values()) / count for k in ("after", "before"))
        return f"{count} layers, {moved:.1%} of the codes moved, mean output error {before:.3g} -> {after:.3g}."
    if name == "bias_correction":
        return f"{count} layers, means shifted by {sum(layers.values()) / count:.3g} standard deviations."
    return f"{count} layers, standard deviations times {sum(layers.values()) / count:.3g}."
