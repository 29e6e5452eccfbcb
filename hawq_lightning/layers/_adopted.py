"""Classes that nobody registered and that are of a kind all the same.

Subclasses that change nothing, and classes of libraries that are known by name, so that nothing is imported for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hawq_lightning.layers._fake_quant import FakeQuantLayer

# what a subclass, or a single module, may define without the layer being another one
HARMLESS = {
    "__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__constants__", "__repr__", "__str__",
    "__parameters__", "__orig_bases__", "__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__",
    "__annotate_func__", "__annotations_cache__", "reset_parameters", "_reset_parameters", "extra_repr", "_get_name",
}  # fmt: skip
_CALLS = {"__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__", "__setattr__"}
_FAKE_QUANT: dict[tuple[type, type], type[FakeQuantLayer[Any, Any]]] = {}


def qualified_names(module_type: type) -> Iterator[tuple[type, str]]:
    """A class and those that it comes from, each with the name that it is imported by, within its module."""
    for t in module_type.__mro__:
        yield t, f"{t.__module__}.{t.__qualname__}"


def is_parametrized(module_type: type) -> bool:
    """Whether ``torch.nn.utils.parametrize`` made the class, a new one for every layer."""
    return (
        module_type.__name__.startswith("Parametrized")
        and len(module_type.__bases__) == 1
        and any(isinstance(v, property) for v in module_type.__dict__.values())
    )


def changes(module_type: type, float_type: type) -> list[str]:
    """What a subclass defines that ``float_type`` computes with: nothing, if it is the same layer by another name.

    Args:
        module_type: a subclass.
        float_type: of a kind.
    """
    used = {name for t in float_type.__mro__ if t not in (nn.Module, object) for name in vars(t)} | _CALLS
    own = [t for t in module_type.__mro__ if t not in float_type.__mro__ and not is_parametrized(t)]
    # parameters are no attributes of the class: a property of that name puts something else in their place
    return [
        name for t in own for name, value in vars(t).items()
        if name not in HARMLESS and (name in used or (isinstance(value, property) and name in _PARAMETERS))
    ]  # fmt: skip


_PARAMETERS = {"weight", "bias", "in_proj_weight", "in_proj_bias"}


def fake_quant_class(
    module_type: type[nn.Module], fake_quant_type: type[FakeQuantLayer[Any, Any]]
) -> type[FakeQuantLayer[Any, Any]]:
    """The class that a layer takes on: the kind's own, or one made of it and the layer's class.

    Args:
        module_type: of the float layer.
        fake_quant_type: of its kind.
    """
    if fake_quant_type.__dict__.get("float_type") is module_type:
        return fake_quant_type
    key = module_type, fake_quant_type
    if key not in _FAKE_QUANT:
        attributes = {"float_type": module_type, "__module__": __name__, "__reduce_ex__": _reduce}
        _FAKE_QUANT[key] = type(f"Q{module_type.__name__}", (fake_quant_type, module_type), attributes)
    return _FAKE_QUANT[key]


def _reduce(self: FakeQuantLayer[Any, Any], protocol: int) -> tuple[Any, ...]:
    """Pickled as its float class and its kind's, both of which can be imported."""
    get_state = getattr(self, "__getstate__", lambda: self.__dict__)
    return _new, (type(self).float_type, type(self).__bases__[0]), get_state()


def _new(module_type: type[nn.Module], fake_quant_type: type[FakeQuantLayer[Any, Any]]) -> nn.Module:
    made = fake_quant_class(module_type, fake_quant_type)
    return made.__new__(made)
