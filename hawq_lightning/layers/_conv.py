"""Convolutions of one to three dimensions, and transposed ones.

Per-sample gradients come from the kernel that training uses where unfolding would copy much. On a CPU it takes a third
of the time of unfolding and multiplying for a 3 x 3 convolution, and a twentieth for a depthwise one
(``benchmarks/trace_cost.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.layers._fake_quant import ActivationQ, FakeQuantLayer, WeightQ
from hawq_lightning.layers._gradients import (
    Factors,
    Pairs,
    as_one_row,
    gram_is_less,
    gram_products,
    joined,
    products,
    row_dots,
)
from hawq_lightning.layers._kind import LayerCall, LayerKind, register_layer
from hawq_lightning.layers._unfold import Conv, as_conv, paddings, patch_counts, patch_view, unfold, with_batch_axis

_FEW = 1 << 15  # elements of an unfolded sample up to which copying them is cheap
_LIGHT = 10**7  # multiplications a sample below which a call is mostly overhead
_CHANNELS = 256  # of samples side by side in one call


class _QConv(FakeQuantLayer[WeightQ, ActivationQ], nn.modules.conv._ConvNd):
    _conv_forward: Callable[..., torch.Tensor]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the float convolution."""
        return self.quantized_product(self._conv_forward, input, self.weight, self.bias)


class QConv1d(_QConv[WeightQ, ActivationQ], nn.Conv1d):
    """1-D convolution, both operands quantized."""

    float_type = nn.Conv1d


class QConv2d(_QConv[WeightQ, ActivationQ], nn.Conv2d):
    """2-D convolution, both operands quantized."""

    float_type = nn.Conv2d


class QConv3d(_QConv[WeightQ, ActivationQ], nn.Conv3d):
    """3-D convolution, both operands quantized."""

    float_type = nn.Conv3d


class _QConvTranspose(FakeQuantLayer[WeightQ, ActivationQ], nn.modules.conv._ConvTransposeNd):
    product: ClassVar[Callable[..., torch.Tensor]]

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """As the float transposed convolution."""
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation  # type: ignore[arg-type]
        )  # fmt: skip
        return self.quantized_product(
            type(self).product, input, self.weight, self.bias, self.stride, self.padding, padding, self.groups,
            self.dilation,
        )  # fmt: skip


class QConvTranspose1d(_QConvTranspose[WeightQ, ActivationQ], nn.ConvTranspose1d):
    """1-D transposed convolution, both operands quantized."""

    float_type = nn.ConvTranspose1d
    product = F.conv_transpose1d


class QConvTranspose2d(_QConvTranspose[WeightQ, ActivationQ], nn.ConvTranspose2d):
    """2-D transposed convolution, both operands quantized."""

    float_type = nn.ConvTranspose2d
    product = F.conv_transpose2d


class QConvTranspose3d(_QConvTranspose[WeightQ, ActivationQ], nn.ConvTranspose3d):
    """3-D transposed convolution, both operands quantized."""

    float_type = nn.ConvTranspose3d
    product = F.conv_transpose3d


