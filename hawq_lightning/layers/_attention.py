"""``nn.MultiheadAttention``: functions read its projections, which are its own and a child's that is not called."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.layers._attention_products import attention_is_on, is_on
from hawq_lightning.layers._fake_quant import ActivationQ, FakeQuantLayer, WeightQ, quantizers_by_attribute
from hawq_lightning.layers._kind import WeightRead, register_layer
from hawq_lightning.layers._linear import MatrixGradients
from hawq_lightning.layers._products import InnerProductsKind, is_recorded, recorded, visited

Output = tuple[torch.Tensor, torch.Tensor | None]
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class _Product(Protocol):
    """``x W[rows]^T + b[rows]``, W a weight of the module by its name."""

    def __call__(
        self, parameter: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        rows: slice = slice(None),
    ) -> torch.Tensor: ...  # fmt: skip


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: slice = slice(None)
) -> torch.Tensor:
    return F.linear(x, weight[rows], None if bias is None else bias[rows])


class QMultiheadAttention(FakeQuantLayer[WeightQ, ActivationQ], nn.MultiheadAttention):
    """Attention whose projections are quantized, and what they read; queries, keys and probabilities are not."""

    float_type = nn.MultiheadAttention

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        """As ``nn.MultiheadAttention``; its fused kernels only while every quantizer is off."""
        if not any(map(is_on, quantizers_by_attribute(self).values())) and not attention_is_on(self):
            return nn.MultiheadAttention.forward(self, *args, **kwargs)
        return _attend(self, *args, **kwargs)


@register_layer("multihead_attention")
class AttentionKind(InnerProductsKind, MatrixGradients):
    """``nn.MultiheadAttention``: the packed input projection, or one each for other key and value sizes; the output's.

    Weights that a call reads in parts (queries from one tensor, keys and values from another) show products that are
    zero in the other rows.
    """

    float_type, fake_quant_type = nn.MultiheadAttention, QMultiheadAttention

    def weights(self, module: nn.Module) -> Mapping[str, WeightRead]:
        """A scale a row each."""
        names = ("in_proj_weight",) if _of(module)._qkv_same_embed_dim else _SEPARATE
        return {name: WeightRead(0) for name in (*names, "out_proj.weight")}

    def macs(self, module: nn.Module, parameter: str, x: torch.Tensor, output: torch.Tensor) -> int:
        """Of the rows that a call reads."""
        rows = getattr(output, "_rows_read", output.shape[-1])
        return x.numel() * int(rows)

    def explicit_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Output:
        """With every product in sight."""
        return _attend(_of(module), *args, **kwargs)


def _of(module: nn.Module) -> nn.MultiheadAttention:
    return cast(nn.MultiheadAttention, module)


def _product(module: nn.MultiheadAttention) -> _Product:
    """Shows what is read and the product; of a fake-quant layer both operands are quantized."""

    def product(
        parameter: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: slice = slice(None)
    ) -> torch.Tensor:
        x = visited(module, parameter, x)
        turn = x.ndim == 3 and not module.batch_first and parameter != "out_proj.weight"
        x = x.transpose(0, 1) if turn else x
        if isinstance(module, FakeQuantLayer):
            y = module.quantized_product(_linear, x, weight, bias, rows, parameter=parameter)
        else:
            y = _linear(x, weight, bias, rows)
        if not is_recorded(module, parameter):
            return y
        first, last, _ = rows.indices(len(weight))
        if last - first == len(weight):
            return recorded(module, parameter, x, y)
        whole = F.pad(y, (first, len(weight) - last))
        whole._rows_read = last - first  # type: ignore[attr-defined]
        return recorded(module, parameter, x, whole)[..., rows]

    return product


def _projected(module: nn.MultiheadAttention, product: _Product, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Queries, keys and values ``[N, positions, embed_dim]``; neighbours that are one tensor in one product."""
    size, bias = module.embed_dim, module.in_proj_bias
    if not module._qkv_same_embed_dim:
        biases = [None] * 3 if bias is None else bias.chunk(3)
        weights = [getattr(module, name) for name in _SEPARATE]
        return [product(n, x, w, b) for n, x, w, b in zip(_SEPARATE, tensors, weights, biases)]
    out: list[torch.Tensor] = []
    while len(out) < 3:
        first, x = len(out), tensors[len(out)]
        last = next((i for i in range(first, 3) if tensors[i] is not x), 3)
        y = product("in_proj_weight", x, module.in_proj_weight, bias, slice(first * size, last * size))
        out += y.split(size, -1)
    return out


def _attend(
    module: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None, need_weights: bool = True, attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> Output:  # fmt: skip
    """As ``nn.MultiheadAttention.forward``, in operations that can be differentiated twice."""
    if query.is_nested:
        return _attend_nested(module, query, need_weights, average_attn_weights)
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    product = _product(module)
    q, k, v = _projected(module, product, (query, key, value))
    batched = query.ndim == 3
    if not batched:
        q, k, v = (x[None] for x in (q, k, v))
    samples, heads = q.shape[0], module.num_heads  # len() would fix the batch size of an exported network
    masks = _masks(attn_mask, key_padding_mask, samples, heads, q.dtype)
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(samples, -1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(samples, -1, -1)], 1)
    if module.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None
    if masks:  # positions that were added behind the keys are never masked
        mask = functools.reduce(torch.add, [F.pad(m, (0, k.shape[-2] - m.shape[-1])) for m in masks])
    p = module.dropout if module.training else 0.0
    weights: torch.Tensor | None = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), p, p > 0)
        y = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    y = product("out_proj.weight", y.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
    if not batched:
        return y[0], None if weights is None else weights[0]
    return y if module.batch_first else y.transpose(0, 1), weights


def _masks(
    attention: torch.Tensor | None, padding: torch.Tensor | None, samples: int, heads: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """What is added to scores ``[samples, heads, queries, keys]``, of masks of any form that torch takes."""
    masks = []
    if attention is not None:
        masks.append(attention if attention.ndim == 2 else attention.unflatten(0, (samples, heads)))
    if padding is not None:
        masks.append(padding.view(samples if padding.ndim == 2 else 1, 1, 1, -1))
    return [
        torch.zeros_like(m, dtype=dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m.to(dtype)
        for m in masks
    ]


def _attend_nested(module: nn.MultiheadAttention, x: torch.Tensor, need_weights: bool, average: bool) -> Output:
    """Self-attention of sequences of their own lengths, which ``nn.TransformerEncoder`` makes of padded ones."""
    lengths = [len(t) for t in x.unbind()]
    padded = torch.nested.to_padded_tensor(x, 0.0)
    positions = torch.arange(padded.shape[1], device=x.device)
    padding = positions >= torch.tensor(lengths, device=x.device)[:, None]
    y, weights = _attend(module, padded, padded, padded, padding, need_weights, None, average)
    return torch.nested.as_nested_tensor([row[:n] for row, n in zip(y, lengths)]), weights
