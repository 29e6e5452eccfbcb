"""Folding BatchNorm into the layer before it: scales and biases change, codes never.

In evaluation mode BatchNorm is ``y -> g * y + (beta - g * mean)`` with ``g = gamma / sqrt(var + eps)`` a channel. A
layer with codes c and scales s takes it in as scales ``s * g``: a negative gamma makes a negative scale and a zero one
a zero scale, so that every code stays what training saw. What feeds what comes from a real forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hawq_lightning.sites import QUANTIZABLE, channel_axis, layer_type

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Folding:
    """What became of every BatchNorm.

    Attributes:
        folded: name of the BatchNorm -> the layers that took it in.
        kept: name -> why it stays.
    """

    folded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)


class FoldedNorm(nn.Module):
    """Where a BatchNorm was: the identity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x``."""
        return x


def fold_batch_norm(model: nn.Module, inputs: Iterable[torch.Tensor]) -> Folding:
    """Fold every BatchNorm that can be, in place.

    It can be when all that it normalises are the outputs of convolutions or linear layers that nothing else reads.

    Args:
        model: in evaluation mode; layers with stored codes or with float weights.
        inputs: example inputs of the forward pass.

    Returns:
        what was folded into which layers, and what stays, with the reason.
    """
    names = {id(m): n for n, m in model.named_modules()}
    norms = {names[id(m)]: m for m in model.modules() if is_norm(m)}
    flow = _Flow(model, norms.values())
    flow.run(tuple(inputs))
    folded: dict[str, tuple[str, ...]] = {}
    kept: dict[str, str] = {}
    for name, norm in norms.items():
        layers = flow.sources.get(id(norm), [])
        if reason := flow.why_not(norm) or next(filter(None, (_misfit(m, norm) for m in layers)), None):
            kept[name] = reason
            continue
        for layer in layers:
            _absorb(layer, norm)
        folded[name] = tuple(names[id(m)] for m in layers)
        _clear(norm)
    return Folding(folded, kept)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm of torch's, or torchvision's frozen one."""
    return type(module) in NORMS or (
        type(module).__name__ == "FrozenBatchNorm2d" and type(module).__module__.startswith("torchvision.")
    )


def affine(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and offset a channel of a BatchNorm in evaluation mode, in float64."""
    var, mean = norm.running_var.double(), norm.running_mean.double()
    gamma = torch.ones_like(var) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(var) if norm.bias is None else norm.bias.detach().double()
    factor = gamma / (var + norm.eps).sqrt()
    return factor, beta - mean * factor


class _Flow(TorchDispatchMode):
    """Runs the model once and notes which layers feed each norm, and which outputs something else reads too."""

    def __init__(self, model: nn.Module, norms: Iterable[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.norms = {id(m): m for m in norms}
        self.layers = {id(m): m for m in model.modules() if layer_type(m) in QUANTIZABLE}
        self.made: dict[int, tuple[torch.Tensor, int]] = {}  # output tensor (kept, so its id stays) -> layer
        self.readers: dict[int, set[int]] = {k: set() for k in self.layers}  # layer -> norms, 0 for anything else
        self.sources: dict[int, list[nn.Module]] = {}  # norm -> layers
        self.strays: set[int] = set()  # norms that read something else than a layer's output
        self._inside: list[int] = []

    def run(self, inputs: tuple[torch.Tensor, ...]) -> None:
        handles = []
        for key, module in [*self.layers.items(), *self.norms.items()]:
            handles.append(module.register_forward_pre_hook(self._enter(key)))
            handles.append(module.register_forward_hook(self._leave(key), always_call=True))
        try:
            with torch.no_grad(), self:
                result = self.model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        self._note(tree_leaves(result), 0)

    def why_not(self, norm: nn.Module) -> str | None:
        key = id(norm)
        if norm.training or getattr(norm, "running_var", None) is None:
            return "it normalises by the statistics of the batch"
        if key not in self.sources and key not in self.strays:
            return "the forward pass does not call it"
        if key in self.strays:
            return "its input is not the output of a convolution or linear layer alone"
        for layer in self.sources[key]:
            if self.readers[id(layer)] != {key}:
                return "something else reads the output of the layer before it"
        return None

    def _enter(self, key: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            if key in self.norms:
                source = self.made.get(id(args[0])) if args else None
                if source is None or source[0].ndim != _axes(self.layers[source[1]]):
                    self.strays.add(key)  # or unbatched, or a sequence: axis 1 is then not the channels
                else:
                    self.readers[source[1]].add(key)
                    known = self.sources.setdefault(key, [])
                    if self.layers[source[1]] not in known:
                        known.append(self.layers[source[1]])
            self._inside.append(key)

        return enter

    def _leave(self, key: int) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._inside.pop()
            if key in self.layers and isinstance(output, torch.Tensor):
                self.made[id(output)] = (output, key)

        return leave

    def _note(self, tensors: Iterable[Any], reader: int) -> None:
        for tensor in tensors:
            made = self.made.get(id(tensor))
            if made is not None:
                self.readers[made[1]].add(reader)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (self._inside and self._inside[-1] in self.norms):
            self._note(tree_leaves((args, kwargs)), 0)
        return func(*args, **kwargs)


def _axes(layer: Any) -> int:
    """Axes of a layer's output when axis 1 holds its channels."""
    return 2 if issubclass(layer_type(layer), nn.Linear) else 2 + len(layer.kernel_size)


def _misfit(layer: Any, norm: Any) -> str | None:
    """Why this layer's channels are not the norm's."""
    if issubclass(layer_type(layer), nn.Linear):
        return None
    if channel_axis(layer) == 1 and layer.groups > 1:
        return "the groups of a transposed convolution share their scales"
    return None


def _absorb(layer: Any, norm: Any) -> None:
    factor, offset = affine(norm)
    if layer.weight is None:
        stored = layer.weight_quantizer
        stored.scale.copy_((stored.scale.double() * factor).float())
    else:  # a layer without codes; its weight may be tied, so it gets its own
        shape = [1] * layer.weight.ndim
        shape[channel_axis(layer)] = -1
        layer.weight = nn.Parameter((layer.weight.double() * factor.view(shape)).float(), requires_grad=False)
    bias = offset if layer.bias is None else layer.bias.detach().double() * factor + offset
    layer.bias = nn.Parameter(bias.float(), requires_grad=False)


def _clear(norm: nn.Module) -> None:
    # the same object in every place that names it, now without state
    for name in [*norm._parameters, *norm._buffers]:
        delattr(norm, name)
    norm.__class__ = FoldedNorm
