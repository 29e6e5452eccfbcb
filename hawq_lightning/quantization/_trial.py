"""Quantizers for a while: tried on a model that afterwards is as it was, armed or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hawq_lightning.quantization._apply import disable, prepare, quantized_layers, quantizers
from hawq_lightning.quantization._modules import QuantizedWeight, quantizers_in, to_float
from hawq_lightning.quantization._registry import QuantizerSpec


@contextmanager
def temporarily_quantized(
    model: nn.Module, quantizer: str | QuantizerSpec | None = None
) -> Iterator[dict[str, QuantizedWeight]]:
    """Inside, every quantizable layer is a twin with its quantizers off; afterwards all is as it was.

    Args:
        model: float, or with quantizers in any state.
        quantizer: registered name; ``None``: the twins' own, ``uniform`` for a float layer.
    """
    modules: dict[int, Any] = {id(x.module): x.module for x in quantized_layers(model).values()}
    had = {key: (quantizers_in(m), m.quantizer_options) for key, m in modules.items()}
    states = [(q, [(t, t.detach().clone()) for t in q._tensors()], _plain(q)) for q in quantizers(model)]
    layers = prepare(model, quantizer=quantizer)
    disable(model)
    for q in quantizers(model):
        q.fake_quant_disabled = False
    try:
        yield layers
    finally:
        for layer in layers.values():
            if id(layer.module) not in had:
                to_float(layer.module)
        for key, (before, options) in had.items():
            modules[key]._modules.update(before)
            modules[key].quantizer_options = options
        with torch.no_grad():
            for q, tensors, plain in states:
                for tensor, value in tensors:
                    tensor.copy_(value)
                q.__dict__.update(plain)


def _plain(quantizer: nn.Module) -> dict[str, Any]:
    """Attributes beside parameters and buffers."""
    return {k: v for k, v in quantizer.__dict__.items() if k not in _MODULES}


_MODULES = set(nn.Module().__dict__) - {"training"}
