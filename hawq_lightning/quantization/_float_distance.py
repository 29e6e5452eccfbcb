"""How far a network's outputs are from those that it had as a float network: a loss that needs no labels.

At the float network it is zero and flat, so that what quantization adds to it is of second order. The labelled loss
has a slope there, which is mostly noise of the images at hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hawq_lightning._batches import fresh_copy
from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.quantization._distillation import Enough, GraphOutputs, Head, HeadOutputs, distance, find_heads
from hawq_lightning.quantization._norm_statistics import batch_statistics, new_statistics, norms_with_statistics
from hawq_lightning.sensitivity import BatchKeys, isolated_eval, on_device, repeatable

_Tensors = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class PlanLoss:
    """What quantizing changed in the outputs, the mean over some samples.

    Attributes:
        kl: KL(float || quantized) of outputs that go into a softmax, in nats; of others the squared error over the
            variance of the float ones.
        changed: share of the predictions that are others than the float network's; ``None``: nothing is predicted,
            since some output goes into no softmax.
    """

    kl: float
    changed: float | None = None


class FloatDistance:
    """``loss_fn(model, batch)``: the distance of the outputs to those of the same model when this was made.

    Outputs that the loss takes a softmax of: KL(float || now), the mean over positions. Other outputs: the squared
    error over the variance of the float ones. See :func:`hawq_lightning.quantization.distance`.

    Args:
        model: float, or with quantizers off; left as it was. Its outputs are kept for every batch.
        batches: the batches that will be asked for.
        loss_fn: runs the model on a batch; which outputs count, and as what, is seen in its graph.
        by_batch: BatchNorm takes the statistics of the batch, here and in every call.

    Attributes:
        heads: the last layers before the loss.

    Raises:
        HawqError: the loss depends on no layer's output that can be seen.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], loss_fn: LossFn, by_batch: bool = False) -> None:
        self._loss_fn = repeatable(model, loss_fn)
        self._by_batch = by_batch
        self._float: dict[str, _Tensors] = {}
        self._keys = BatchKeys()
        self.heads: list[Head] = []
        self._copy = False
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with isolated_eval(model):
            for batch in on_device(batches, device):
                if not self.heads:
                    self._find(model, batch)
                with torch.no_grad():
                    outputs = self._outputs(model, batch)
                # networks that differentiate by their input have a graph all the same
                self._float[self._keys.add(batch)] = {n: [t.detach() for t in of] for n, of in outputs.items()}

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The distance on one batch, a scalar with its graph.

        Raises:
            HawqError: a batch that is new, or for which the layers are called otherwise than before.
        """
        then = self._then(batch)
        return distance(self.heads, self._outputs(model, batch, then), then)

    @property
    def classifies(self) -> bool:
        """Whether every output goes into a softmax, so that there are predictions to agree on."""
        return all(head.axis is not None for head in self.heads)

    @torch.no_grad()
    def agreement(self, model: nn.Module, batch: Batch) -> float:
        """Share of the predictions that are those of the float network; of outputs that go into a softmax."""
        then = self._then(batch)
        return self._agreement(self._outputs(model, batch, then), then)

    @torch.no_grad()
    def compare(self, model: nn.Module, batch: Batch) -> PlanLoss:
        """Distance and changed predictions of one batch, in one pass.

        Raises:
            HawqError: as a call.
        """
        then = self._then(batch)
        now = self._outputs(model, batch, then)
        kl = float(distance(self.heads, now, then))
        return PlanLoss(kl, 1 - self._agreement(now, then) if self.classifies else None)

    def with_loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, PlanLoss]:
        """The labelled loss of one batch, and what :meth:`compare` says, in one pass.

        Raises:
            HawqError: as a call.
        """
        then = self._then(batch)
        with HeadOutputs(model, self.heads, None, self._copy) as seen:
            loss = self._run(model, batch)
        _check_alike(seen.tensors, then)
        with torch.no_grad():
            kl = float(distance(self.heads, seen.tensors, then))
            return loss, PlanLoss(kl, 1 - self._agreement(seen.tensors, then) if self.classifies else None)

    def _agreement(self, now: _Tensors, then: _Tensors) -> float:
        same, count = 0, 0
        for head in self.heads:
            if head.axis is not None:
                for a, b in zip(now[head.name], then[head.name]):
                    hits = a.argmax(head.axis) == b.argmax(head.axis)
                    same, count = same + int(hits.sum()), count + hits.numel()
        return same / max(count, 1)

    def _find(self, model: nn.Module, batch: Batch) -> None:
        with GraphOutputs(model) as outputs, torch.enable_grad():
            for p in model.parameters():
                p.requires_grad_(p.is_floating_point())
            loss = self._run(model, batch)
        self.heads = find_heads(loss, outputs)
        if not self.heads:
            raise HawqError("The loss depends on no layer's output that can be seen, so there is nothing to compare.")
        names = {h.name for h in self.heads}
        seen = zip(outputs.names, outputs.tensors, outputs.versions)
        self._copy = any(name in names and tensor._version != version for name, tensor, version in seen)

    def _run(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        with batch_statistics(model) if self._by_batch else contextlib.nullcontext():
            return self._loss_fn(model, batch)

    def _then(self, batch: Batch) -> _Tensors:
        then = self._float.get(self._keys.of(batch))
        if then is None:
            unread = ", ".join(self._keys.unread(batch))
            why = f" It holds objects that cannot be read ({unread}): give the same ones, or let pickle read them."
            raise HawqError(
                "This batch is none of those that the float network's outputs are known of." + (why if unread else "")
            )
        return then

    def _outputs(self, model: nn.Module, batch: Batch, then: _Tensors | None = None) -> _Tensors:
        enough = None if then is None else sum(len(t) for t in then.values())
        with HeadOutputs(model, self.heads, enough, self._copy) as seen, contextlib.suppress(Enough):
            self._run(model, batch)
        if then is not None:
            _check_alike(seen.tensors, then)
        return seen.tensors


def _check_alike(now: _Tensors, then: _Tensors) -> None:
    if any([t.shape for t in then[n]] != [t.shape for t in tensors] for n, tensors in now.items()):
        raise HawqError("The network gives other outputs than as a float network; they cannot be compared.")


def distance_of_new_statistics(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    samples: Sequence[int],
    statistics: Sequence[Batch] | None = None,
) -> float:
    """What measuring BatchNorm again changes in the outputs of the float network; 0 without BatchNorm.

    Some hundred images have other statistics than those that training averaged: every network that has its own
    measured on them is that much farther from the float one, quantized or not.

    Args:
        model: float, or with quantizers off; left as it was.
        batches: the distance is their mean.
        loss_fn: runs the model on a batch.
        samples: in each of the batches.
        statistics: batches by which BatchNorm is measured again; ``None``: the same.
    """
    if not norms_with_statistics(model):
        return 0.0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = on_device(batches, device)
    target = FloatDistance(model, moved, loss_fn)
    with isolated_eval(model), torch.no_grad():  # which puts the statistics back
        with new_statistics(model):
            for batch in moved if statistics is None else on_device(statistics, device):
                loss_fn(model, fresh_copy(batch))
        return sum(float(target(model, b)) * n for b, n in zip(moved, samples)) / sum(samples)
