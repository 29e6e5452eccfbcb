"""Which weights a function reads beside the layer that they belong to: tied decoders, normalised classifiers.

A quantizer stands where a layer's own call reads its weight. ``F.linear(x, layer.weight.t())`` elsewhere reads the
float weight past it. Seen in a real forward pass, below autograd, so that it does not matter how the read is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from hawq_lightning._types import FunctionInputs, Options
from hawq_lightning.layers import WeightReader

# what asks a tensor for its shape and type only
_SHAPE_ONLY = {
    f"{kind}{like}"
    for like in ("zeros", "ones", "empty", "full", "rand", "randn", "randint", "empty_strided", "scalar_tensor")
    for kind in ("new_", "")
} | {f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")}
_NONE: frozenset[int] = frozenset()


class FunctionReads(TorchDispatchMode):
    """Notes, while a model runs inside, which weights meet data outside of the modules that hold them.

    A tensor is *constant* if it is a parameter or buffer of the model, was made of nothing, or of constants alone; any
    other is *data*. An operation on data and on a constant that was made of a weight reads that weight. Penalties do
    not: there one number is added to another. Nor do backward passes that a loss makes, and what runs under ``no_grad``
    counts only where everything does.

    Args:
        model: that is going to run.
        readers: layer name -> layer, of the weights to look after.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, readers: Mapping[str, WeightReader]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._readers = model, readers
        self._holders = _holders(model, readers)
        self._constant: dict[StorageWeakRef, frozenset[int]] = {}
        self._lasting: set[StorageWeakRef] = set()  # parameters stay what they are, whatever is written into them
        self._inside: list[tuple[nn.Module, frozenset[int]]] = []
        self._handles: list[RemovableHandle] = []
        self._reads: dict[bool, set[int]] = {True: set(), False: set()}  # by whether gradients were on
        self._elsewhere: dict[int, list[nn.Module]] = {}
        self._several: set[StorageWeakRef] = set()
        self.differentiated = False  # a backward pass inside of the run has left a graph of its own

    def given_back(self) -> None:
        """A loss that moves parameters has just been given them as they were, perhaps in other memory."""
        for tensor in self._model.parameters():
            self._know_memory(tensor)

    def __enter__(self) -> FunctionReads:
        several = self._several
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            if (storage := _storage(tensor)) is not None:
                (several if storage in self._constant else self._lasting).add(storage)
                self._constant[storage] = frozenset({id(tensor)})
        for storage in several:  # parts of one flat tensor cannot be told apart
            self._constant[storage] = _NONE
        for module in self._model.modules():  # of a target too, no site of which is looked after
            if id(module) not in self._holders and not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_pre_hook(self._know_memory_of))
        for module, keys in self._holders.values():
            self._handles.append(module.register_forward_pre_hook(self._enter(module, keys)))
            # before the hooks that look at a call, which may ask the weight for its values
            self._handles.append(module.register_forward_hook(self._leave, prepend=True, always_call=True))
        for reader in self._readers.values():
            self._mark(reader)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._constant.clear()

    def layers(self, with_gradients: bool = True) -> tuple[str, ...]:
        """Layers whose weights a function reads, in order.

        Args:
            with_gradients: of the passes that build a graph; else of those under ``no_grad``.
        """
        return tuple(n for n, x in self._readers.items() if x.key in self._reads[with_gradients])

    def elsewhere(self) -> dict[str, list[nn.Module]]:
        """Layer -> modules that are none of the layers and hold and read its weight as well, such as an embedding."""
        return {n: self._elsewhere[x.key] for n, x in self._readers.items() if x.key in self._elsewhere}

    def _mark(self, reader: WeightReader) -> None:
        """Know the weight of a layer where a hook computes it: it is no parameter."""
        storage = _storage(reader.weight)
        if reader.recomputed and storage is not None:
            self._constant[storage] = frozenset({reader.key})

    def _enter(self, module: nn.Module, keys: frozenset[int]) -> Callable[..., None]:
        recomputed = [r for r in self._readers.values() if r.module is module and r.recomputed]

        def enter(*_: object) -> None:
            for reader in recomputed:
                self._mark(reader)
            self._know_memory_of(module)
            self._inside.append((module, keys))

        return enter

    def _know_memory_of(self, module: nn.Module, *_: object) -> None:
        for tensor in module._parameters.values():  # its memory may be another one: tensor.data = ...
            if tensor is not None:
                self._know_memory(tensor)

    def _know_memory(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        if storage is not None and storage not in self._lasting and storage not in self._several:
            self._lasting.add(storage)  # whatever it was made of: an average of another weight is a weight of its own
            self._constant[storage] = frozenset({id(tensor)})

    def _leave(self, *_: object) -> None:
        if self._inside:
            self._inside.pop()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        in_backward = torch._C._current_graph_task_id() != -1
        self.differentiated = self.differentiated or (in_backward and torch.is_grad_enabled())
        if isinstance(func, OpOverload) and not in_backward:
            self._note(func, [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)], out)
        return out

    def _note(self, func: OpOverload, tensors: list[torch.Tensor], out: object) -> None:
        made_of: frozenset[int] | None = _NONE
        if func.overloadpacket.__name__ not in _SHAPE_ONLY:
            sources = [self._constant.get(s) if (s := _storage(t)) is not None else None for t in tensors]
            weights = _NONE.union(*(s for s in sources if s))
            held = _NONE.union(*(keys for _, keys in self._inside)) if weights else _NONE
            if any(s is None for s in sources):
                made_of = None
                if weights and any(t.ndim for t in tensors):
                    self._reads[torch.is_grad_enabled()] |= weights - held
                    self._note_holders(weights & held)
            else:  # a cast, a view or a rounded weight is still the weight; a product of the layer is not
                made_of = weights if len(tensors) == 1 else weights - held
        for tensor in tree_leaves(out):
            storage = _storage(tensor) if isinstance(tensor, torch.Tensor) else None
            if storage is None or storage in self._lasting:
                continue
            if made_of is None:
                self._constant.pop(storage, None)
            else:
                self._constant[storage] = made_of

    def _note_holders(self, weights: frozenset[int]) -> None:
        layers = {id(r.module) for r in self._readers.values()}
        for module, keys in self._inside:
            if id(module) not in layers:
                for key in weights & keys:
                    if module not in self._elsewhere.setdefault(key, []):
                        self._elsewhere[key].append(module)


def _holders(model: nn.Module, readers: Mapping[str, WeightReader]) -> dict[int, tuple[nn.Module, frozenset[int]]]:
    """Id of a module -> the module, and the weights that are read by right inside of its call."""
    keys = {r.key for r in readers.values()}
    held = {id(m): (m, keys & {id(p) for p in m._parameters.values()}) for m in model.modules()}
    for r in readers.values():
        module, own = held.get(id(r.module), (r.module, set()))
        held[id(module)] = (module, own | {r.key})
    return {i: (m, frozenset(own)) for i, (m, own) in held.items() if own}


def _storage(tensor: torch.Tensor) -> StorageWeakRef | None:
    """A tensor's memory, which views share; ``None`` where there is none, as of sparse tensors and lazy parameters."""
    try:
        with torch._C.DisableTorchFunction():  # who watches for writes would take it for one
            return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError, ValueError):
        return None
