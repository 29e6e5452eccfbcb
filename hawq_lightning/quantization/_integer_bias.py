"""Biases of whole steps, as integer kernels add them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hawq_lightning._batchnorm import affine
from hawq_lightning.layers import as_reader

_LARGEST = 1 << 30  # of an INT32 bias in the integer file, which makes the scales of such channels greater


class IntegerBias(nn.Module):
    """What a layer's bias changes by when it becomes whole steps of its input's scale times its weight's.

    A BatchNorm behind the layer counts as a part of it: it is folded with its running statistics, in training, too,
    since the file has those.

    Args:
        layer: a fake-quant layer with one weight.
        norm: the BatchNorm that it takes in, if there is one.
        path: how the layer is named from here; state dicts tell it.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module | None, path: str) -> None:
        super().__init__()
        self._of = (layer, norm)  # in a tuple, so that they are no submodules
        self._last: torch.Tensor | None = None
        self.register_buffer(path, torch.zeros((), dtype=torch.float32))

    @property
    def layer(self) -> nn.Module:
        """Whose bias it is."""
        return self._of[0]

    @property
    def norm(self) -> nn.Module | None:
        """That the layer takes in."""
        return self._of[1]

    @torch.no_grad()
    def change(self) -> torch.Tensor | None:
        """Rounded minus float bias a channel, in float64; ``None`` while a quantizer is off, or there is no bias."""
        layer: Any = self.layer
        reader = as_reader(layer)
        w, a = getattr(layer, reader.quantizer_attribute), getattr(layer, reader.input_quantizer_attribute)
        off = not w.bits or not a.bits or w.fake_quant_disabled or a.fake_quant_disabled
        if off or (layer.bias is None and self.norm is None):
            return None
        scale = w.scale.double() / (2 if w.code == "midrise" else 1)
        if self.norm is None:
            bias = layer.bias.double()
        else:
            factor, offset = affine(self.norm)
            bias = offset if layer.bias is None else layer.bias.double() * factor + offset
            scale = scale * factor
        bias = bias.float().double()
        step = (a.scale.float() * scale.float()).double()
        codes = bias / torch.where(step == 0, 1.0, step)
        return torch.where((step == 0) | (codes.abs() > _LARGEST), 0.0, codes.round() * step - bias)

    @torch.no_grad()
    def bake(self) -> None:
        """Change the bias of the layer, or of the norm, for good."""
        change, target = self.change(), self.layer if self.norm is None else self.norm
        if change is None:
            return
        held: Any = target.bias
        bias = change if held is None else held.double() + change
        target.bias = nn.Parameter(bias.to(torch.float32 if held is None else held.dtype), requires_grad=False)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """What layer and norm gave, with the rounded bias in the place of the float one."""
        again = torch._C._current_graph_task_id() != -1  # activation checkpointing, after running statistics moved
        change = self._last = self._last if again and self._last is not None else self.change()
        if change is None:
            return y
        weight: Any = self.layer.weight
        shape = [1] * y.ndim
        shape[y.ndim + 1 - weight.ndim] = -1  # the channels stand before the positions
        return y + change.to(y.dtype).view(shape)
