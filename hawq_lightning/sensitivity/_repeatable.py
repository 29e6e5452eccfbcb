"""A loss that may be called again and again: it finds the batch, and what it moves of the model, as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from hawq_lightning._batches import fresh_copy
from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.layers import FakeQuantLayer

_LOOKS = 2  # calls after which it is known what a loss moves


class HeldState:
    """Values of parameters and buffers, to be put back where they have changed.

    Args:
        tensors: of a model.
    """

    def __init__(self, tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> None:
        self._held = [
            (t, t.data, t.detach().clone())
            for t in tensors
            if not t.is_meta and not isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer))
        ]

    def tensors(self) -> list[torch.Tensor]:
        """Those that are held."""
        return [t for t, _, _ in self._held]

    def values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Those that own their memory, with their values: of parts of a larger tensor it is not known which part."""
        return [(t, v) for t, data, v in self._held if data.storage_offset() == 0 and v.stride() == data.stride()]

    def changed(self) -> list[torch.Tensor]:
        """Tensors that are not what they were, changed in place or with ``tensor.data = ...``."""
        return [t for t, _, value in self._held if t.shape != value.shape or not torch.equal(t.detach(), value)]

    def keep_only(self, tensors: list[torch.Tensor]) -> None:
        """Forget the others."""
        ids = {id(t) for t in tensors}
        self._held = [entry for entry in self._held if id(entry[0]) in ids]

    def put_back(self) -> None:
        """Put back values, and the memory that held them; versions stay, so that graphs do not notice."""
        with torch.no_grad():
            for tensor, data, value in self._held:
                if tensor.data_ptr() != data.data_ptr():
                    tensor.data = data
                if not torch.equal(tensor.detach(), value):
                    tensor.data.copy_(value)


def repeatable(model: nn.Module, loss_fn: LossFn) -> LossFn:
    """``loss_fn`` on copies of the batches, whose teachers, queues and centres stand still.

    A training step may change its batch in place, and may move parameters or buffers (EMA teachers of BYOL, MoCo and
    DINO). What the first calls move is put back before every later one; quantizers look after themselves.

    Args:
        model: that ``loss_fn`` is called with.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
    """
    return _Repeatable(model, loss_fn)


class _Repeatable:
    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._moved: list[HeldState] = []
        self._calls = 0

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        for held in self._moved:
            held.put_back()
        if self._calls >= _LOOKS:
            with _saved_as_used(self._moved):
                return self._loss(model, batch)
        self._calls += 1
        held = HeldState(_state(self._model))
        with _saved_as_used([held]):
            loss = self._loss(model, batch)
        known = {id(t) for earlier in self._moved for t in earlier.tensors()}
        if moved := [t for t in held.changed() if id(t) not in known]:
            held.keep_only(moved)
            self._moved.append(held)
        return loss

    def _loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        try:
            return self._loss_fn(model, fresh_copy(batch))
        except RuntimeError as error:
            if not any(text in str(error) for text in _NO_GRADIENTS):
                raise
            raise HawqError(
                f"The loss asks for gradients of what the network makes, in a pass that computes none ({error}): give "
                "loss_fn= without that part."
            ) from error


# what torch says where a graph is asked for that is not there
_NO_GRADIENTS = ("does not require grad", "has requires_grad=False", "does not have a grad_fn")


def _saved_as_used(states: Sequence[HeldState]) -> AbstractContextManager[object]:
    """Inside, graphs keep what they need of held tensors as it is when they use it: a step may move it afterwards."""
    held = {t.untyped_storage()._cdata: (t._version, value) for state in states for t, value in state.values()}
    if not held:
        return nullcontext()

    def pack(tensor: torch.Tensor) -> _Saved | torch.Tensor:
        try:
            entry = held.get(tensor.untyped_storage()._cdata)
        except NotImplementedError:  # a sparse tensor is no parameter
            return tensor
        if entry is None:
            return tensor
        version, value = entry
        used = tensor.detach()
        return _Saved(used, version, value) if tensor._version == version else used.clone()

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.used() if isinstance(x, _Saved) else x)


@dataclass(frozen=True)
class _Saved:
    """A parameter or buffer, or a view of one, that a graph needs.

    Attributes:
        tensor: as it is now.
        version: that it had when it was used.
        value: of the whole parameter then.
    """

    tensor: torch.Tensor
    version: int
    value: torch.Tensor

    def used(self) -> torch.Tensor:
        """Its value when it was used."""
        if self.tensor._version == self.version:
            return self.tensor
        start = self.value.storage_offset() + self.tensor.storage_offset()
        return self.value.as_strided(self.tensor.shape, self.tensor.stride(), start)


def _state(model: nn.Module) -> Iterator[torch.Tensor]:
    quantizers = {
        id(q) for layer in model.modules() if isinstance(layer, FakeQuantLayer)
        for name, child in layer._modules.items() if child is not None and name.endswith("_quantizer")
        for q in child.modules()
    }  # fmt: skip
    for module in model.modules():
        if id(module) not in quantizers:
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)
