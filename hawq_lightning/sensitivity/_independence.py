"""Can the samples of a batch be told apart? Tried on the network and the loss, never assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, islice

import torch

from hawq_lightning._errors import HawqError, some
from hawq_lightning._types import Batch, BatchSizeFn
from hawq_lightning.sensitivity._boundary import OutputHessian
from hawq_lightning.sensitivity._context import MeasureContext, forward_pass, outputs_of
from hawq_lightning.sensitivity._memory import RanOut, attempt
from hawq_lightning.sensitivity._microbatch import slice_batch

_FEW, _MANY = 5, 8  # of a batch of eight or more, so many samples tell at which sites rows are samples
_LATER = 8  # batches behind the first that are looked at
_COUPLED = "The loss couples the images of a batch: whole batches are the unit of the traces."


def samples_apart(context: MeasureContext, batch: Batch, samples: int, batch_size_fn: BatchSizeFn) -> dict[str, bool]:
    """Site -> whether rows are samples there; of a large batch every pair is tried among the first samples alone.

    On the whole batch the loss is tried, as among a few samples there may be no pair, no event and nothing unmasked;
    and the network once, with a random half of the samples, as it may mix those that are far from each other.

    Args:
        context: model, loss and sites.
        batch: samples.
        samples: their number.
        batch_size_fn: number of samples in a batch.
    """
    part = slice_batch(batch, samples, 0, _FEW, batch_size_fn) if samples >= _MANY else None
    if part is None:
        return independent_samples(context, batch, samples)
    try:
        apart = independent_samples(context, part, _FEW)
    except Exception:  # somebody's loss: whatever it raises, the whole batch is what it was made for
        return independent_samples(context, batch, samples)
    whole = attempt(lambda: independent_samples(context, batch, samples, once=True)) if any(apart.values()) else apart
    # out of memory: the few samples must do
    return apart if isinstance(whole, RanOut) else {name: apart[name] and whole[name] for name in apart}


def independent_samples(context: MeasureContext, batch: Batch, samples: int, once: bool = False) -> dict[str, bool]:
    """Site -> whether every sample's outputs reach its own row alone of what the site's layers read and return.

    Nowhere, if the loss's Hessian couples any two samples.

    Args:
        context: model, loss and sites.
        batch: samples.
        samples: their number.
        once: the network is tried with one half of the samples against the other, not for every pair: one backward
            pass, whose graph is freed as it goes.
    """
    nothing, warn_once = {s.name: False for s in context.table}, context.diagnostics.warn_once
    if samples < 2:
        return nothing
    with forward_pass(context, batch, nothing) as forward:
        values = forward.hessian.values
        if any(v.ndim == 0 or v.shape[0] != samples for v in values):
            warn_once("What the loss reads has no row for every image: traces are those of whole batches.")
            return nothing
        if couples(forward.hessian, samples):
            warn_once(_COUPLED)
            return nothing
        forward.free_loss()
        network = forward.network
        network.recording, network.samples, network.leaks = False, samples, {}
        subsets = [_half(samples)] if once else separating_subsets(samples)
        for i, subset in enumerate(subsets):
            network.outside = ~subset
            forward.hessian.backward(_on_subset(forward.hessian, subset), last=i == len(subsets) - 1)
        leaks = network.leaks
    shared = [n for n, leak in leaks.items() if leak]
    if shared:
        at = some(shared, what="sites")
        warn_once(f"At {at} the images of a batch cannot be told apart: traces there are those of whole batches.")
    return {s.name: not leaks.get(s.name, True) for s in context.table}


def later_batches_couple(context: MeasureContext, batches: Sequence[Batch], samples: Sequence[int]) -> bool:
    """Whether the loss couples the samples of another batch than the first: a pair or an event may come later.

    Eight batches are tried, evenly over all, at the loss alone: a network mixes samples in every batch or in none.

    Args:
        context: model, loss and sites.
        batches: all of them.
        samples: number of samples of each.
    """
    last = len(batches) - 1
    for number in sorted({round(i * last / _LATER) for i in range(1, _LATER + 1)} - {0}):
        coupled = samples[number] > 1 and attempt(lambda b=number: _loss_couples(context, batches[b], samples[b]))  # type: ignore[misc]
        if coupled and not isinstance(coupled, RanOut):
            context.diagnostics.warn_once(_COUPLED)
            return True
    return False


def check_independent(hessian: OutputHessian, samples: int, number: int) -> None:
    """Refuse a batch whose samples the loss couples, where rows of the measurement are samples.

    Args:
        hessian: of the loss at the outputs of the batch.
        samples: their number.
        number: of the batch.

    Raises:
        HawqError: it does; none of the batches that were looked at before has shown it.
    """
    if samples > 1 and couples(hessian, samples):
        raise HawqError(
            f"The loss couples the images of batch {number} (counted from 0), which none of the batches has shown that "
            "were looked at before: give that batch first, so that whole batches are the unit of the traces."
        )


def _loss_couples(context: MeasureContext, batch: Batch, samples: int) -> bool:
    with outputs_of(context, batch) as hessian:
        return any(v.ndim == 0 or v.shape[0] != samples for v in hessian.values) or couples(hessian, samples)


def couples(hessian: OutputHessian, samples: int) -> bool:
    """Whether the loss's second derivative mixes the outputs of any two samples.

    Args:
        hessian: its boundary tensors have the samples as first axis.
        samples: their number.
    """
    for subset in separating_subsets(samples):
        if any(bool(h[(~subset).to(h.device)].any()) for h in hessian(_on_subset(hessian, subset))):
            return True
    return False


def separating_subsets(samples: int) -> list[torch.Tensor]:
    """Subsets of samples, masks (samples,), such that for any two i and j one of them holds i and not j.

    Every sample gets its own half of the subsets: of two different sets of one size neither holds the other (Sperner,
    Mathematische Zeitschrift 27, 1928), so that some ten passes tell any pair of hundreds of samples apart, whichever
    are masked. Which sample gets which is random.

    Args:
        samples: at least 2.
    """
    count = next(k for k in range(2, samples + 1) if math.comb(k, k // 2) >= samples)
    members = torch.zeros(samples, count, dtype=torch.bool)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0)).tolist()
    for i, subset in zip(order, islice(combinations(range(count), count // 2), samples)):
        members[i, list(subset)] = True
    return list(members.T)


def _half(samples: int) -> torch.Tensor:
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    return order < samples // 2


def _on_subset(hessian: OutputHessian, subset: torch.Tensor) -> list[torch.Tensor]:
    """Random vectors at the outputs, zero but for the samples of a subset."""
    vectors = hessian.random_vectors(torch.Generator().manual_seed(0))
    for x in vectors:
        x[(~subset).to(x.device)] = 0
    return vectors
