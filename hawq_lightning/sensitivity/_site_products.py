"""What the gradients that arrived at one site come to: their squared norms, and their products with rounding errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hawq_lightning._batches import plain_tensor
from hawq_lightning.layers import Directions, LayerCall, WeightReader, inner_products, projected_products, row_dots
from hawq_lightning.sensitivity._rounding import ActivationErrors

_CACHED = 1 << 19  # elements


class Overwritten(Exception):
    """A tensor that a layer read was changed in place afterwards; the layer must keep a copy."""


@dataclass
class CallRecord:
    """A layer call, or a tensor read: its site, and the gradients of up to two backward passes."""

    site: str
    name: str
    layer: WeightReader | None
    value: torch.Tensor
    version: int
    grads: list[torch.Tensor | None] = field(default_factory=lambda: [None, None])
    node: Any = None

    def check_value(self) -> None:
        """Raise :class:`Overwritten` where the value is no longer what was read."""
        if self.value._version != self.version:
            raise Overwritten(self.name)


@dataclass(frozen=True)
class SiteProducts:
    """Of one probe of a batch, float64, on the host.

    Attributes:
        inner: ``<G_n, G'_n>`` (rows,).
        forms: ``<G_n, D_w> <G'_n, D_w>`` (rows, candidates), where rounding errors D were given.
    """

    inner: torch.Tensor
    forms: torch.Tensor | None = None


def weight_products(
    calls: Sequence[CallRecord],
    per_sample: bool,
    cross_pair: bool,
    directions: Directions | None,
    offsets: torch.Tensor | None = None,
) -> SiteProducts | None:
    """Products of the gradients of one weight, of all calls together; ``None`` if none came.

    Args:
        calls: that read it.
        per_sample: a row is a sample; else the batch.
        cross_pair: of the gradients of two backward passes; else of one with itself.
        directions: changes of the weight, one a candidate.
        offsets: of the channels of the layer's output, ``[candidates, channels]``.
    """
    live = [c for c in calls if c.grads[0] is not None and (not cross_pair or c.grads[1] is not None)]
    for c in live:
        c.check_value()
    uses = [
        LayerCall(
            c.layer.module,
            _as(plain_tensor(c.value), c.grads[0]),
            c.grads[0],
            c.grads[1] if cross_pair else None,
            c.layer.parameter,
        )
        for c in live
        if c.layer is not None and c.grads[0] is not None
    ]
    if not uses:
        return None
    if directions is None:
        return SiteProducts(inner_products(uses, per_sample).cpu())
    both = projected_products(uses, per_sample, directions)
    if offsets is None:
        return SiteProducts(both.inner.cpu(), both.squares.cpu())
    along = both.along + _shifted(live, 0, per_sample, offsets)
    other = both.other + _shifted(live, 1, per_sample, offsets) if cross_pair else along
    return SiteProducts(both.inner.cpu(), (along * other).cpu())


def _shifted(calls: Sequence[CallRecord], slot: int, per_sample: bool, offsets: torch.Tensor) -> torch.Tensor:
    """``sum over positions of <gradient at the output, offset of its channel>`` (rows, candidates)."""
    total: torch.Tensor | float = 0.0
    for c in calls:
        grad = c.grads[slot]
        if c.layer is None or grad is None or not grad.numel():
            continue
        last = grad.movedim(c.layer.kind.channels_from_end(c.layer.module), -1)
        sums = last.reshape(len(last) if per_sample else 1, -1, last.shape[-1]).sum(1)
        total = total + (sums.to(offsets) @ offsets.T).double()
    assert isinstance(total, torch.Tensor)
    return total


def read_products(
    calls: Sequence[CallRecord], per_sample: bool, cross_pair: bool, errors: ActivationErrors | None
) -> SiteProducts | None:
    """Products of the gradients at the tensors of one activation site; ``None`` if none came.

    Args:
        calls: a tensor each.
        per_sample: a row is a sample; else the batch.
        cross_pair: of the gradients of two backward passes; else of one with itself.
        errors: what rounding changes in a tensor.
    """
    inner: torch.Tensor | None = None
    sides: list[torch.Tensor] = []
    for c in calls:
        a, b = c.grads[0], c.grads[1] if cross_pair else c.grads[0]
        if a is None or b is None:
            continue
        a, b = (a, b) if per_sample else (a[None], b[None])
        part = row_dots(a, b)
        inner = part if inner is None else inner + part
        if errors is not None:
            c.check_value()
            along = _along(c, a, b, per_sample, cross_pair, errors)
            # tensors of a site are rounded together: they add up before the square
            sides = along if not sides else [x + y for x, y in zip(sides, along)]
    if inner is None:
        return None
    return SiteProducts(inner.cpu(), (sides[0] * sides[-1]).cpu() if sides else None)


def _along(
    call: CallRecord, a: torch.Tensor, b: torch.Tensor, per_sample: bool, cross_pair: bool, errors: ActivationErrors
) -> list[torch.Tensor]:
    """``<a_n, D_w>`` (rows, candidates), and the same of ``b`` where it is another gradient."""
    read = plain_tensor(call.value.detach())
    grads = [a, b] if cross_pair else [a]
    parts: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for at in _cuts(read, per_sample):
            x = read[at] if per_sample else read
            columns: list[list[torch.Tensor]] = [[] for _ in grads]
            for error in errors(x):
                error = error if per_sample else error[None]
                for column, grad in zip(columns, grads):
                    column.append(_consumed(error, grad[at]) if len(grads) == 1 else row_dots(grad[at], error))
            parts.append([torch.stack(column, 1) for column in columns])
    return [torch.cat(rows) for rows in zip(*parts)]


def _consumed(error: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """``<grad_n, error_n>``, in the memory of ``error``: fresh memory costs more than the arithmetic."""
    if error.dtype != grad.dtype or error.dtype not in (torch.float32, torch.float64):
        return row_dots(grad, error)
    return error.mul_(grad).reshape(len(error), -1).sum(1).double()


def _cuts(read: torch.Tensor, per_sample: bool) -> list[slice]:
    """Some samples at a time: on a CPU what is made of them on the way then stays in its cache."""
    if not per_sample or read.device.type != "cpu" or not read.numel():
        return [slice(None)]
    step = max(1, _CACHED * len(read) // read.numel())
    return [slice(start, start + step) for start in range(0, len(read), step)]


def _as(read: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return read.to(grad.dtype) if read.is_floating_point() else read  # indices of a table stay what they are
