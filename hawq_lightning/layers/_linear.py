"""Linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.layers._directions import Directions
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
from hawq_lightning.layers._projections import ProjectedProducts, projected_factors


class QLinear(FakeQuantLayer[WeightQ, ActivationQ], nn.Linear):
    """Linear layer, both operands quantized."""

    float_type = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As ``nn.Linear``."""
        if isinstance(input, torch.Tensor) and input.is_nested:  # what torch's Transformer makes of padded sequences
            parts = [self.input_quantizer(t) for t in input.unbind()]
            return F.linear(torch.nested.as_nested_tensor(parts), self.quantized_weight, self.bias)
        return self.quantized_product(F.linear, input, self.weight, self.bias)


class MatrixGradients(LayerKind):
    """Weights ``[C, K]`` with products ``y[..., c] = sum_k W[c, k] x[..., k]``, any number of axes before the last."""

    def weight_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Pairs:
        """See :meth:`LayerKind.weight_gradients`."""
        return ((g[:, 0], h[:, 0]) for g, h in self._products(calls, joined(_factors(calls, per_sample))))

    def inner_products(self, calls: Sequence[LayerCall], per_sample: bool) -> torch.Tensor:
        """By Gram matrices where positions are few; see :func:`hawq_lightning.layers.inner_products`."""
        rows, columns = calls[0].grad.shape[-1], calls[0].read.shape[-1]
        samples = 1 if calls[0].grad.ndim < 2 else calls[0].grad.shape[0]
        positions = sum(call.grad.numel() // rows for call in calls)
        factors = joined(_factors(calls, per_sample))
        if gram_is_less(positions // samples if per_sample else positions, rows, columns):
            return gram_products(*factors)
        return torch.cat([row_dots(g, h) for g, h in self._products(calls, factors)])

    def projected_products(
        self, calls: Sequence[LayerCall], per_sample: bool, directions: Directions
    ) -> ProjectedProducts:
        """By whatever is least work."""
        u, d, e = joined(_factors(calls, per_sample))
        none = all(call.other is None for call in calls)

        def part(rows: slice) -> torch.Tensor:
            return self.matrices(directions.part(self.channel_axis, rows))[:, None]

        return projected_factors(u, d, None if none else e, len(directions), part)

    def matrices(self, directions: torch.Tensor) -> torch.Tensor:
        """Tensors ``[n, *weight.shape]`` as matrices ``[n, C, K]``."""
        return directions

    def _products(self, calls: Sequence[LayerCall], factors: Factors) -> Pairs:
        u, d, e = factors
        return products(u, d, None if all(call.other is None for call in calls) else e)


@register_layer("linear")
class LinearKind(MatrixGradients):
    """``nn.Linear``: ``y[..., c] = sum_k W[c, k] x[..., k]``, any number of axes before the last."""

    float_type: ClassVar[type[nn.Module]] = nn.Linear
    fake_quant_type: ClassVar[type[FakeQuantLayer[Any, Any]]] = QLinear
    onnx_op = "Gemm"
    onnx_ops = ("Gemm", "MatMul")
    foldable = True
    reconstructs = True

    def product(self, module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See :meth:`LayerKind.product`."""
        return F.linear(x, weight)

    def onnx_attributes(self, module: nn.Module) -> dict[str, object]:
        """See :meth:`LayerKind.onnx_attributes`."""
        return {"transB": 1}

    def onnx_input_shape(self, shape: Sequence[int]) -> list[int]:
        """A linear layer over positions is one product of all of them."""
        return [int(torch.Size(shape[:-1]).numel()), shape[-1]]

    def patches(self, module: nn.Module, x: torch.Tensor, most: int) -> torch.Tensor:
        """See :meth:`LayerKind.patches`."""
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: -(-len(rows) // most)][None]


def _factors(calls: Sequence[LayerCall], per_sample: bool) -> list[Factors]:
    sides = []
    for call in calls:
        tensors = [call.read, call.grad, call.grad if call.other is None else call.other]
        if call.grad.ndim == 1:  # a vector without a batch axis is one sample
            tensors = [x[None] for x in tensors]
        u, d, e = (x.reshape(x.shape[0], -1, x.shape[-1]).mT.unsqueeze(1) for x in tensors)
        sides.append((u, d, e) if per_sample else as_one_row((u, d, e)))
    return sides
