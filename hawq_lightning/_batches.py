"""What a batch holds: its images, its parts, and how a model is called on it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, Outputs


def batch_images(batch: Batch, _top: bool = True, dim: int = 0) -> int:
    """Number of images in a batch: the length of the first tensor's batch axis, or of a list of images.

    Packed sequences and graphs tell theirs themselves (``batch_sizes``; ``num_graphs`` or ``batch_size``).

    Args:
        batch: a tensor, or any nesting of tuples, lists, dicts and dataclasses; the inputs come first.
        dim: the batch axis, 1 for (time, batch).

    Raises:
        HawqError: there is no tensor in the batch, or the first has no such axis.
    """
    if (told := _told(batch)) is not None:
        return told
    if isinstance(batch, torch.Tensor):
        if batch.ndim <= dim:
            shape = "" if batch.is_nested else f" {dim} (its shape is {list(batch.shape)})" if dim else ""
            raise HawqError(f"The batch's first tensor has no batch axis{shape}.")
        return int(batch.size(dim))
    if not _top and isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], (torch.Tensor, Mapping)):
        return len(batch)
    if isinstance(batch, list) and batch and all(_is_one_sample(entry) for entry in batch):
        return len(batch)
    # names and paths may come before the images
    values = [v for v in parts_of(batch) if _told(v) is not None or _holds_tensor(v)]
    if values:
        first = values[0]
        listed = first if isinstance(first, (list, tuple)) and _told(first) is None else ()
        if listed and all(isinstance(x, torch.Tensor) and x.ndim > dim for x in listed):
            # several inputs of the network, or one image an entry? What comes with them, labels or boxes, tells
            counts = {int(x.shape[dim]) for x in listed}
            beside = {int(v.shape[0]) for v in values[1:] if isinstance(v, torch.Tensor) and v.ndim}
            if len(counts) == 1 and counts == beside and len(listed) not in beside:
                return counts.pop()
        return batch_images(first, _top=False, dim=dim)
    raise HawqError(
        f"A batch of type {type(batch).__name__} holds no tensor; expected the inputs first, or a function that counts "
        "its samples, batch_size_fn."
    )


def _is_one_sample(entry: object) -> bool:
    """Whether a dict in a list is a sample, with a target of its own, and no batch of another loader."""
    targets = entry.values() if isinstance(entry, Mapping) else ()
    return any(isinstance(v, (int, float)) or (isinstance(v, torch.Tensor) and v.ndim == 0) for v in targets)


def _told(batch: Batch) -> int | None:
    """How many samples a batch says that it has, ``None`` where it says nothing."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, (torch.Tensor, Mapping, list, tuple, str, type)):
        return None
    for name in ("num_graphs", "batch_size"):
        number = getattr(batch, name, None)
        number = number[0] if isinstance(number, (tuple, list)) and number else number
        if isinstance(number, int) and not isinstance(number, bool):
            return number
    return 1 if isinstance(getattr(batch, "num_nodes", None), int) else None  # a single graph


def plain_tensor(x: torch.Tensor) -> torch.Tensor:
    """The same memory without the ways of a subclass, such as MONAI's: slices of those need metadata."""
    kind = type(x)
    if kind in (torch.Tensor, nn.Parameter) or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(torch.Tensor)


def parts_of(batch: Batch) -> list[object]:
    """What a list, tuple, dict or dataclass holds, in order; nothing of anything else."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, (list, tuple)):
        return list(batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, f.name) for f in fields(batch)]
    return []


def like(batch: Batch, parts: Sequence[Any]) -> Batch:
    """A container of the same make as ``batch``, holding ``parts`` in the order of :func:`parts_of`."""
    if isinstance(batch, Mapping):
        named = dict(zip(batch, parts))
        if isinstance(batch, defaultdict):
            return defaultdict(batch.default_factory, named)
        return type(batch)(named)  # type: ignore[call-arg]
    if isinstance(batch, (list, tuple)):
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    copied = copy.copy(batch)
    for f, part in zip(fields(batch), parts):
        object.__setattr__(copied, f.name, part)  # frozen ones, too
    return copied


def fresh_copy(batch: Batch, _copies: dict[int, Any] | None = None, *, tensors: bool = True) -> Batch:
    """A batch that may be changed in place, tensors and containers alike, without a trace in ``batch``.

    Tensors are cloned, one that stands in several places once. Objects that are no containers are copied by their
    method ``clone``, as graphs and tensor classes have it; without one, those that move by their method ``to`` are
    copied with what they hold, and others stay.

    Args:
        batch: any nesting of tuples, lists, dicts and dataclasses.
        tensors: clone tensors that stand in such containers; otherwise they are the same ones, in new containers.
    """
    copies: dict[int, Any] = {} if _copies is None else _copies
    if id(batch) in copies:
        return copies[id(batch)]
    copied = batch
    if isinstance(batch, torch.Tensor):
        if tensors:
            copied = batch.detach().clone().requires_grad_(batch.requires_grad) if batch.is_leaf else batch.clone()
    elif parts := parts_of(batch):
        copied = like(batch, [fresh_copy(v, copies, tensors=tensors) for v in parts])
    elif isinstance(batch, np.ndarray):
        copied = batch.copy()
    elif isinstance(batch, (type, nn.Module)):
        pass
    elif callable(getattr(batch, "clone", None)):
        copied = batch.clone()
    elif callable(getattr(batch, "to", None)) and hasattr(batch, "__dict__"):
        copied = copies[id(batch)] = copy.copy(batch)  # before what it holds, which may hold it
        for name, value in vars(batch).items():
            object.__setattr__(copied, name, fresh_copy(value, copies))
    copies[id(batch)] = copied
    return copied


def _holds_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) or any(_holds_tensor(v) for v in parts_of(value))


def image_tensors(batches: Iterable[Batch], most: int | None = None) -> Iterator[torch.Tensor]:
    """The images of batches: tensors, or the first thing in each.

    Args:
        batches: of any length.
        most: stop after so many images; the last batch is cut.
    """
    count = 0
    for batch in batches:
        x: torch.Tensor = batch if isinstance(batch, torch.Tensor) else batch[0]
        x = x if most is None else x[: most - count]
        yield x
        count += len(x)
        if most is not None and count >= most:
            return


def pieces(batches: Iterable[torch.Tensor], size: int | str) -> Iterator[torch.Tensor]:
    """Batches as a file takes them.

    Args:
        batches: of images.
        size: of the first axis of a file's input; what is left over of a batch is left out. A name: any size.
    """
    for x in batches:
        if isinstance(size, str):
            yield x
        else:
            yield from (x[start : start + size] for start in range(0, len(x) - size + 1, size))


def default_forward(model: nn.Module, batch: Batch) -> Outputs:
    """Call the model on the inputs of a batch: the tensor itself, the first of a tuple, or a dict's values by name."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)
