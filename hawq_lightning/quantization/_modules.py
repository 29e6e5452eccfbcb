"""Fake-quant twins of the quantizable layers, made in place: same object, Parameters and names, another class.

Swapping ``__class__`` keeps aliases, hooks, Python lists, tied weights, pickling and deepcopy intact, which replacing
the module does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning._sites import channel_axis
from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer
from hawq_lightning.quantization._recompute import recompute_in_backward
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named


class QuantizedLayer(nn.Module):
    """What all twins share. ``float_type`` is the layer type that a twin stands in for."""

    float_type: type[nn.Module]
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer
    weight: torch.Tensor
    quantizer_options: dict[str, Any]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Twins that were pickled by an earlier version lack some things."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("quantizer_options", {})
        if must_be_called not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(must_be_called)

    @property
    def spec(self) -> QuantizerSpec:
        """The quantizer with its options."""
        return quantizer_named(self.weight_quantizer.name, self.quantizer_options)

    @property
    def quantized_weight(self) -> torch.Tensor:
        """The weight as the forward pass uses it."""
        return self.weight_quantizer(self.weight)


class QLinear(QuantizedLayer, nn.Linear):
    """Linear layer, both operands quantized."""

    float_type = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As ``nn.Linear``."""
        if input.is_nested:  # what torch's Transformer makes of padded sequences
            parts = [self.input_quantizer(t) for t in input.unbind()]
            return F.linear(torch.nested.as_nested_tensor(parts), self.quantized_weight, self.bias)
        x, weight = self.input_quantizer(input), self.quantized_weight
        with recompute_in_backward((x, input, self.input_quantizer), (weight, self.weight, self.weight_quantizer)):
            return F.linear(x, weight, self.bias)


class _QConv(QuantizedLayer, nn.modules.conv._ConvNd):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the float convolution."""
        x, weight = self.input_quantizer(input), self.quantized_weight
        with recompute_in_backward((x, input, self.input_quantizer), (weight, self.weight, self.weight_quantizer)):
            return self._conv_forward(x, weight, self.bias)  # type: ignore[operator]


class QConv1d(_QConv, nn.Conv1d):
    """1-D convolution, both operands quantized."""

    float_type = nn.Conv1d


class QConv2d(_QConv, nn.Conv2d):
    """2-D convolution, both operands quantized."""

    float_type = nn.Conv2d


class QConv3d(_QConv, nn.Conv3d):
    """3-D convolution, both operands quantized."""

    float_type = nn.Conv3d


class _QConvTranspose(QuantizedLayer, nn.modules.conv._ConvTransposeNd):
    spatial: int
    stride: Any
    padding: Any
    kernel_size: Any
    dilation: Any

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """As the float transposed convolution."""
        pad = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            self.spatial,
            self.dilation,  # type: ignore[arg-type]
        )
        run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.spatial - 1]
        x = self.input_quantizer(input)
        weight = self.quantized_weight
        with recompute_in_backward((x, input, self.input_quantizer), (weight, self.weight, self.weight_quantizer)):
            return run(x, weight, self.bias, self.stride, self.padding, pad, self.groups, self.dilation)  # type: ignore[arg-type]


class QConvTranspose1d(_QConvTranspose, nn.ConvTranspose1d):
    """1-D transposed convolution, both operands quantized."""

    float_type = nn.ConvTranspose1d
    spatial = 1


class QConvTranspose2d(_QConvTranspose, nn.ConvTranspose2d):
    """2-D transposed convolution, both operands quantized."""

    float_type = nn.ConvTranspose2d
    spatial = 2


class QConvTranspose3d(_QConvTranspose, nn.ConvTranspose3d):
    """3-D transposed convolution, both operands quantized."""

    float_type = nn.ConvTranspose3d
    spatial = 3


TWINS: dict[type[nn.Module], type[QuantizedLayer]] = {
    twin.float_type: twin
    for twin in (
        QLinear,
        QConv1d,
        QConv2d,
        QConv3d,
        QConvTranspose1d,
        QConvTranspose2d,
        QConvTranspose3d,
    )
}


def to_fake_quantized(layer: nn.Module, quantizer: str | QuantizerSpec | None = None) -> QuantizedLayer:
    """Turn a layer into its twin in place, quantizers off.

    Args:
        layer: of a quantizable type, or a twin, which stays as it is unless it has another quantizer.
        quantizer: registered name; ``None``: a twin's own, ``uniform`` for a float layer. A twin that has it with
            other options gets new quantizers with the old ones' state.
    """
    if isinstance(layer, QuantizedLayer):
        spec = layer.spec if quantizer is None else quantizer_named(quantizer)
        if layer.weight_quantizer.name == spec.name:
            if layer.quantizer_options != dict(spec.options):
                old = layer.weight_quantizer, layer.input_quantizer
                _put_quantizers(layer, spec)
                for new, known in zip((layer.weight_quantizer, layer.input_quantizer), old):
                    new.load_state_dict(known.state_dict())
                    new._parameters.update(known._parameters)  # an optimizer may know them
            return layer
        to_float(layer)
    spec = quantizer_named(quantizer or "uniform")
    layer.__class__ = TWINS[type(layer)]
    assert isinstance(layer, QuantizedLayer)
    layer.register_forward_pre_hook(must_be_called)
    _put_quantizers(layer, spec)
    return layer


def must_be_called(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: a module that has one is called, not read past, as fused Transformer layers do."""


def _put_quantizers(layer: QuantizedLayer, spec: QuantizerSpec) -> None:
    axis = channel_axis(layer)
    layer.weight_quantizer = spec.weight_quantizer(layer.weight.shape[axis], axis).to(layer.weight.device)
    layer.input_quantizer = spec.activation_quantizer().to(layer.weight.device)
    layer.quantizer_options = dict(spec.options)
    layer.weight_quantizer.train(layer.training)
    layer.input_quantizer.train(layer.training)


def to_float(layer: nn.Module) -> nn.Module:
    """Undo :func:`to_fake_quantized`: the plain layer again, with the weight that it holds."""
    if isinstance(layer, QuantizedLayer):
        del layer.weight_quantizer, layer.input_quantizer, layer.quantizer_options
        for key in [k for k, hook in layer._forward_pre_hooks.items() if hook is must_be_called]:
            del layer._forward_pre_hooks[key]
        layer.__class__ = layer.float_type  # type: ignore[assignment]
    return layer
