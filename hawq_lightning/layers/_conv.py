"""Convolutions of one to three dimensions, and transposed ones, as kinds of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from hawq_lightning.layers._conv_gradients import conv_gradients, conv_inner_products, conv_projected_products
from hawq_lightning.layers._conv_modules import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
)
from hawq_lightning.layers._directions import Directions
from hawq_lightning.layers._gradients import Pairs
from hawq_lightning.layers._kind import LayerCall, LayerKind, register_layer
from hawq_lightning.layers._projections import ProjectedProducts
from hawq_lightning.layers._unfold import as_conv, convolved, patch_counts, patch_view, with_batch_axis


class ConvKind(LayerKind):
    """Convolutions; weight ``[C_out, C_in / groups, *kernel]``."""

    onnx_op = "Conv"
    onnx_ops = ("Conv",)
    foldable = True
    reconstructs = True
    transposed: ClassVar[bool] = False

    def weight_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Pairs:
        """By the convolution's backward kernel; see :meth:`LayerKind.weight_gradients`."""
        return conv_gradients(calls, per_sample, self.transposed)

    def inner_products(self, calls: Sequence[LayerCall], per_sample: bool) -> torch.Tensor:
        """By whatever is least work."""
        return conv_inner_products(calls, per_sample, self.transposed)

    def projected_products(
        self, calls: Sequence[LayerCall], per_sample: bool, directions: Directions
    ) -> ProjectedProducts:
        """By whatever is least work."""
        return conv_projected_products(calls, per_sample, self.transposed, directions)

    def product(self, module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See :meth:`LayerKind.product`."""
        return convolved(as_conv(module), x, weight, self.transposed)

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


# they differ in their layers' classes only: dimensions are read from the kernel
for _name, _kind, _quantized in (
    ("conv1d", ConvKind, QConv1d),
    ("conv2d", ConvKind, QConv2d),
    ("conv3d", ConvKind, QConv3d),
    ("conv_transpose1d", ConvTransposeKind, QConvTranspose1d),
    ("conv_transpose2d", ConvTransposeKind, QConvTranspose2d),
    ("conv_transpose3d", ConvTransposeKind, QConvTranspose3d),
):
    _types = {"float_type": _quantized.float_type, "fake_quant_type": _quantized}
    register_layer(_name)(type(f"{_quantized.float_type.__name__}Kind", (_kind,), _types))
