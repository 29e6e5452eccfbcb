"""A loss that may be called again and again: it finds the batch, and what it moves of the model, as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from hawq_lightning._batches import fresh_copy
from hawq_lightning._errors import HawqError
from hawq_lightning._function_reads import FunctionReads
from hawq_lightning._loss_graph import shape_only
from hawq_lightning._site_calls import NOT_CALLED
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.layers import quantizer_parts
from hawq_lightning.sensitivity._fixed_draws import FixedDraws
from hawq_lightning.sensitivity._function_transforms import NOT_SEEN, by_function_transform
from hawq_lightning.sensitivity._held_state import HeldNames, HeldState, KeptParameters, memory_of
from hawq_lightning.sensitivity._parameter_flags import ParameterFlags

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


def settle_draws(model: nn.Module, loss_fn: LossFn, table: SiteTable, batches: Iterable[Batch]) -> bool:
    """Where draws of the loss have left out layers, choose seeds for the batches that leave out fewest.

    Args:
        model: that ``loss_fn`` is called with.
        loss_fn: of :func:`repeatable`, after a pass that found ``table``.
        table: the sites of that pass.
        batches: to choose for.

    Returns:
        whether sites are to be looked for again.
    """
    missing = any(f.reason == NOT_CALLED for f in table.floats)
    if not isinstance(loss_fn, _Repeatable) or not loss_fn.draws.drew or not missing:
        return False
    loss_fn.draws.choose(batches, lambda batch: loss_fn(model, batch))
    return True


class _Repeatable:
    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._parameters = KeptParameters(_state(model, nn.Module.parameters))
        self._buffers: list[HeldState] = []
        self._calls = 0
        self._quantizers = quantizer_parts(model)
        self.draws = FixedDraws(model)

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        with self.draws(batch):
            return self._run(model, batch)

    def _run(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        looking = self._calls < _LOOKS
        self._calls += 1
        with _disable_current_modes():  # whoever watches what the loss reads does not see this
            self._parameters.put_back()
            for held in self._buffers:
                held.put_back()
            buffers = [HeldState(_state(self._model, nn.Module.buffers))] if looking else self._buffers
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, FunctionReads):
                mode.given_back()
        names = HeldNames(m for m in model.modules() if m not in self._quantizers)
        moves = not shape_only() and (looking or self._parameters.written or buffers)  # nearly no loss does
        with (
            self._parameters,
            _saved_as_used(self._parameters, buffers) if moves else nullcontext(),
        ):
            try:
                loss = self._loss(model, batch)
            finally:
                names.put_back()
        if looking:
            known = {id(t) for earlier in self._buffers for t in earlier.tensors()}
            with _disable_current_modes():
                moved = [t for t in buffers[0].changed() if id(t) not in known]
            if moved:
                buffers[0].keep_only(moved)
                self._buffers.append(buffers[0])
        return loss

    def _loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        flags = ParameterFlags(self._model)
        try:
            with flags:
                return self._loss_fn(model, fresh_copy(batch))
        except RuntimeError as error:  # NotImplementedError among them
            if by_function_transform(error):
                raise HawqError(NOT_SEEN) from error
            if not any(text in str(error) for text in _NO_GRADIENTS):
                raise
            flags.need_all()
            raise HawqError(
                f"The loss asks for gradients of what the network makes, in a pass that computes none ({error}): give "
                "a loss_fn without that part (callbacks take it as MeasureConfig(loss_fn=...))."
            ) from error


# what torch says where a graph is asked for that is not there
_NO_GRADIENTS = ("does not require grad", "has requires_grad=False", "does not have a grad_fn")


def _saved_as_used(parameters: KeptParameters, buffers: list[HeldState]) -> AbstractContextManager[object]:
    """Inside, graphs keep what they need of the model as it is when they use it: a step may move it afterwards."""
    values = {memory_of(t): (t._version, value) for state in buffers for t, value in state.values()}
    versions = {key: t._version for key, t in parameters.owners().items()} | {k: v for k, (v, _) in values.items()}

    def pack(tensor: torch.Tensor) -> _Saved | torch.Tensor:
        # detached: a graph that holds its own outputs would never be freed, unless a backward pass empties it
        used = tensor.detach()
        try:
            key = memory_of(tensor)
        except NotImplementedError:  # a sparse tensor is no parameter
            return used
        if key not in versions:
            return used
        if tensor._version != versions[key]:
            return used.clone()
        return _Saved(used, versions[key], lambda: values[key][1] if key in values else parameters.value(key))

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.used() if isinstance(x, _Saved) else x)


@dataclass(frozen=True)
class _Saved:
    """A parameter or buffer, or a view of one, that a graph needs.

    Attributes:
        tensor: as it is now.
        version: that it had when it was used.
        value: gives the whole parameter as it was then, once it has been written to.
    """

    tensor: torch.Tensor
    version: int
    value: Callable[[], torch.Tensor]

    def used(self) -> torch.Tensor:
        """Its value when it was used."""
        if self.tensor._version == self.version:
            return self.tensor
        whole = self.value()
        return whole.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset())


def _state(model: nn.Module, tensors: Callable[..., Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
    quantizers = quantizer_parts(model)
    for module in model.modules():
        if module not in quantizers:
            yield from tensors(module, recurse=False)
