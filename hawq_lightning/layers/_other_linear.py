"""Linear layers of other libraries: GPT-2's ``Conv1D`` with a transposed weight, and ``nn.Linear`` by another name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.layers._fake_quant import ActivationQ, FakeQuantLayer, WeightQ
from hawq_lightning.layers._gradients import Pairs
from hawq_lightning.layers._kind import LayerCall, register_layer
from hawq_lightning.layers._linear import LinearKind, MatrixGradients


class QConv1D(FakeQuantLayer[WeightQ, ActivationQ]):
    """``transformers.pytorch_utils.Conv1D``, both operands quantized."""

    bias: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the float layer."""
        return self.quantized_product(_conv1d, x, self.weight, self.bias)


class QOtherLinear(FakeQuantLayer[WeightQ, ActivationQ]):
    """A layer with ``weight`` and ``bias`` that computes what ``nn.Linear`` does."""

    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the float layer."""
        return self.quantized_product(F.linear, x, self.weight, self.bias)


@register_layer("transformers_conv1d")
class Conv1DKind(MatrixGradients):
    """``y[..., c] = sum_k x[..., k] W[k, c]``, as GPT-2 has it."""

    float_name = "transformers.pytorch_utils.Conv1D"
    fake_quant_type = QConv1D
    input_name = "x"
    channel_axis = 1

    def macs(self, module: nn.Module, parameter: str, x: torch.Tensor, output: torch.Tensor) -> int:
        """Each output element is a sum over the features read."""
        return output.numel() * x.shape[-1]

    def weight_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Pairs:
        """Transposed."""
        return ((g.mT, h.mT) for g, h in super().weight_gradients(calls, per_sample))

    def matrices(self, directions: torch.Tensor) -> torch.Tensor:
        """Transposed."""
        return directions.mT


@register_layer("torch_geometric_linear")
class GeometricLinearKind(LinearKind):
    """``torch_geometric.nn.Linear``, also before its input size is known; a node or an edge is a position."""

    float_name = "torch_geometric.nn.dense.linear.Linear"
    fake_quant_type = QOtherLinear
    input_name = "x"


@register_layer("timm_linear")
class TimmLinearKind(LinearKind):
    """timm's, whose forward differs under TorchScript alone."""

    float_name = "timm.layers.linear.Linear"
    fake_quant_type = QOtherLinear
    input_name = "input"


def _conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return y.view(*x.shape[:-1], weight.shape[1])
