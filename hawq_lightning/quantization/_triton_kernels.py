"""Fake quantization by one kernel a pass, written in Triton: what ``kernel="triton"`` runs on a GPU.

The forward kernel reads a value and writes its level; the backward kernel reads the gradient and the value, finds anew
whether rounding had to clip, and writes the gradient over itself. No mask is kept. The arithmetic is that of the CPU,
operation by operation, so that the levels are its levels to the bit; ``TRITON_INTERPRET=1`` runs it there.

Not measured: no GPU was at hand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from hawq_lightning._types import AutogradContext, FunctionInputs
from hawq_lightning.quantization._kernel import interpreted

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _times(a, b, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A product that is rounded before it goes on: compilers would fuse it with the sum behind it."""
    if INTERPRETED:
        return a * b
    else:
        return libdevice.mul_rn(a, b)


@triton.jit  # type: ignore[untyped-decorator]
def _nearest(x, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounded to whole numbers, halves to even ones; the interpreter has no such function."""
    if INTERPRETED:
        below = tl.floor(x)
        rest = x - below
        odd = below - 2.0 * tl.floor(below * 0.5)
        up = (rest > 0.5) | ((rest == 0.5) & (odd == 1.0))
        whole = tl.where(up, below + 1.0, below)
        return tl.where(whole == 0.0, x * 0.0, whole)  # -0.0 stays negative
    else:
        return libdevice.rint(x)


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, step, zero, codes, CHANNELWISE: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values in whole steps, and the least and the greatest of them that is a level."""
    ratio = _times(x, tl.div_rn(1.0, step), INTERPRETED)
    if CHANNELWISE:
        ratio = tl.where(zero == 0.0, ratio, ratio + zero)  # -0.0 too stays what it was
        return _nearest(ratio, INTERPRETED), 0.0 - codes, codes - 1.0
    else:
        whole = _nearest(zero, INTERPRETED)
        return _nearest(ratio, INTERPRETED), 0.0 - whole, codes - whole


@triton.jit  # type: ignore[untyped-decorator]
def _narrowed(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """In the type of what is written, to the nearest; to bfloat16 the interpreter cuts off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _levels_kernel(  # type: ignore[no-untyped-def]
    x_at, out_at, step_at, zero_at, count, codes, channels, inner,
    CHANNELWISE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A level for every value."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    x = tl.load(x_at + at, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(zero_at)
    step = tl.load(step_at + at // inner % channels, mask=mask, other=1.0)
    rounded, low, high = _rounded(x, step, zero, codes.to(tl.float32), CHANNELWISE, INTERPRETED)
    kept = tl.where(rounded < low, low, tl.where(rounded > high, high, rounded))  # NaN stays
    if CHANNELWISE:
        kept = kept - zero
    levels = _times(kept, step, INTERPRETED)
    tl.store(out_at + at, _narrowed(levels, out_at.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    grad_at, x_at, step_at, zero_at, count, codes, channels, inner,
    CHANNELWISE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient stays where rounding did not have to clip, and is zero elsewhere."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    x = tl.load(x_at + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + at, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(zero_at)
    if CHANNELWISE:
        step = tl.load(step_at + at // inner % channels, mask=mask, other=1.0)
        rounded, low, high = _rounded(x, step, zero, codes.to(tl.float32), CHANNELWISE, INTERPRETED)
        grad = grad * ((rounded >= low) & (rounded <= high)).to(tl.float32)
    else:  # by the values themselves, as clipped_grad does: half a step beyond either end is outside
        step = tl.load(step_at)
        whole = _nearest(zero, INTERPRETED)
        low = tl.maximum(_times(0.0 - whole - 0.5, step, INTERPRETED), -3.4e38)
        high = tl.minimum(_times(codes.to(tl.float32) - whole + 0.5, step, INTERPRETED), 3.4e38)
        grad = tl.where((x > low) & (x < high), grad, 0.0)
    tl.store(grad_at + at, _narrowed(grad, grad_at.dtype.element_ty, INTERPRETED), mask=mask)


def _launch(kernel: object, first: torch.Tensor, second: torch.Tensor, *grid: object, channelwise: bool) -> None:
    blocks = (triton.cdiv(first.numel(), BLOCK),)
    device = torch.cuda.device_of(first)  # Triton launches where the current device is
    with device:
        kernel[blocks](  # type: ignore[index]
            first, second, *grid, CHANNELWISE=channelwise, INTERPRETED=interpreted(), BLOCK=BLOCK
        )


@torch.library.custom_op("hawq_lightning::levels", mutates_args=())
def _levels(
    x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, codes: int, channels: int, inner: int
) -> torch.Tensor:
    """``x``, dense, on its grid; ``channels`` is 0 where there is one step a tensor."""
    out = torch.empty_like(x)
    if x.numel():
        _launch(
            _levels_kernel, x, out, step, zero, x.numel(), codes, max(channels, 1), inner, channelwise=bool(channels)
        )
    return out


@_levels.register_fake
def _(x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, codes: int, channels: int, inner: int) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("hawq_lightning::mask_gradient", mutates_args={"grad"})
def _mask_gradient(
    grad: torch.Tensor, x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, codes: int, channels: int, inner: int
) -> None:
    """Zero in ``grad``, in place, wherever ``x`` was clipped; both dense, with the same strides."""
    if x.numel():
        _launch(
            _gradient_kernel, grad, x, step, zero, x.numel(), codes, max(channels, 1), inner,
            channelwise=bool(channels),
        )  # fmt: skip


@_mask_gradient.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, codes: int, channels: int, inner: int
) -> None:
    return None


class Levels(torch.autograd.Function):
    """Fake quantization by the kernels; what it keeps for the backward pass is its input.

    ``apply(x, step, zero, codes, axis)``: without an axis ``fake_quantize_tensor``, ``codes`` its ``top``; with one
    ``fake_quantize_channels``, ``codes`` its ``half``.
    """

    @staticmethod
    def forward(x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, codes: int, axis: int | None) -> torch.Tensor:
        x = dense(x)
        levels: torch.Tensor = _levels(x, step, zero, codes, *_channels(x, axis))
        return levels

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: FunctionInputs, output: torch.Tensor) -> None:
        x, step, zero, codes, axis = inputs
        ctx.save_for_backward(x, step, zero)
        ctx.codes, ctx.axis, ctx.grad_is_exclusive = codes, axis, False

    @staticmethod
    def backward(ctx: AutogradContext, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (x, step, zero) = grads, ctx.saved_tensors
        x = dense(x)
        if torch.is_grad_enabled():  # somebody differentiates once more, which gradients written over do not allow
            passed = torch.ones_like(x)
            _mask_gradient(passed, x, step, zero, ctx.codes, *_channels(x, ctx.axis))
            return grad * passed, None, None, None, None
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        elif not ctx.grad_is_exclusive:
            grad = grad.clone()
        _mask_gradient(grad, x, step, zero, ctx.codes, *_channels(x, ctx.axis))
        return grad, None, None, None, None


def dense(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied where its elements do not fill one stretch of memory."""
    like = torch.empty_like(x)  # keeps strides just where they do
    return x if like.stride() == x.stride() else like.copy_(x)


def _channels(x: torch.Tensor, axis: int | None) -> tuple[int, int]:
    """How many there are, and how many elements in memory have the same channel in a row."""
    return (0, 1) if axis is None else (x.shape[axis], max(x.stride(axis), 1))
