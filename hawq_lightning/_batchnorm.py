"""Which BatchNorm reads which layer's outputs, all of them and nothing else: what can be folded, in training or after.

What feeds what comes from a real forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hawq_lightning._types import FunctionInputs, Options, Outputs
from hawq_lightning.layers import kind_of

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm of torch's, or torchvision's frozen one."""
    return type(module) in NORMS or (
        type(module).__name__ == "FrozenBatchNorm2d" and type(module).__module__.startswith("torchvision.")
    )


def affine(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and offset a channel of a BatchNorm in evaluation mode, in float64."""
    factor, mean = gain(norm), norm.running_mean.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    return factor, beta - mean * factor


def gain(norm: Any) -> torch.Tensor:
    """Factor a channel of a BatchNorm in evaluation mode, ``gamma / sqrt(running var + eps)``, in float64."""
    var = norm.running_var.double()
    gamma = torch.ones_like(var) if norm.weight is None else norm.weight.detach().double()
    scale: torch.Tensor = gamma / (var + norm.eps).sqrt()
    return scale


class NormReads(TorchDispatchMode):
    """Notes, while a model runs inside of :meth:`run`, which layers feed each norm and what else reads their outputs.

    Args:
        layers: convolutions and linear layers.
        norms: the model's BatchNorms.
    """

    def __init__(self, layers: Iterable[nn.Module], norms: Iterable[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = {id(m): m for m in layers}
        self.norms = {id(m): m for m in norms}
        self.made: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}  # id of an output, while it lives -> layer
        self.readers: dict[int, set[int]] = {k: set() for k in self.layers}  # layer -> norms, 0 for anything else
        self.sources: dict[int, list[nn.Module]] = {}  # norm -> layers
        self.strays: set[int] = set()  # norms that read something else than a layer's output
        self._inside: list[int] = []

    def run(self, forward: Callable[[], Outputs]) -> Outputs:
        """Run the model; what it returns counts as read."""
        handles = []
        for key, module in [*self.layers.items(), *self.norms.items()]:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(self._enter(key)))
            handles.append(module.register_forward_hook(self._leave(key), always_call=True))
        try:
            with self:
                result = forward()
        finally:
            for handle in handles:
                handle.remove()
        self._note(tree_leaves(result), 0)
        return result

    def why_not(self, norm: nn.Module) -> str | None:
        """Why the layers before a norm cannot take it in; ``None`` if they can."""
        key = id(norm)
        if key not in self.sources and key not in self.strays:
            return "the forward pass does not call it"
        if key in self.strays:
            return "its input is not the output of a convolution or linear layer alone"
        for layer in self.sources[key]:
            if self.readers[id(layer)] != {key}:
                return "something else reads the output of the layer before it"
            if reason := kind_of(layer).why_not_folded(layer):
                return reason
        return None

    def pairs(self) -> dict[int, nn.Module]:
        """Id of a layer -> the norm with running statistics that it can take in."""
        return {
            id(layer): self.norms[key]
            for key, layers in self.sources.items()
            if getattr(self.norms[key], "running_var", None) is not None and self.why_not(self.norms[key]) is None
            for layer in layers
        }

    def _enter(self, key: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if key in self.norms:
                source = self._source(args[0]) if args else None
                if source is None or args[0].ndim != self._axes(source):
                    self.strays.add(key)  # or unbatched, or a sequence: axis 1 is then not the channels
                else:
                    self.readers[source].add(key)
                    sources = self.sources.setdefault(key, [])
                    if self.layers[source] not in sources:
                        sources.append(self.layers[source])
            self._inside.append(key)

        return enter

    def _leave(self, key: int) -> Callable[..., None]:
        def leave(module: nn.Module, args: object, output: object) -> None:
            self._inside.pop()
            if key in self.layers and isinstance(output, torch.Tensor):
                self.made[id(output)] = (weakref.ref(output), key)

        return leave

    def _axes(self, key: int) -> int:
        return kind_of(self.layers[key]).output_axes(self.layers[key])

    def _source(self, tensor: object) -> int | None:
        made = self.made.get(id(tensor))
        return made[1] if made is not None and made[0]() is tensor else None

    def _note(self, tensors: Iterable[object], reader: int) -> None:
        for tensor in tensors:
            source = self._source(tensor)
            if source is not None:
                self.readers[source].add(reader)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        kwargs = kwargs or {}
        if not (self._inside and self._inside[-1] in self.norms):
            self._note(tree_leaves((args, kwargs)), 0)
        return func(*args, **kwargs)


def norms_behind(
    model: nn.Module, named: Mapping[str, nn.Module], layers: Mapping[str, nn.Module], run: Callable[[], object]
) -> dict[str, str]:
    """Layer -> the BatchNorm that it can take in, by name, as one forward pass ``run()`` shows.

    Args:
        model: of the norms.
        named: every module by name.
        layers: convolutions and linear layers by name.
        run: the pass.
    """
    norms = {id(m): n for n, m in named.items() if is_norm(m)}
    if not norms:
        run()
        return {}
    reads = NormReads(layers.values(), (m for m in model.modules() if id(m) in norms))
    reads.run(run)
    pairs = reads.pairs()
    return {n: norms[id(pairs[id(m)])] for n, m in layers.items() if id(m) in pairs}
