"""What rounding a weight changes once the BatchNorm behind its layer has been measured again.

Rounding mostly shrinks or stretches a channel, and shifts it: both are taken back as soon as mean and variance of what
the channel now gives are measured. With ``r = sd / sd_q`` of the channel's outputs before and after rounding, what is
left of the output error is ``r (y_q - mu_q) + mu - y``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hawq_lightning._batches import plain_tensor
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.layers import Directions, Rows, WeightReader
from hawq_lightning.sensitivity import isolated_eval, on_device, repeatable


@dataclass
class _Moments:
    """Of every channel, added up over calls (Chan, Golub and LeVeque, 1979); float64, ``[weights, channels]``."""

    count: int
    mean: torch.Tensor
    m2: torch.Tensor

    def add(self, outputs: Sequence[torch.Tensor]) -> None:
        """Outputs ``[positions, channels]``, one of each weight."""
        new = len(outputs[0])
        if not new:
            return
        pairs = [torch.var_mean(y, 0, correction=0) for y in outputs]
        var, mean = (torch.stack(x).double() for x in zip(*pairs))
        total = self.count + new
        off = mean - self.mean
        self.m2 += new * var + off.square() * (self.count * new / total)
        self.mean += off * (new / total)
        self.count = total


def renormalised(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    layers: Mapping[str, tuple[WeightReader, nn.Module]],
    errors: Mapping[str, Directions],
) -> dict[str, tuple[Directions, torch.Tensor]]:
    """What is left of the rounding errors of weights whose layer has a BatchNorm of its own.

    Args:
        model: left as it was.
        batches: whose statistics are compared, before and after rounding.
        loss_fn: runs the model on a batch.
        layers: weight site -> its only layer, and the BatchNorm behind it.
        errors: weight site -> ``Q_w(W) - W`` of every candidate.

    Returns:
        weight site -> the errors, then ``r Q_w(W) - W`` by channel; ``mu - r mu_q``, ``[candidates, channels]``.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    loss_fn = repeatable(model, loss_fn)
    with isolated_eval(model), _watched(layers, errors) as moments:
        for batch in on_device(batches, device):
            loss_fn(model, batch)
    return {
        site: _left(reader, norm, errors[site], moments[site])
        for site, (reader, norm) in layers.items()
        if site in moments
    }


@contextmanager
def _watched(
    layers: Mapping[str, tuple[WeightReader, nn.Module]], errors: Mapping[str, Directions]
) -> Iterator[dict[str, _Moments]]:
    """Inside, every call of a layer adds to the moments of its outputs: of the float weight, then of the rounded."""
    moments: dict[str, _Moments] = {}

    def watch(site: str, reader: WeightReader) -> None:
        def record(x: torch.Tensor, output: torch.Tensor) -> None:
            kind, module = reader.kind, reader.module
            with torch.no_grad():
                weight, read = reader.weight.detach(), plain_tensor(x.detach())
                axis = kind.channels_from_end(module)
                outputs = [
                    kind.product(module, read, w).movedim(axis, -1).flatten(0, -2)
                    for w in (weight, *(weight + e for e in errors[site]))
                ]
            shape = (len(outputs), outputs[0].shape[-1])
            zeros = torch.zeros(shape, dtype=torch.float64, device=read.device)
            moments.setdefault(site, _Moments(0, zeros, zeros.clone())).add(outputs)

        handles.callback(reader.on_call(record).remove)

    with ExitStack() as handles:
        for site, (reader, _) in layers.items():
            watch(site, reader)
        yield moments


def _left(
    reader: WeightReader, norm: nn.Module, errors: Directions, moments: _Moments
) -> tuple[Directions, torch.Tensor]:
    eps = float(getattr(norm, "eps", 0.0))
    deviation = (moments.m2 / max(moments.count, 1) + eps).sqrt()
    ratio = deviation[:1] / deviation[1:].clamp_min(torch.finfo(torch.float64).tiny)
    offsets = moments.mean[:1] - ratio * moments.mean[1:]
    weight, axis = reader.weight.detach(), reader.channel_axis
    shape = [len(errors), *(1 for _ in weight.shape)]
    shape[1 + axis] = -1
    return Renormalised(errors, weight, ratio.reshape(shape).to(weight.dtype)), offsets.to(weight.dtype)


class Renormalised(Directions):
    """Rounding errors ``Q_w(W) - W``, and after them ``r Q_w(W) - W``.

    Args:
        errors: of every candidate.
        weight: float.
        ratio: r of every candidate and channel, shaped so that it broadcasts against the errors.
    """

    def __init__(self, errors: Directions, weight: torch.Tensor, ratio: torch.Tensor) -> None:
        super().__init__(2 * len(errors), weight.shape)
        self._errors, self._weight, self._ratio = errors, weight, ratio

    def part(self, axis: int, rows: Rows) -> torch.Tensor:
        """See :meth:`Directions.part`."""
        at = (slice(None),) * axis + (rows,)
        errors, weight = self._errors.part(axis, rows), self._weight[at]
        ratio = self._ratio[(slice(None), *at)] if self._ratio.shape[1 + axis] > 1 else self._ratio
        return torch.cat([errors, ratio * (weight + errors) - weight])
