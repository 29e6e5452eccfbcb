"""The measured loss of whole plans: what the selector ``accuracy`` searches by, in the place of traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._plan import Plan, PlanSite
from hawq_lightning.quantization._apply import check_plan, enable_site
from hawq_lightning.quantization._fold import norms_to_fold
from hawq_lightning.quantization._registry import QuantizerSpec
from hawq_lightning.quantization._trial import temporarily_quantized
from hawq_lightning.sensitivity import isolated_eval, to_device

LossFn = Callable[[nn.Module, Any], torch.Tensor]


@contextmanager
def loss_of_plan(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFn,
    batch_size_fn: Callable[[Any], int] = batch_images,
    quantizer: str | QuantizerSpec | None = None,
) -> Iterator[Callable[[Plan], float]]:
    """Inside, a function from a plan to the mean loss of the network quantized by it, without fine-tuning.

    Only sites whose bits differ from the last plan's are armed again.

    Args:
        model: float, or with quantizers in any state; left as it was.
        batches: the mean loss is over these.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batch_size_fn: number of images in a batch.
        quantizer: registered name; ``None``: the twins' own, ``uniform`` for a float model.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kept = [to_device(b, device) for b in batches]
    images = [batch_size_fn(b) for b in kept]
    armed: dict[str, PlanSite] = {}

    def loss_of(plan: Plan) -> float:
        if not armed:
            check_plan(model, plan)
        norms = norms_to_fold(model, plan.layers)
        for site in plan.sites:
            known = armed.get(site.name)
            if known is None or (known.bits, known.code) != (site.bits, site.code):
                for name in site.layers:
                    enable_site(layers[name], site, norms.get(name))
                armed[site.name] = site
        return sum(float(loss_fn(model, b)) * n for b, n in zip(kept, images)) / sum(images)

    with temporarily_quantized(model, quantizer) as layers, isolated_eval(model), torch.no_grad():
        yield loss_of
