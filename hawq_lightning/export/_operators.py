"""The two operators of a deployed network, under names of their own so that exporters can find them in a graph."""

from __future__ import annotations

import torch


def dequantize(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    """``codes * scale`` with one scale an index of ``axis``; float32, the codes' shape."""
    shape = [1] * codes.ndim
    shape[axis] = -1
    return codes.to(torch.float32) * scale.view(shape)


def snap(x: torch.Tensor, scale: float, zero: int, top: int) -> torch.Tensor:
    """The nearest of ``(code - zero) * scale`` for codes 0 to ``top``; the input's shape.

    The same numbers, bit for bit, as torch's fused fake quantizer, which torch.export does not know.
    """
    inverse = float(1 / torch.tensor(scale, dtype=torch.float32))
    codes = torch.clamp(torch.round(x * inverse) + zero, 0, top)
    return (codes - zero) * scale


@torch.library.custom_op("hawq_lightning::dequantize", mutates_args=())
def _dequantize(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    return dequantize(codes, scale, axis)


@torch.library.custom_op("hawq_lightning::snap", mutates_args=())
def _snap(x: torch.Tensor, scale: float, zero: int, top: int) -> torch.Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, top)


@_dequantize.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@_snap.register_fake
def _(x: torch.Tensor, scale: float, zero: int, top: int) -> torch.Tensor:
    return torch.empty_like(x)
