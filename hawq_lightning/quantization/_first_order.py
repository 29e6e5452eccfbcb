"""The term that the paper's Assumption 1 sets to zero: g . dW, which is small only where training has converged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._plan import Plan
from hawq_lightning._sites import quantizable_layers
from hawq_lightning.quantization._fold import norms_to_fold
from hawq_lightning.quantization._registry import quantizer_named
from hawq_lightning.sensitivity import isolated_eval, to_device


def first_order_term(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    plan: Plan,
    batch_size_fn: Callable[[Any], int] = batch_images,
) -> float:
    """``sum_l <g_l, Q(W_l) - W_l>`` over the weights of a plan, g the gradient of the mean loss over ``batches``."""
    layers, _ = quantizable_layers(model)
    weights = {s.name: layers[s.layers[0]] for s in plan.weights}
    norms = norms_to_fold(model, plan.layers)
    spec = quantizer_named(plan.quantizer, plan.quantizer_options)
    total, count = 0.0, 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with isolated_eval(model), torch.enable_grad():
        shifts = {}
        for s in plan.weights:
            layer = weights[s.name]
            w = layer.weight.detach()
            axis = layer.channel_axis
            quantizer = spec.weight_quantizer(w.shape[axis], axis).to(w.device)
            quantizer.fold(norms.get(s.layers[0]))
            quantizer.fit(w, s.bits, s.code)
            shifts[s.name] = (quantizer(w.float()) - w).detach()
        for layer in weights.values():
            layer.weight.requires_grad_(True)
        for batch in batches:
            batch = to_device(batch, device)
            n = batch_size_fn(batch)
            loss = loss_fn(model, batch)
            slopes = torch.autograd.grad(loss, [m.weight for m in weights.values()], allow_unused=True)
            total += n * sum(float((g * shifts[k]).sum()) for k, g in zip(weights, slopes) if g is not None)
            count += n
    return total / max(count, 1)
