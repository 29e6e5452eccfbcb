"""Folding BatchNorm into the layer before it: scales and biases change, codes never.

In evaluation mode BatchNorm is ``y -> g * y + (beta - g * mean)`` with ``g = gamma / sqrt(var + eps)`` a channel. A
layer with codes c and scales s takes it in as scales ``s * g``: a negative gamma makes a negative scale and a zero one
a zero scale, so that every code stays what training saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hawq_lightning._batchnorm import NormReads, affine, is_norm
from hawq_lightning.layers import as_reader, find_kind


@dataclass(frozen=True)
class Folding:
    """What became of every BatchNorm.

    Attributes:
        folded: name of the BatchNorm -> the layers that took it in.
        kept: name -> why it stays.
    """

    folded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)


class FoldedNorm(nn.Module):
    """Where a BatchNorm was: the identity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x``."""
        return x


def fold_batch_norm(model: nn.Module, inputs: Iterable[torch.Tensor]) -> Folding:
    """Fold every BatchNorm that can be, in place.

    It can be when all that it normalises are the outputs of convolutions or linear layers that nothing else reads.

    Args:
        model: in evaluation mode; layers with stored codes or with float weights.
        inputs: example inputs of the forward pass.

    Returns:
        what was folded into which layers, and what stays, with the reason.
    """
    names = {id(m): n for n, m in model.named_modules()}
    norms = {names[id(m)]: m for m in model.modules() if is_norm(m)}
    reads = NormReads((m for m in model.modules() if find_kind(m) is not None), norms.values())
    with torch.no_grad():
        reads.run(lambda: model(*inputs))
    folded: dict[str, tuple[str, ...]] = {}
    kept: dict[str, str] = {}
    for name, norm in norms.items():
        if reason := _by_batch(norm) or reads.why_not(norm):
            kept[name] = reason
            continue
        layers = reads.sources[id(norm)]
        for layer in layers:
            _absorb(layer, norm)
        folded[name] = tuple(names[id(m)] for m in layers)
        _clear(norm)
    return Folding(folded, kept)


def _by_batch(norm: nn.Module) -> str | None:
    moving = norm.training or getattr(norm, "running_var", None) is None
    return "it normalises by the statistics of the batch" if moving else None


def _absorb(layer: Any, norm: Any) -> None:
    factor, offset = affine(norm)
    reader = as_reader(layer)
    stored = getattr(layer, reader.quantizer_attribute, None)
    if stored is not None and isinstance(getattr(stored, "codes", None), torch.Tensor):  # in the weight's place
        stored.scale.copy_((stored.scale.double() * factor).float())
    else:  # a layer without codes; its weight may be tied, so it gets its own
        shape = [1] * reader.weight.ndim
        shape[reader.channel_axis] = -1
        folded = (reader.weight.double() * factor.view(shape)).float()
        reader.set_weight(nn.Parameter(folded, requires_grad=False))
    bias = offset if layer.bias is None else layer.bias.detach().double() * factor + offset
    layer.bias = nn.Parameter(bias.float(), requires_grad=False)


def _clear(norm: nn.Module) -> None:
    # the same object in every place that names it, now without state
    for name in [*norm._parameters, *norm._buffers]:
        delattr(norm, name)
    norm.__class__ = FoldedNorm
