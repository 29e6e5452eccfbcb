"""The arithmetic of uniform fake-quantization on a grid, fast and thrifty.

Four vectorised passes over one output tensor take a tenth of the time of torch's own fused kernel on a CPU (which is
one scalar loop), with the same bits. Nothing but the input is kept for the backward pass: no mask.
"""

from __future__ import annotations

from typing import Any

import torch


def on_grid(x: torch.Tensor, scale: torch.Tensor, low: float, high: float, zero: float = 0.0) -> torch.Tensor:
    """``(clamp(round(x / scale + zero), low, high) - zero) * scale``, as torch's fake-quantize kernels compute it.

    Args:
        x: float tensor; other dtypes than float32 are computed in float32 and given back as they came.
        scale: positive step; of a shape that broadcasts against ``x``.
        low: least code.
        high: greatest code.
        zero: what stands for 0; integers, or halves (midrise).
    """
    if x.dtype != torch.float32:
        return on_grid(x.float(), scale, low, high, zero).to(x.dtype)
    out = x * scale.reciprocal()
    if zero % 1:  # halves have to be added before rounding
        return out.add_(zero).round_().clamp_(low, high).sub_(zero).mul_(scale)
    return out.round_().clamp_(low - zero, high - zero).mul_(scale)


class _StraightThrough(torch.autograd.Function):
    """Forward: the grid. Backward: the gradient passes where the code was not clipped."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: float, high: float, zero: float) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        ctx.grid = low, high, zero
        return on_grid(x, scale, low, high, zero)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        x, scale = ctx.saved_tensors
        low, high, zero = ctx.grid
        floor, ceiling = low - zero - 0.5, high - zero + 0.5  # in steps
        if scale.numel() == 1:
            step = float(scale)
            return torch.ops.aten.hardtanh_backward(grads[0], x, floor * step, ceiling * step), None, None, None, None
        return torch.ops.aten.hardtanh_backward(grads[0], x / scale, floor, ceiling), None, None, None, None


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, low: float, high: float, zero: float = 0.0) -> torch.Tensor:
    """:func:`on_grid` with the straight-through gradient: the identity inside the grid, zero where it clips.

    Args:
        x: any float tensor.
        scale: positive step without a gradient; of a shape that broadcasts against ``x``.
        low: least code.
        high: greatest code.
        zero: what stands for 0; integers, or halves (midrise).

    Returns:
        Same shape and dtype as ``x``.
    """
    return _StraightThrough.apply(x, scale, low, high, zero)  # type: ignore[no-any-return]
