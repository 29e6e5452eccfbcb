"""Fake quantization and its straight-through gradients, fast on every device.

torch's fused fake-quantizers run element by element on CPUs; a few vectorised passes are several times faster there
and give the same numbers. torch.compile gets plain operations, which it fuses and may run again in the backward pass.
Elsewhere and for other types the fused ones run, but where the kernel ``triton`` was asked for.
"""

from __future__ import annotations

import functools

import torch

from hawq_lightning._config import Kernel
from hawq_lightning._torch_state import traced, transformed
from hawq_lightning._types import AutogradContext, FunctionInputs
from hawq_lightning.quantization._kernel import HALF, compiles, launches

MIDRISE_ZERO = -0.5  # (code - zero) * scale: levels at odd halves


def fake_quantize_tensor(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int, kernel: Kernel = "torch"
) -> torch.Tensor:
    """``(clamp(round(x / scale) + zero, 0, top) - zero) * scale``, one scale a tensor.

    The gradient passes where rounding did not have to clip, and is zero elsewhere.

    Args:
        x: any shape.
        scale: positive, a scalar tensor.
        zero: a whole number in a scalar tensor.
        top: the highest code.
        kernel: see :func:`hawq_lightning.quantization.use_kernel`.
    """
    if kernel == "triton" and launches(x):
        from hawq_lightning.quantization._triton_kernels import Levels

        written: torch.Tensor = Levels.apply(x, scale, zero, top, None)
        return written
    if transformed() or compiles(x):
        whole, wide = zero.round(), x.float() if x.dtype in HALF else x
        ratio = torch.maximum(torch.minimum((wide * scale.reciprocal()).round(), top - whole), -whole)
        inside = (wide > (-whole - 0.5) * scale) & (wide < (top - whole + 0.5) * scale)
        return masked(x, (ratio * scale).to(x.dtype), inside)
    if eager(x):
        step, z = float(scale), round(float(zero))
        levels: torch.Tensor = _Clipped.apply(x, step, -z, top - z, 0.5)
        return levels
    return torch.fake_quantize_per_tensor_affine(x, scale, zero.to(torch.int32), 0, top)


