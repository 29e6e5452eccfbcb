"""A tensor that is read on the way from the float network to that of a plan, x + t (Q(x) - x), and the slope there."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from hawq_lightning.quantization._pieces import product
from hawq_lightning.quantization._rounding_errors import ActivationRounding


class Slopes(Protocol):
    """What a backward pass tells of the tensors that are read.

    Attributes:
        attributing: whether the pass that runs is that by which sites are charged; what a network differentiates by
            itself on the way, such as forces from an energy, goes by.
        anchor: any leaf; by asking for its gradient a backward pass comes by every tensor that is read.
    """

    attributing: bool
    anchor: torch.Tensor

    def add(self, site: str, along: float) -> None:
        """Charge a site with the product of a slope and its error."""

    def arrived(self, site: str, slope: torch.Tensor, along: float, x: torch.Tensor | None) -> None:
        """A slope is there.

        Args:
            site: that reads.
            slope: at what it reads.
            along: its product with the rounding error.
            x: what it would read, where that was asked for.
        """


def moved(
    x: torch.Tensor, site: str, rounding: ActivationRounding, t: float, slopes: Slopes, keep: bool
) -> torch.Tensor:
    """What a site reads at t, with a slope at ``x``.

    Rounding follows what it rounds, on average, so that the error stays when errors before it move x. Where x is
    clipped the level stays, and the error takes back t of every move.

    Args:
        x: what it would read.
        site: its name.
        rounding: with one candidate.
        t: place on the way, 0 to 1.
        slopes: is told the slope.
        keep: whether it is told ``x`` as well.
    """
    read: torch.Tensor = _Moved.apply(x, slopes.anchor, site, rounding, t, slopes, keep)
    return read


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, site: str, rounding: ActivationRounding, t: float,
        slopes: Slopes, keep: bool,
    ) -> torch.Tensor:  # fmt: skip
        ctx.site, ctx.rounding, ctx.t, ctx.slopes, ctx.keep = site, rounding, t, slopes, keep
        ctx.x = x.detach() if keep or rounding.clips_by_input(x.dtype) else None
        ctx.error, read = rounding.moved(x, t)
        return read

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.slopes.attributing:
            # neither is kept: memory that is used again needs no new pages
            (error, x), ctx.error, ctx.x = (ctx.error, ctx.x), None, None
            before: torch.Tensor | None = None
            if ctx.needs_input_grad[0]:
                along, before = ctx.rounding.back(slope, error, ctx.t, x)
            else:
                along = product(slope, error)
            ctx.slopes.arrived(ctx.site, slope, along, x if ctx.keep else None)
        else:
            with torch.no_grad():
                clipped = ctx.rounding.clipped(ctx.error.clone(), ctx.x)
            before = _Passed.apply(slope, clipped, ctx.site, ctx.t, ctx.slopes)
        return before, None, None, None, None, None, None


class _Passed(torch.autograd.Function):
    """A slope of the network's own, ``(1 - t clipped) slope``: forces change where they pass what is clipped."""

    @staticmethod
    def forward(
        ctx: Any, slope: torch.Tensor, clipped: torch.Tensor, site: str, t: float, slopes: Slopes
    ) -> torch.Tensor:
        ctx.site, ctx.t, ctx.slopes, ctx.lost = site, t, slopes, clipped * slope
        ctx.save_for_backward(clipped)
        kept: torch.Tensor = slope - t * ctx.lost
        return kept

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (clipped,) = ctx.saved_tensors
        if ctx.slopes.attributing:
            ctx.slopes.add(ctx.site, -product(grad, ctx.lost))
        return grad * (1 - ctx.t * clipped), None, None, None, None
