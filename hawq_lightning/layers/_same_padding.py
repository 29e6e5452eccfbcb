"""timm's ``Conv2dSame``: zeros are added so that a stride of two halves any size, as TensorFlow does.

How many depends on the input, so that the convolution proper, without padding, is a product inside of the call.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.layers._conv import ConvKind
from hawq_lightning.layers._fake_quant import ActivationQ, FakeQuantLayer, WeightQ
from hawq_lightning.layers._kind import register_layer
from hawq_lightning.layers._products import InnerProductsKind, shown_product
from hawq_lightning.layers._unfold import as_conv


class QConv2dSame(FakeQuantLayer[WeightQ, ActivationQ]):
    """The same convolution, both operands quantized."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the float layer."""
        return _forward(self, x)


@register_layer("timm_conv2d_same")
class SamePaddingKind(InnerProductsKind, ConvKind):
    """What is read is the padded input: zero is on its grid."""

    float_name = "timm.layers.conv2d_same.Conv2dSame"
    fake_quant_type = QConv2dSame
    input_name = "x"

    def explicit_forward(self, module: nn.Module, x: torch.Tensor) -> object:
        """The forward, its product in sight."""
        return _forward(module, x)


def _forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    conv = as_conv(module)
    pads: list[int] = []
    for axis in (-1, -2):  # as F.pad takes them
        size, kernel, stride, dilation = x.shape[axis], conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
        total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        pads += [total // 2, total - total // 2]
    x = F.pad(x, pads) if any(pads) else x
    rest = (module.bias, conv.stride, 0, conv.dilation, conv.groups)
    return shown_product(module, "weight", F.conv2d, x, conv.weight, *rest)
