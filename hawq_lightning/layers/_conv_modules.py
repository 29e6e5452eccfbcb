"""Fake-quant convolutions of one to three dimensions, and transposed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.layers._fake_quant import ActivationQ, FakeQuantLayer, WeightQ


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