class ConvKind(LayerKind):
    """Convolutions; weight ``[C_out, C_in / groups, *kernel]``."""

    onnx_op = "Conv"
    onnx_ops = ("Conv",)
    foldable = True
    reconstructs = True
    transposed: ClassVar[bool] = False

    def weight_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Pairs:
        """See :meth:`LayerKind.weight_gradients`."""
        return self._kernel_gradients(calls, per_sample)

    def inner_products(self, calls: Sequence[LayerCall], per_sample: bool) -> torch.Tensor:
        """By Gram matrices, products of unfolded inputs, or the convolution's backward kernel: what is least work."""
        layer = as_conv(calls[0].layer)
        weight, groups = layer.weight, int(layer.groups)
        rows, columns = weight.shape[0] // groups, weight[0].numel()
        positions = sum((c.read if self.transposed else c.grad).numel() // weight.shape[0] for c in calls)
        samples = 1 if calls[0].grad.ndim < weight.ndim else calls[0].grad.shape[0]
        positions = positions // samples if per_sample else positions
        by_gram = gram_is_less(positions, rows, columns)
        if not by_gram and by_kernel(layer, positions * columns * groups):
            pairs = self._kernel_gradients(calls, per_sample)
        else:
            u, d, e = joined([self._factors(call, per_sample) for call in calls])
            if by_gram:
                return gram_products(u, d, e)
            pairs = products(u, d, None if all(call.other is None for call in calls) else e)
        return torch.cat([row_dots(g, h) for g, h in pairs])

    def output_axes(self, module: nn.Module) -> int:
        """Samples, channels and the spatial axes."""
        return 2 + len(as_conv(module).kernel_size)

    def channels_from_end(self, module: nn.Module) -> int:
        """Before the spatial axes."""
        return -1 - len(as_conv(module).kernel_size)

    def onnx_attributes(self, module: nn.Module) -> dict[str, object]:
        """Strides, dilations, groups and padding."""
        layer = as_conv(module)
        attributes: dict[str, object] = {"strides": layer.stride, "dilations": layer.dilation, "group": layer.groups}
        if isinstance(layer.padding, str):
            attributes["auto_pad"] = "SAME_UPPER" if layer.padding == "same" else "VALID"
        else:
            attributes["pads"] = (*layer.padding, *layer.padding)
        return attributes

    def groups(self, module: nn.Module) -> int:
        """Of the convolution."""
        return int(as_conv(module).groups)

    def patches(self, module: nn.Module, x: torch.Tensor, most: int) -> torch.Tensor:
        """See :meth:`LayerKind.patches`."""
        layer = as_conv(module)
        x = with_batch_axis(layer, x)
        counts = patch_counts(layer, x)
        positions, columns = int(torch.Size(counts).numel()), layer.weight[0, 0].numel()
        x = x[:: -(-len(x) * positions // most)]
        n, channels, dims = len(x), x.shape[1], len(counts)
        view = patch_view(layer, x, counts)
        # [N, C, kernel..., positions...] -> [groups, N * positions, C / groups * kernel]
        view = view.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
        view = view.reshape(n, layer.groups, channels // layer.groups, positions, columns)
        return view.permute(1, 0, 3, 2, 4).reshape(layer.groups, n * positions, layer.weight[0].numel())

    def _factors(self, call: LayerCall, per_sample: bool) -> Factors:
        layer, other = as_conv(call.layer), call.grad if call.other is None else call.other
        if self.transposed:
            # the gradient of a transposed convolution is that of a convolution with input and output in each other's
            # place; G = read . unfold(grad)^T: the roles of C and K are swapped, the inner product is the same
            d, e = unfold(layer, call.grad, call.read, True), unfold(layer, other, call.read, True)
            u = _grouped(layer, call.read)
        else:
            u = unfold(layer, call.read, call.grad)
            d = _grouped(layer, call.grad)
            e = d if call.other is None else _grouped(layer, other)
        return (u, d, e) if per_sample else as_one_row((u, d, e))

    def _kernel_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Pairs:
        layers = [as_conv(call.layer) for call in calls]
        reads, grads = (
            [with_batch_axis(layer, x) for layer, x in zip(layers, xs)]
            for xs in ([c.read for c in calls], [c.grad for c in calls])
        )
        others = None
        if any(call.other is not None for call in calls):
            others = [with_batch_axis(x, c.grad if c.other is None else c.other) for x, c in zip(layers, calls)]
        rows = reads[0].shape[0]
        at_once = self._side_by_side(layers[0], grads[0]) if per_sample else rows
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)

            def total(outs: Sequence[torch.Tensor], part: slice = part) -> torch.Tensor:
                calls_of_part = zip(layers, reads, outs)
                terms = [_gradient(x, r[part], g[part], per_sample, self.transposed) for x, r, g in calls_of_part]
                return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)

            g = total(grads)
            yield g, g if others is None else total(others)

    def _side_by_side(self, layer: Conv, grad: torch.Tensor) -> int:
        """Samples in one call, as groups of a grouped convolution."""
        if self.transposed:
            return 1
        work = grad[0, 0].numel() * layer.weight.numel()
        return max(1, _CHANNELS // max(layer.in_channels, layer.out_channels)) if work < _LIGHT else 1


class ConvTransposeKind(ConvKind):
    """Transposed convolutions; weight ``[C_in, C_out / groups, *kernel]``."""

    channel_axis = 1
    onnx_op = "ConvTranspose"
    onnx_ops = ("ConvTranspose",)
    reconstructs = False
    transposed = True

    def macs(self, module: nn.Module, parameter: str, x: torch.Tensor, output: torch.Tensor) -> int:
        """Each input element is multiplied with a row of the weight."""
        return super().macs(module, parameter, output, x)

    def why_not_folded(self, module: nn.Module) -> str | None:
        """One scale an index of the channel axis serves every group."""
        return "the groups of a transposed convolution share their scales" if self.groups(module) > 1 else None

    def onnx_attributes(self, module: nn.Module) -> dict[str, object]:
        """As of a convolution, and the output padding."""
        return super().onnx_attributes(module) | {"output_padding": as_conv(module).output_padding}

    def onnx_channels(self, shape: Sequence[int], groups: int) -> int:
        """Those of every group."""
        return shape[1] * groups


@register_layer("conv1d")
class Conv1dKind(ConvKind):
    """``nn.Conv1d``."""

    float_type, fake_quant_type = nn.Conv1d, QConv1d


@register_layer("conv2d")
class Conv2dKind(ConvKind):
    """``nn.Conv2d``."""

    float_type, fake_quant_type = nn.Conv2d, QConv2d


@register_layer("conv3d")
class Conv3dKind(ConvKind):
    """``nn.Conv3d``."""

    float_type, fake_quant_type = nn.Conv3d, QConv3d


@register_layer("conv_transpose1d")
class ConvTranspose1dKind(ConvTransposeKind):
    """``nn.ConvTranspose1d``."""

    float_type, fake_quant_type = nn.ConvTranspose1d, QConvTranspose1d


@register_layer("conv_transpose2d")
class ConvTranspose2dKind(ConvTransposeKind):
    """``nn.ConvTranspose2d``."""

    float_type, fake_quant_type = nn.ConvTranspose2d, QConvTranspose2d


@register_layer("conv_transpose3d")
class ConvTranspose3dKind(ConvTransposeKind):
    """``nn.ConvTranspose3d``."""

    float_type, fake_quant_type = nn.ConvTranspose3d, QConvTranspose3d


def by_kernel(layer: nn.Module, unfolded: int) -> bool:
    """Whether the convolution's backward kernel is the faster way to a gradient.

    Args:
        layer: a convolution.
        unfolded: elements of an unfolded row.
    """
    conv = as_conv(layer)
    if conv.weight.device.type != "cpu":
        return False  # on accelerators one product of all samples keeps the device busy, many small calls do not
    pointwise = all(k == 1 for k in conv.kernel_size)
    return int(conv.groups) > 1 or not (pointwise or unfolded <= _FEW)


def _grouped(layer: Conv, x: torch.Tensor) -> torch.Tensor:
    x = with_batch_axis(layer, x)
    return x.reshape(x.shape[0], layer.groups, x.shape[1] // layer.groups, -1)


def _gradient(layer: Conv, read: torch.Tensor, grad: torch.Tensor, per_sample: bool, transposed: bool) -> torch.Tensor:
    """``[samples, *weight.shape]``, or ``[1, *weight.shape]`` of all samples together."""
    pads, dims, samples = paddings(layer, transposed), len(layer.kernel_size), read.shape[0]
    even = all(pads[2 * i] == pads[2 * i + 1] for i in range(dims))
    if (layer.padding_mode != "zeros" and not transposed) or not even:
        read = F.pad(read, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        pads = [0] * (2 * dims)
    weight, groups = layer.weight.detach(), layer.groups
    if per_sample and samples > 1:  # samples become groups; a weight is asked for its shape alone
        read, grad = (x.reshape(1, -1, *x.shape[2:]) for x in (read, grad))
        weight, groups = weight.expand(samples, *weight.shape).flatten(0, 1), samples * groups
    gradient = torch.ops.aten.convolution_backward(
        grad.contiguous(), read.contiguous(), weight.to(grad.dtype), None, list(layer.stride),
        list(reversed(pads[::2])), list(layer.dilation), transposed, list(layer.output_padding), groups,
        [False, True, False],
    )[1]  # fmt: skip
    return gradient.reshape(samples if per_sample else 1, *layer.weight.shape)  # type: ignore[no-any-return]
