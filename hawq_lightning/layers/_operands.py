"""What attention reads, as readers of activations beside those of layers; and which modules make attention."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hawq_lightning.layers._attention import AttentionKind
from hawq_lightning.layers._attention_products import (
    FUSED_NAME,
    OPERANDS,
    PRODUCT_NAMES,
    Made,
    Visited,
    holder_of,
)
from hawq_lightning.layers._fake_quant import layer_type
from hawq_lightning.layers._kind import find_kind

_DEPTH = 4  # functions that call functions
_MARK = ":"  # between the module's name and the operand's: no layer's name has it


@dataclass(frozen=True, eq=False)
class OperandReader:
    """What one module's attention reads as one of its factors.

    Attributes:
        name: ``<module>:<operand>``, which stands where layers have their names.
        module: that makes the products.
        operand: ``query``, ``key``, ``probabilities`` or ``value``.
    """

    name: str
    module: nn.Module
    operand: str

    def on_read(self, visit: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
        """Before each product show the factor; ``visit`` may return another."""
        visited = Visited(self.module, visit, self.operand)
        kind = find_kind(self.module)
        if not isinstance(kind, AttentionKind):
            return visited  # type: ignore[return-value]
        return _Both(visited, kind.on_read(self.module, self.name, visit))  # type: ignore[return-value]  # its forward in operations to be seen


class _Both:
    def __init__(self, *handles: Visited | RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def on_product(module: nn.Module, made: Made) -> RemovableHandle:
    """After each product of a module's attention tell its operands, the product and its multiply-accumulates."""
    return Visited(module, made)  # type: ignore[return-value]


def operand_name(module: str, operand: str) -> str:
    """What stands for an operand where layers have their names."""
    return f"{module}{_MARK}{operand}"


def split_operand(name: str) -> tuple[str, str] | None:
    """Module and operand, or ``None`` of a layer's name."""
    module, mark, operand = name.rpartition(_MARK)
    return (module, operand) if mark and operand in OPERANDS else None


def operand_readers(name: str, module: nn.Module) -> list[OperandReader]:
    """The four operands of a module's attention; nothing of a module that makes none.

    Args:
        name: of the module.
        module: any.
    """
    if not makes_attention(module) and holder_of(module) is None:
        return []
    return [OperandReader(operand_name(name, operand), module, operand) for operand in OPERANDS]


def makes_attention(module: nn.Module) -> bool:
    """Whether a module's own forward has the products of attention, as far as its code tells.

    Modules whose weights are read inside of their forward are left out: such a weight looks like an activation.
    """
    kind = find_kind(module)
    if isinstance(kind, AttentionKind):
        return True
    if isinstance(module, torch.jit.ScriptModule):  # its products cannot be intercepted
        return False
    return not (kind is not None and kind.by_contents) and _class_makes_attention(layer_type(module))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _class_makes_attention(module_type: type[nn.Module]) -> bool:
    names, products = _names_in(module_type, inspect.unwrap(module_type.forward), _DEPTH, set())
    return FUSED_NAME in names or (products and any("softmax" in name for name in names))


def _names_in(module_type: type[nn.Module], function: object, depth: int, seen: set[CodeType]) -> tuple[set[str], bool]:
    """Names that a function and what it calls use, and whether there is a product of tensors among them."""
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return set(), False
    names: set[str] = set()
    products = False
    codes = [function.__code__]
    for code in codes:
        seen.add(code)
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
        names |= {*code.co_names}
        products = products or any(i.argrepr.startswith("@") for i in dis.get_instructions(code))
    products = products or not names.isdisjoint(PRODUCT_NAMES)
    for name in [*names] if depth else []:
        called = function.__globals__.get(name, inspect.getattr_static(module_type, name, None))
        called = called.__func__ if isinstance(called, (staticmethod, classmethod)) else called
        more, product = _names_in(module_type, inspect.unwrap(called) if callable(called) else None, depth - 1, seen)
        names, products = names | more, products or product
    return names, products
