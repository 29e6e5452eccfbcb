"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells: weights, and what the first layer reads; states stay float.

The fused functions take quantized weights as well as others. They show no products, so that a network is measured with
every step written out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from hawq_lightning._types import FunctionInputs, Options
from hawq_lightning.layers._fake_quant import (
    ActivationQ,
    FakeQuantLayer,
    WeightQ,
    input_quantizer_attribute,
    quantizer_attribute,
)
from hawq_lightning.layers._kind import WeightRead, register_layer
from hawq_lightning.layers._linear import MatrixGradients
from hawq_lightning.layers._products import InnerProductsKind, visited
from hawq_lightning.layers._unrolled import FUSED, unrolled

_OF_A_CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "hidden_size", "nonlinearity")


class _Recurrent(FakeQuantLayer[WeightQ, ActivationQ], nn.RNNBase):
    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the float module, by its fused function."""
        first = "weight_ih_l0"
        data = getattr(self, input_quantizer_attribute(first))(_data(input))
        return _with_weights(self, _with_data(input, data), hx)


class QLSTM(_Recurrent[WeightQ, ActivationQ], nn.LSTM):
    """LSTM with quantized weights."""

    float_type = nn.LSTM


class QGRU(_Recurrent[WeightQ, ActivationQ], nn.GRU):
    """GRU with quantized weights."""

    float_type = nn.GRU


class QRNN(_Recurrent[WeightQ, ActivationQ], nn.RNN):
    """Elman network with quantized weights."""

    float_type = nn.RNN


class _Cell(FakeQuantLayer[WeightQ, ActivationQ], nn.RNNCellBase):
    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        """As the float cell, by its fused function."""
        return _with_weights(self, getattr(self, input_quantizer_attribute("weight_ih"))(input), hx)


class QLSTMCell(_Cell[WeightQ, ActivationQ], nn.LSTMCell):
    """A step of an LSTM with quantized weights."""

    float_type = nn.LSTMCell


class QGRUCell(_Cell[WeightQ, ActivationQ], nn.GRUCell):
    """A step of a GRU with quantized weights."""

    float_type = nn.GRUCell


class QRNNCell(_Cell[WeightQ, ActivationQ], nn.RNNCell):
    """A step of an Elman network with quantized weights."""

    float_type = nn.RNNCell


class RecurrentKind(InnerProductsKind, MatrixGradients):
    """Weights ``[gates * hidden, features]``, of every layer and direction, one scale a row.

    Only what the first layer reads is an activation site: hidden states are float.
    """

    def weights(self, module: nn.Module) -> Mapping[str, WeightRead]:
        """Input, hidden and, of an LSTM with one, projection matrices."""
        names = getattr(module, "_flat_weights_names", _OF_A_CELL[:2])
        return {
            n: WeightRead(0, n.startswith("weight_ih_l0") or n == "weight_ih") for n in names if n.startswith("weight")
        }

    def explicit_forward(self, module: nn.Module, input: Any, hx: Any = None) -> object:
        """Step by step, with every product in sight."""
        reads = {}
        for name, read in self.weights(module).items():
            if read.reads_activation:
                x = visited(module, name, _data(input))
                quantizer = getattr(module, input_quantizer_attribute(name), None)
                reads[name] = x if quantizer is None else quantizer(x)
        with _Unrolled(module, reads):
            return _with_weights(module, input, hx)


class _Unrolled(TorchFunctionMode):
    """Inside, the fused functions of one module are written out.

    Args:
        module: whose products they are.
        reads: parameter -> what it reads of the module's input.
    """

    def __init__(self, module: nn.Module, reads: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._module, self._reads = module, reads

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        if func in FUSED:
            return unrolled(self._module, self._reads, FUSED[func], args)
        return func(*args, **(kwargs or {}))


def _data(input: Any) -> torch.Tensor:
    return cast(torch.Tensor, input.data if isinstance(input, PackedSequence) else input)


def _with_data(input: Any, data: torch.Tensor) -> Any:
    return input._replace(data=data) if isinstance(input, PackedSequence) else data


def _with_weights(module: nn.Module, input: Any, hx: Any) -> Any:
    """The float class's forward, with quantized weights where the module has quantizers."""
    forward = next(_FORWARDS[t] for t in type(module).__mro__ if t in _FORWARDS)
    if not isinstance(module, FakeQuantLayer):
        return forward(module, input, hx)
    if isinstance(module, nn.RNNCellBase):
        cell = {n: getattr(module, n) for n in _OF_A_CELL if hasattr(module, n)}
        cell |= {n: _quantized(module, n, cell[n]) for n in _OF_A_CELL[:2]}
        return forward(SimpleNamespace(**cell), input, hx)
    rnn = cast(Any, module)
    rnn._update_flat_weights()
    kept = rnn._flat_weights
    rnn._flat_weights = [_quantized(module, n, w) for n, w in zip(rnn._flat_weights_names, kept)]
    try:
        return forward(module, input, hx)
    finally:
        rnn._flat_weights = kept


def _quantized(module: nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    quantizer = getattr(module, quantizer_attribute(name), None)
    return weight if quantizer is None else cast(torch.Tensor, quantizer(weight))


@register_layer("lstm")
class LSTMKind(RecurrentKind):
    """``nn.LSTM``."""

    float_type, fake_quant_type = nn.LSTM, QLSTM


@register_layer("gru")
class GRUKind(RecurrentKind):
    """``nn.GRU``."""

    float_type, fake_quant_type = nn.GRU, QGRU


@register_layer("rnn")
class RNNKind(RecurrentKind):
    """``nn.RNN``."""

    float_type, fake_quant_type = nn.RNN, QRNN


@register_layer("lstm_cell")
class LSTMCellKind(RecurrentKind):
    """``nn.LSTMCell``."""

    float_type, fake_quant_type = nn.LSTMCell, QLSTMCell


@register_layer("gru_cell")
class GRUCellKind(RecurrentKind):
    """``nn.GRUCell``."""

    float_type, fake_quant_type = nn.GRUCell, QGRUCell


@register_layer("rnn_cell")
class RNNCellKind(RecurrentKind):
    """``nn.RNNCell``."""

    float_type, fake_quant_type = nn.RNNCell, QRNNCell


_FORWARDS: dict[type, Callable[..., Any]] = {
    t: t.forward for t in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
}
