"""A loss that may be called again and again: it finds the batch, and what it moves of the model, as they were."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from hawq_lightning._batches import fresh_copy
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
            return self._loss_fn(model, fresh_copy(batch))
        self._calls += 1
        held = HeldState(_state(self._model))
        loss = self._loss_fn(model, fresh_copy(batch))
        known = {id(t) for earlier in self._moved for t in earlier.tensors()}
        if moved := [t for t in held.changed() if id(t) not in known]:
            held.keep_only(moved)
            self._moved.append(held)
        return loss


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
