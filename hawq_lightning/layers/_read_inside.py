"""Weights that a module of any class reads in its own way: stacks of matrices, and subclasses with their own forward.

Fused experts (``torch.bmm(x, w)``, ``einsum``, ``x @ w[e]``, grouped products), convolutions that standardise their
weight or pad by themselves, adapters: however a forward reads a parameter, it reads an attribute of the module. For the
time of the call another tensor is in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning.layers._adopted import changes
from hawq_lightning.layers._fake_quant import (
    ActivationQ,
    FakeQuantLayer,
    WeightQ,
    layer_type,
    quantizer_attribute,
)
from hawq_lightning.layers._gradients import Pairs
from hawq_lightning.layers._kind import LayerCall, WeightRead, kinds, register_layer
from hawq_lightning.layers._products import InnerProductsKind, is_recorded, recorded, visited
from hawq_lightning.layers._replaced import replaced, run_forward


class QReadInside(FakeQuantLayer[WeightQ, ActivationQ]):
    """The same module, what its forward reads quantized."""

    def forward(self, *args: Any, **kwargs: Any) -> object:
        """As the float module."""
        return _forward(self, *args, **kwargs)


@register_layer("read_inside")
class ReadInsideKind(InnerProductsKind):
    """Parameters ``[n, rows, columns]``, a scale for each of the n, and ``weight`` of subclasses of layers.

    What they are multiplied with stays float. A gradient is known only as a whole, for all samples: rows of a trace are
    batches.
    """

    by_contents = True
    fake_quant_type = QReadInside

    def holds(self, module: nn.Module) -> bool:
        """A LightningModule's parameters may be read outside of its forward."""
        return not hasattr(module, "training_step") and bool(_axes(module))

    def weights(self, module: nn.Module) -> Mapping[str, WeightRead]:
        """A scale an index of the first axis, or an output channel."""
        return {name: WeightRead(axis, reads_activation=False) for name, axis in _axes(module).items()}

    def macs(self, module: nn.Module, parameter: str, x: torch.Tensor, output: torch.Tensor) -> int:
        """None when it is read: what the forward multiplies with it is counted as it comes."""
        return 0

    def weight_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Pairs:
        """What came back to the tensor that was read, of all calls."""
        first = sum(call.grad for call in calls)
        other = sum(call.grad if call.other is None else call.other for call in calls)
        yield cast(torch.Tensor, first), cast(torch.Tensor, other)

    def explicit_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> object:
        """The forward, what it reads in sight."""
        return _forward(module, *args, **kwargs)


def writes_to_weights(module: nn.Module) -> bool:
    """Whether the forward of a module has written to what it reads, to limit its norm for one."""
    return module in _WRITERS


_WRITERS: WeakSet[nn.Module] = WeakSet()


def _axes(module: nn.Module) -> dict[str, int]:
    """Name of each weight -> axis of its scales. Position embeddings are no stacks: their first axis is one."""
    names = [n for n, p in module._parameters.items() if _is_stack(p) or _has_codes(module, n)]
    axes = dict.fromkeys(names, 0)
    if (axis := _channel_axis(module)) is not None:
        axes["weight"] = axis
    return axes


def _is_stack(p: nn.Parameter | None) -> bool:
    if p is None or isinstance(p, nn.UninitializedParameter):
        return False
    return p.ndim == 3 and min(p.shape) > 1 and p.is_floating_point()


def _has_codes(module: nn.Module, name: str) -> bool:
    """Whether a deployed network has codes in the place of a parameter."""
    return module._parameters[name] is None and hasattr(module, quantizer_attribute(name))


def _channel_axis(module: nn.Module) -> int | None:
    """Of the weight of a linear layer's or convolution's subclass that has a forward of its own."""
    module_type = layer_type(module)
    for kind in kinds():
        if issubclass(kind.float_type, _BASES) and issubclass(module_type, kind.float_type):
            changed = changes(module_type, kind.float_type) + replaced(module, kind.float_type)
            if "weight" in module._parameters and changed and set(changed) <= {"forward", "_conv_forward"}:
                return kind.channel_axis
    return None


_BASES = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> object:
    read = {name: _read(module, name) for name in _axes(module)}
    with _in_place(module, read):
        return run_forward(module, *args, **kwargs)


def _read(module: nn.Module, name: str) -> torch.Tensor:
    weight = cast(torch.Tensor, module._parameters[name])
    if isinstance(module, FakeQuantLayer):
        weight = getattr(module, quantizer_attribute(name))(weight)
    if not is_recorded(module, name):
        return weight
    # shown with a first axis of one, lest the weight's be taken for the samples'
    seen = visited(module, name, weight[None])
    return recorded(module, name, seen, seen)[0]


@contextmanager
def _in_place(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Attributes of the instance go before parameters.

    Raises:
        HawqError: a fake-quant layer's forward writes to them, and not to the parameters any more.
    """
    before = {name: module.__dict__[name] for name in tensors if name in module.__dict__}
    states = {name: (t.data_ptr(), t._version) for name, t in tensors.items()}
    try:
        module.__dict__.update(tensors)
        yield
        if any((tensors[name].data_ptr(), tensors[name]._version) != state for name, state in states.items()):
            _WRITERS.add(module)
            if isinstance(module, FakeQuantLayer):
                raise HawqError(
                    f"The forward of {layer_type(module).__name__} writes to its weight, in whose place there is a "
                    "quantized tensor: leave such layers float (exclude=)."
                )
    finally:
        for name in tensors:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)
