"""A loss that may be called again and again: it finds the batch, and what it moves of the model, as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from hawq_lightning._batches import fresh_copy
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.layers import FakeQuantLayer
from hawq_lightning.sensitivity._held_state import HeldState, KeptParameters

_LOOKS = 2  # calls after which it is known which buffers a loss moves


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
        self._parameters = KeptParameters(_state(model, nn.Module.parameters))
        self._buffers: list[HeldState] = []
        self._calls = 0

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        self._parameters.put_back()
        for held in self._buffers:
            held.put_back()
        with self._parameters:
            if self._calls >= _LOOKS:
                return self._loss_fn(model, fresh_copy(batch))
            self._calls += 1
            held = HeldState(_state(self._model, nn.Module.buffers))
            loss = self._loss_fn(model, fresh_copy(batch))
        known = {id(t) for earlier in self._buffers for t in earlier.tensors()}
        if moved := [t for t in held.changed() if id(t) not in known]:
            held.keep_only(moved)
            self._buffers.append(held)
        return loss


def _state(model: nn.Module, tensors: Callable[..., Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
    quantizers = {
        id(q) for layer in model.modules() if isinstance(layer, FakeQuantLayer)
        for name, child in layer._modules.items() if child is not None and name.endswith("_quantizer")
        for q in child.modules()
    }  # fmt: skip
    for module in model.modules():
        if id(module) not in quantizers:
            yield from tensors(module, recurse=False)
