"""Which activations are alive when: peak memory, what micro-controllers run out of (paper section 3.3).

One real forward pass is watched operation by operation. A tensor lives from its making to its last reading; at every
call of a quantizable layer the tensors that go in, come out and wait are what memory has to hold. What only such layers
read is held at its site's bits; what something else still reads (a residual addition, a pooling branch) is held as
float32. Operations between two layer calls (BatchNorm, ReLU, addition) are taken to run in place or fused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hawq_lightning._batches import batch_images, default_forward
from hawq_lightning._errors import HawqError
from hawq_lightning._float_rest import plain
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import FunctionInputs, Options

FLOAT = "float32"


class _Lifetime:
    """One storage: when it was made and read, and by whom."""

    def __init__(self, tensor: torch.Tensor, born: int) -> None:
        self.keep = tensor  # so that its address stays its own
        self.elements = tensor.numel()
        self.born = born
        self.reads: list[tuple[int, str | None]] = []


class _Watch(TorchDispatchMode):
    def __init__(self, constants: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.constants = constants
        self.lives: dict[int, _Lifetime] = {}
        self.time = 0
        self.layer: str | None = None

    def life(self, tensor: torch.Tensor, born: int) -> _Lifetime | None:
        key = tensor.untyped_storage()._cdata
        if key in self.constants or tensor.numel() == 0:
            return None
        if key not in self.lives:
            self.lives[key] = _Lifetime(tensor, born)
        return self.lives[key]

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        self.time += 1
        out = func(*args, **(kwargs or {}))
        results = {t.untyped_storage()._cdata for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)}
        writes = func._schema.is_mutable
        for tensor in tree_flatten((args, kwargs))[0]:
            if isinstance(tensor, torch.Tensor) and (life := self.life(tensor, 0)):
                if tensor.untyped_storage()._cdata in results and not writes:
                    continue  # a view reads nothing
                life.reads.append((self.time, self.layer))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self.life(tensor, self.time)
        return out


def activation_steps(
    model: nn.Module,
    example_batch: Any,
    table: SiteTable,
    *,
    forward: Callable[[nn.Module, Any], Any] = default_forward,
    evaluate: bool = True,
    images: int | None = None,
) -> list[dict[str, int]]:
    """Elements of one image alive at every call of a quantizable layer.

    Args:
        model: as it was when ``table`` was made; it is left as it was.
        example_batch: one batch, inputs first.
        table: ``hawq_lightning.sites(model, example_batch)``.
        forward: how to run the model on the batch.
        evaluate: in evaluation mode; ``False``: in the mode that it is in.
        images: in the batch; counted when not given.

    Returns:
        For each call, activation site name -> elements held at its bits; :data:`FLOAT` -> elements held at 32 bits.
        Pass it as ``steps`` to :class:`hawq_lightning.selection.Problem`.

    Raises:
        HawqError: the forward pass calls none of the table's layers.
    """
    images = batch_images(example_batch) if images is None else images
    site_of = {x.name: x.activation for x in table.layers}
    modules = {plain(n): m for n, m in model.named_modules()}
    watch = _Watch({t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())})
    entries: list[int] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            entries.append(watch.time)
            watch.layer = name

        return hook

    def leave(*_: object) -> None:
        watch.layer = None

    handles = []
    for name in site_of:
        if name in modules:
            handles += [
                modules[name].register_forward_pre_hook(enter(name)),
                modules[name].register_forward_hook(leave),
            ]
    modes = {m: m.training for m in model.modules()}
    if evaluate:
        model.eval()
    try:
        with torch.no_grad(), watch:
            forward(model, example_batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not entries:
        raise HawqError("The forward pass calls none of the layers in the table, so no time steps can be found.")
    held = [(life, _storage_site(life, site_of)) for life in watch.lives.values() if life.reads]
    alive = [[(x, who) for x, who in held if x.born <= t < x.reads[-1][0]] for t in entries]
    steps = []
    for now, then in zip(alive, [*alive[1:], []]):
        step: dict[str, int] = {}
        for life, who in {id(x): (x, who) for x, who in (*now, *then)}.values():
            step[who] = step.get(who, 0) + life.elements
        steps.append({who: -(-n // images) for who, n in step.items()})
    return steps


def _storage_site(life: _Lifetime, site_of: Mapping[str, str | None]) -> str:
    """The site at whose bits a tensor is held, or :data:`FLOAT`."""
    layers = [(t, name) for t, name in life.reads if name is not None]
    if not layers:
        return FLOAT
    first, name = layers[0]
    if any(other is None and t > first for t, other in life.reads):
        return FLOAT
    return site_of[name] or FLOAT
