"""Quantizers for a while: tried on a model that afterwards is as it was, armed or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hawq_lightning.quantization._apply import disable, prepare, quantized_layers, quantizers
from hawq_lightning.quantization._modules import QuantizedLayer, to_float
from hawq_lightning.quantization._registry import QuantizerSpec


@contextmanager
def temporarily_quantized(
    model: nn.Module, quantizer: str | QuantizerSpec | None = None
) -> Iterator[dict[str, QuantizedLayer]]:
    """Inside, every quantizable layer is a twin with its quantizers off; afterwards all is as it was.

    Args:
        model: float, or with quantizers in any state.
        quantizer: registered name; ``None``: the twins' own, ``uniform`` for a float layer.
    """
    had = {
        id(x): (x.weight_quantizer, x.input_quantizer, x.quantizer_options) for x in quantized_layers(model).values()
    }
    states = [(q, [(t, t.detach().clone()) for t in q._tensors()], _plain(q)) for q in quantizers(model)]
    layers = prepare(model, quantizer=quantizer)
    disable(model)
    for q in quantizers(model):
        q.fake_quant_disabled = False
    try:
        yield layers
    finally:
        for layer in layers.values():
            if id(layer) in had:
                layer.weight_quantizer, layer.input_quantizer, layer.quantizer_options = had[id(layer)]
            else:
                to_float(layer)
        with torch.no_grad():
            for q, tensors, plain in states:
                for tensor, value in tensors:
                    tensor.copy_(value)
                q.__dict__.update(plain)


def _plain(quantizer: nn.Module) -> dict[str, Any]:
    """Attributes beside parameters and buffers."""
    return {k: v for k, v in quantizer.__dict__.items() if k not in _MODULES}


_MODULES = set(nn.Module().__dict__) - {"training"}
