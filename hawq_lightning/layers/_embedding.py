"""Embeddings: rows of a table, looked up by indices. Nothing is multiplied, and what is read is no activation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.layers._directions import Directions
from hawq_lightning.layers._fake_quant import ActivationQ, FakeQuantLayer, WeightQ
from hawq_lightning.layers._gradients import Pairs, row_dots
from hawq_lightning.layers._kind import LayerCall, LayerKind, WeightRead, register_layer, weight_of
from hawq_lightning.layers._products import InnerProductsKind, recorded, visited
from hawq_lightning.layers._projections import ProjectedProducts

_SAMPLES = 8  # whose Gram matrices are formed at a time


class QEmbedding(FakeQuantLayer[WeightQ, ActivationQ], nn.Embedding):
    """Embedding with a quantized table."""

    float_type = nn.Embedding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As ``nn.Embedding``; rows that are too long are shortened in the float table."""
        _renormalise(self, input)
        return F.embedding(input, self.quantized_weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class QEmbeddingBag(FakeQuantLayer[WeightQ, ActivationQ], nn.EmbeddingBag):
    """Bags of rows of a quantized table."""

    float_type = nn.EmbeddingBag

    def forward(
        self, input: torch.Tensor, offsets: torch.Tensor | None = None, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As ``nn.EmbeddingBag``; rows that are too long are shortened in the float table."""
        _renormalise(self, input)
        return F.embedding_bag(
            input, self.quantized_weight, offsets, scale_grad_by_freq=self.scale_grad_by_freq, mode=self.mode,
            per_sample_weights=per_sample_weights, include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )  # fmt: skip


class _TableKind(LayerKind):
    """One scale a row of the table.

    The gradient of sample n adds the output gradients of the positions that read a row, so that
    ``<G_n, G'_n> = sum_{t, s} [x_t = x_s] <d_t, d'_s>``: Gram matrices of positions, and no table of gradients.
    """

    def weights(self, module: nn.Module) -> Mapping[str, WeightRead]:
        """The table; indices get no quantizer."""
        return {"weight": WeightRead(channel_axis=0, reads_activation=False)}

    def why_float(self, module: nn.Module) -> str | None:
        """Sparse gradients are for other optimizers, which a quantizer's gradient does not suit."""
        return "its gradients are sparse" if cast(nn.Embedding, module).sparse else None

    def macs(self, module: nn.Module, parameter: str, x: torch.Tensor, output: torch.Tensor) -> int:
        """None."""
        return 0

    def weight_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Pairs:
        """The gradients themselves, a sample at a time, for weights that layers of other kinds share."""
        table = weight_of(calls[0].layer, calls[0].parameter)
        of_calls = [_positions(call, per_sample) for call in calls]
        for n in range(len(of_calls[0][0])):
            sides = []
            for side in (1, 2):
                g = table.new_zeros(table.shape, dtype=of_calls[0][side].dtype)
                for positions in of_calls:
                    g.index_add_(0, positions[0][n], positions[side][n])
                sides.append(g[None])
            yield sides[0], sides[1]

    def inner_products(self, calls: Sequence[LayerCall], per_sample: bool) -> torch.Tensor:
        """By Gram matrices, some samples at a time; see :func:`hawq_lightning.layers.inner_products`."""
        of_calls = [_positions(call, per_sample) for call in calls]
        index, d, e = (torch.cat(x, 1) for x in zip(*of_calls))
        out = []
        for i, g, h in zip(*(x.split(_SAMPLES) for x in (index, d, e))):
            same = (i[:, :, None] == i[:, None, :]).to(g.dtype)
            out.append(row_dots(same, torch.matmul(g, h.mT)))
        return torch.cat(out)

    def projected_products(
        self, calls: Sequence[LayerCall], per_sample: bool, directions: Directions
    ) -> ProjectedProducts:
        """``<G_n, D_w> = sum_t <d_t, D_w[x_t]>``: the rows of ``D_w`` looked up."""
        of_calls = [_positions(call, per_sample) for call in calls]
        index, d, e = (torch.cat(x, 1) for x in zip(*of_calls))
        same = all(call.other is None for call in calls)
        along, other = [], []
        rows, where = index.unique(return_inverse=True)
        for direction in directions.part(0, rows):
            looked_up = F.embedding(where, direction.to(d))
            along.append(row_dots(d, looked_up))
            other.append(along[-1] if same else row_dots(e, looked_up))
        first = torch.stack(along, 1)
        inner = self.inner_products(calls, per_sample)
        return ProjectedProducts(inner, first, first if same else torch.stack(other, 1))


@register_layer("embedding")
class EmbeddingKind(_TableKind):
    """``nn.Embedding``: ``y[...] = W[x[...]]``."""

    float_type, fake_quant_type = nn.Embedding, QEmbedding


@register_layer("embedding_bag")
class EmbeddingBagKind(_TableKind, InnerProductsKind):
    """``nn.EmbeddingBag``: sums, means or maxima of looked-up rows.

    While it is measured the rows are looked up one by one, bags side by side, and reduced after.
    """

    float_type, fake_quant_type = nn.EmbeddingBag, QEmbeddingBag

    def explicit_forward(
        self, module: nn.Module, input: torch.Tensor, offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """As ``nn.EmbeddingBag.forward``."""
        bag = cast(nn.EmbeddingBag, module)
        _renormalise(bag, input)
        index, weights, there = _side_by_side(bag, input, offsets, per_sample_weights)
        index = visited(module, "weight", index)
        table = bag.quantized_weight if isinstance(bag, FakeQuantLayer) else bag.weight
        rows = recorded(module, "weight", index, F.embedding(index, table, bag.padding_idx))
        there = there if bag.padding_idx is None else there & (index != bag.padding_idx % len(table))
        if weights is not None:
            rows = rows * weights.unsqueeze(-1)
        if bag.mode == "max":
            some = there.any(1, keepdim=True)
            return rows.masked_fill(~there.unsqueeze(-1), -torch.inf).amax(1).where(some, rows.new_zeros(()))
        total = (rows * there.unsqueeze(-1)).sum(1)
        return total if bag.mode == "sum" else total / there.sum(1, keepdim=True).clamp_min(1)


def _renormalise(module: Any, index: torch.Tensor) -> None:
    if module.max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(module.weight.detach(), index.contiguous(), module.max_norm, module.norm_type)


def _side_by_side(
    bag: nn.EmbeddingBag, input: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Indices ``[bags, most]``, their factors, and which of them are there; bags of any form that torch takes."""
    if input.ndim == 2:
        return input, weights, torch.ones_like(input, dtype=torch.bool)
    assert offsets is not None
    starts = offsets[:-1] if bag.include_last_offset else offsets
    ends = torch.cat([starts[1:], starts.new_tensor([len(input)])])
    if bag.include_last_offset:
        ends = offsets[1:]
    positions = torch.arange(int((ends - starts).max()) if len(starts) else 0, device=input.device)
    there = positions < (ends - starts).unsqueeze(1)
    at = (starts.unsqueeze(1) + positions).where(there, starts.new_zeros(()))
    return input[at], None if weights is None else weights[at], there


def _positions(call: LayerCall, per_sample: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices ``[rows, T]`` and both gradients ``[rows, T, features]``; those of the padding row are zero."""
    rows = call.grad.shape[0] if per_sample and call.grad.ndim > 1 else 1
    index = call.read.reshape(rows, -1)
    d = call.grad.reshape(rows, index.shape[1], -1)
    e = d if call.other is None else call.other.reshape(d.shape)
    padding = getattr(call.layer, "padding_idx", None)
    if padding is not None:
        read = (index != padding).unsqueeze(-1)
        d, e = d * read, e * read
    return index, d, e