def even_levels(x: torch.Tensor, step: float, low: int, high: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """What :func:`fake_quantize_tensor` gives on a CPU, by as little as there is to do, and without a gradient.

    Args:
        x: float32.
        step: a float32 number.
        low: the least level, in steps.
        high: the highest.
        out: where to, if not into new memory.
    """
    return torch.mul(x, _inverse(step), out=out).round_().clamp_(low, high).mul_(step)


def even_channel_levels(
    weight: torch.Tensor, step: torch.Tensor, zero: float, half: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """What :func:`fake_quantize_channels` gives, by as little as there is to do, and without a gradient.

    Args:
        weight: float32.
        step: of every channel, shaped so that it broadcasts.
        zero: -1/2 for midrise codes.
        half: half the number of levels, rounded up.
        out: where to, if not into new memory.
    """
    rounded = torch.mul(weight, step.reciprocal(), out=out)
    if zero:
        rounded.add_(zero)
    rounded.round_().clamp_(-half, half - 1)
    if zero:
        rounded.sub_(zero)
    return rounded.mul_(step)


def fake_quantize_channels(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, axis: int, half: int, kernel: Kernel = "torch"
) -> torch.Tensor:
    """``(clamp(round(w / scale + zero), -half, half - 1) - zero) * scale``, one scale an index of ``axis``.

    Args:
        weight: any shape.
        scale: positive, ``[weight.shape[axis]]``.
        zero: scalar; -1/2 for midrise codes.
        axis: channel axis.
        half: half the number of levels, rounded up.
        kernel: see :func:`hawq_lightning.quantization.use_kernel`.
    """
    if kernel == "triton" and launches(weight):
        from hawq_lightning.quantization._triton_kernels import Levels

        written: torch.Tensor = Levels.apply(weight, scale, zero, half, axis)
        return written
    if transformed() or compiles(weight):
        step, shift = per_channel_view(scale, weight, axis), zero.to(weight.dtype)
        rounded = (weight * step.reciprocal() + shift).round()
        kept = rounded.clamp(-half, half - 1)
        return masked(weight, ((kept - shift) * step).to(weight.dtype), kept == rounded)
    if eager(weight) and weight.dtype == torch.float32:
        levels: torch.Tensor
        levels, _ = _Channels.apply(weight, per_channel_view(scale, weight, axis), float(zero), half)
        return levels
    zeros = zero.expand(scale.shape).contiguous()
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, -half, half - 1)


def per_channel_view(scale: torch.Tensor, like: torch.Tensor, axis: int) -> torch.Tensor:
    """One value a channel, shaped so that it broadcasts against ``like``."""
    shape = [1] * like.ndim
    shape[axis] = -1
    return scale.view(shape)


def finite(bound: float) -> float:
    """A number that float32 can hold."""
    return min(max(bound, -3.4e38), 3.4e38)


def clipped_grad(grad: torch.Tensor, x: torch.Tensor, low: float, high: float, exclusive: bool = False) -> torch.Tensor:
    """``grad`` where ``low < x < high``, zero elsewhere.

    Args:
        grad: of ``x``'s shape.
        x: float32 or bfloat16.
        low: any number.
        high: any number.
        exclusive: nobody else reads ``grad``, so that it may be overwritten: fresh memory costs more than the
            arithmetic.
    """
    bounds = finite(low), finite(high)
    if exclusive and not torch.is_grad_enabled():
        torch.ops.aten.hardtanh_backward.grad_input(grad, x, *bounds, grad_input=grad)
        return grad
    passed: torch.Tensor = torch.ops.aten.hardtanh_backward(grad, x, *bounds)
    return passed


def eager(x: torch.Tensor) -> bool:
    """Whether plain float32 passes on the CPU are what will run."""
    exact = x.dtype in (torch.float32, torch.bfloat16)
    others = torch.compiler.is_compiling() or traced() or transformed()
    return x.device.type == "cpu" and exact and not others


def masked(x: torch.Tensor, levels: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """``levels``, whose gradient passes to ``x`` where it is ``inside``; for torch.func and torch.compile."""
    function = _Masked if transformed() else _Compiled
    out: torch.Tensor = function.apply(x, levels, inside)
    return out


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, levels: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        return levels.clone()

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: FunctionInputs, output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: AutogradContext, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None, None


class _Masked(_Compiled):
    """With what torch.func asks for, which torch.compile refuses."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: FunctionInputs, output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def jvp(ctx: AutogradContext, *tangents: torch.Tensor | None) -> torch.Tensor | None:
        return None if tangents[0] is None else tangents[0] * ctx.saved_tensors[0]


class _Clipped(torch.autograd.Function):
    """Rounded to whole steps between two bounds; the gradient passes strictly inside of bounds ``margin`` wider."""

    @staticmethod
    def forward(x: torch.Tensor, step: float, low: int, high: int, margin: float) -> torch.Tensor:
        # in float32 also for bfloat16, as the fused one
        ratio = x * _inverse(step) if x.dtype == torch.float32 else x.float().mul_(_inverse(step))
        return ratio.round_().clamp_(low, high).mul_(step).to(x.dtype)

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: FunctionInputs, output: torch.Tensor) -> None:
        x, step, low, high, margin = inputs
        ctx.save_for_backward(x)
        ctx.bounds, ctx.grad_is_exclusive = ((low - margin) * step, (high + margin) * step), False

    @staticmethod
    def backward(ctx: AutogradContext, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        return clipped_grad(grads[0], x, low, high, ctx.grad_is_exclusive), None, None, None, None


class _Channels(torch.autograd.Function):
    """Per channel, with where rounding did not have to clip; there the gradient passes."""

    @staticmethod
    def forward(w: torch.Tensor, step: torch.Tensor, zero: float, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = w * step.reciprocal()
        if zero:
            rounded.add_(zero)
        rounded.round_()
        levels = rounded.clamp(-half, half - 1)
        inside = levels == rounded
        if zero:
            levels.sub_(zero)
        return levels.mul_(step), inside

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: FunctionInputs, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: AutogradContext, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


@functools.lru_cache(maxsize=1024)
def _inverse(step: float) -> float:
    # as torch's kernels: the reciprocal in float32
    return float(torch.tensor(step, dtype=torch.float32).reciprocal())


class _Touch(torch.autograd.Function):
    """The identity; parameters that are not in use yet get a gradient of zero, which DistributedDataParallel wants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: FunctionInputs, output: torch.Tensor) -> None:
        ctx.like = [(p.shape, p.dtype, p.device) for p in inputs[1:]]

    @staticmethod
    def backward(ctx: AutogradContext, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], *(torch.zeros(s, dtype=d, device=v) for s, d, v in ctx.like)

    @staticmethod
    def jvp(ctx: AutogradContext, *tangents: torch.Tensor | None) -> torch.Tensor | None:
        return None if tangents[0] is None else tangents[0].view_as(tangents[0])


def with_zero_grads(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """``x``, with zero gradients for ``parameters``."""
    touched: torch.Tensor = _Touch.apply(x, *parameters)
    return touched
