"""Gradients of learned ranges: the step of LSQ and the clipping point of PACT, each by its paper's rule."""

from __future__ import annotations

import torch

from hawq_lightning._torch_state import traced, transformed
from hawq_lightning._types import AutogradContext, FunctionInputs
from hawq_lightning.quantization._fake_quantize import clipped_grad, eager


def learned_step(x: torch.Tensor, step: torch.Tensor, zero: float, low: int, high: int, factor: float) -> torch.Tensor:
    """Quantize with a step that learns (Esser et al. 2020, eq. 1 to 3 and 5).

    With ``v = x / step`` the gradient passes to x where ``low - zero < v < high - zero``, and to the step comes
    ``round(v) - v`` there and the clipping level elsewhere.

    Args:
        x: any shape.
        step: positive; broadcasts against ``x``: a scalar, or one a channel.
        zero: ``(code - zero) * step`` are the levels.
        low: the lowest code.
        high: the highest code.
        factor: of the step's gradient, 1 / sqrt(N * Qp) in the paper.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    fast = eager(wide) and step.ndim == 0
    levels: torch.Tensor
    if traced():
        return _levels(wide, step, zero, low, high).to(x.dtype)
    (levels,) = _LearnedStep.apply(wide, step, zero, low, high, factor, fast)
    return levels.to(x.dtype)


def learned_range(x: torch.Tensor, width: torch.Tensor, zero: int, top: int) -> torch.Tensor:
    """Quantize a range whose width learns (Choi et al. 2018, PACT: eq. 1 to 3).

    Unsigned, the width is the paper's clipping point alpha: ``round(clip(x, 0, alpha) * top / alpha) * alpha / top``,
    whose gradient passes to x inside and to alpha from what lies above. With a zero point the range reaches below zero
    as well, and what lies below counts with the share of alpha that is there.

    Args:
        x: any shape.
        width: positive scalar: highest less lowest level.
        zero: the code of 0.
        top: the highest code.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if traced():
        return _LearnedRange.forward(wide, width, zero, top, False).to(x.dtype)
    levels: torch.Tensor = _LearnedRange.apply(wide, width, zero, top, eager(wide))
    return levels.to(x.dtype)


def straight_through(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """``levels``, with the gradient of the identity with respect to ``x``."""
    if traced():
        return levels
    passed: torch.Tensor = _Through.apply(x, levels)
    return passed


def clamped(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """In place, where that can be."""
    return x.clamp(low, high) if transformed() else x.clamp_(low, high)  # vmap has no rule for the latter


def _levels(x: torch.Tensor, step: torch.Tensor, zero: float, low: int, high: int) -> torch.Tensor:
    # rounding commutes with adding whole numbers, not with adding halves
    shift = zero - round(zero) if abs(zero - round(zero)) > 0.25 else 0.0
    whole = round(zero - shift)
    codes = x * step.reciprocal()
    if shift:
        codes.add_(shift)
    codes = clamped(codes.round_(), low - whole, high - whole)
    if shift:
        codes.sub_(shift)
    return codes.mul_(step)


class _LearnedStep(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, step: torch.Tensor, zero: float, low: int, high: int, factor: float, fast: bool
    ) -> tuple[torch.Tensor]:
        return (_levels(x, step, zero, low, high),)

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: FunctionInputs, output: tuple[torch.Tensor]) -> None:
        x, step, *ctx.grid, ctx.factor, ctx.fast = inputs
        ctx.grad_is_exclusive = False
        ctx.save_for_backward(x, step)  # the levels are made again: cheaper than to keep them
        ctx.save_for_forward(x, step)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,), (x, step), (zero, low, high) = grads, ctx.saved_tensors, ctx.grid
        levels = _levels(x, step, zero, low, high)
        low, high = low - zero, high - zero
        if ctx.fast:
            s = float(step.detach())
            moved = torch.dot(g.reshape(-1), levels.reshape(-1))
            passed = clipped_grad(g, x, low * s, high * s, ctx.grad_is_exclusive)
            moved = moved - torch.dot(passed.reshape(-1), x.reshape(-1))
        else:
            v = x * step.reciprocal()
            passed = g * ((v > low) & (v < high))
            moved = (g * levels - passed * x).sum_to_size(step.shape)
        return passed, moved / step * ctx.factor, None, None, None, None, None

    @staticmethod
    def jvp(ctx: AutogradContext, *tangents: torch.Tensor | None) -> tuple[torch.Tensor]:
        (x, step), (zero, low, high) = ctx.saved_tensors, ctx.grid
        levels, v = _levels(x, step, zero, low, high), x * step.reciprocal()
        inside = (v > low - zero) & (v < high - zero)
        out = torch.zeros_like(x) if tangents[0] is None else tangents[0] * inside
        if tangents[1] is not None:
            out = out + (levels - inside * x) / step * ctx.factor * tangents[1]
        return (out,)


class _LearnedRange(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, width: torch.Tensor, zero: int, top: int, fast: bool) -> torch.Tensor:
        step = width / top
        return clamped((x * step.reciprocal()).round_(), -zero, top - zero).mul_(step)

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: FunctionInputs, output: torch.Tensor) -> None:
        x, width, zero, top, ctx.fast = inputs
        ctx.shares = -zero / top, (top - zero) / top
        ctx.save_for_backward(x, width)
        ctx.save_for_forward(x, width)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,), (x, width) = grads, ctx.saved_tensors
        low, high = (width * share for share in ctx.shares)
        moved = (g * (x >= high)).sum() * ctx.shares[1]
        if ctx.shares[0]:
            moved = moved + (g * (x <= low)).sum() * ctx.shares[0]
        if ctx.fast:
            passed = clipped_grad(g, x, float(low.detach()), float(high.detach()))
        else:
            passed = g * ((x > low) & (x < high))
        return passed, moved, None, None, None

    @staticmethod
    def jvp(ctx: AutogradContext, *tangents: torch.Tensor | None) -> torch.Tensor:
        x, width = ctx.saved_tensors
        low, high = (width * share for share in ctx.shares)
        out = torch.zeros_like(x) if tangents[0] is None else tangents[0] * ((x > low) & (x < high))
        if tangents[1] is not None:
            out = out + ((x >= high) * ctx.shares[1] + (x <= low) * ctx.shares[0]) * tangents[1]
        return out


class _Through(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        return levels.clone()

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: FunctionInputs, output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: AutogradContext, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], None

    @staticmethod
    def jvp(ctx: AutogradContext, *tangents: torch.Tensor | None) -> torch.Tensor | None:
        return None if tangents[0] is None else tangents[0].view_as(tangents[0])
