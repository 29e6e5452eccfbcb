"""The two products of attention, scores and weighted values, wherever a module's forward makes them.

They have no weight: queries, keys, probabilities and values are what they read. While a module is called, functions are
seen before they run, however the forward writes them: fused attention is made of its parts then.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves

from hawq_lightning.layers._held import AttentionQuantizers

OPERANDS = ("query", "key", "probabilities", "value")
SCORES, VALUES = ("query", "key"), ("probabilities", "value")
See = Callable[[str, torch.Tensor], torch.Tensor]
Made = Callable[[tuple[str, str], torch.Tensor, int], None]
_Function = Callable[..., Any]

# product -> positions and keywords of its factors, left and right
_FACTORS: dict[_Function, tuple[tuple[int, str], tuple[int, str]]] = {
    torch.matmul: ((0, "input"), (1, "other")), torch.Tensor.matmul: ((0, "self"), (1, "other")),
    torch.Tensor.__matmul__: ((0, "self"), (1, "other")), torch.Tensor.__rmatmul__: ((1, "other"), (0, "self")),
    torch.bmm: ((0, "input"), (1, "mat2")), torch.Tensor.bmm: ((0, "self"), (1, "mat2")),
    torch.baddbmm: ((1, "batch1"), (2, "batch2")), torch.Tensor.baddbmm: ((1, "batch1"), (2, "batch2")),
    torch.einsum: ((1, "operands"), (2, "operands")),
}  # fmt: skip
PRODUCT_NAMES = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
FUSED_NAME = "scaled_dot_product_attention"


class _Active(threading.local):
    def __init__(self) -> None:
        self.modes: list[AttentionProducts] = []


_ACTIVE = _Active()


class AttentionProducts(TorchFunctionMode):
    """Shows what the products of attention read, inside of the innermost module that has such a mode.

    A product of two tensors of three axes or more, neither of them a parameter, is one of attention: of probabilities
    and values if one of them was made by a softmax, else of queries and keys.

    Args:
        see: ``see(operand, tensor)`` gives what is read in the tensor's place.
        wanted: whether anybody looks; else fused attention stays as it is.
        made: ``made(operands, product, multiply_accumulates)`` is told afterwards.
    """

    def __init__(self, see: See, wanted: Callable[[], bool] = lambda: True, made: Made | None = None) -> None:
        super().__init__()
        self._see, self._wanted, self._made = see, wanted, made
        self._by_softmax: dict[int, weakref.ref[torch.Tensor]] = {}

    def __enter__(self) -> AttentionProducts:
        _ACTIVE.modes.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        _ACTIVE.modes.remove(self)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        self, func: _Function, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _ACTIVE.modes[-1] is self and self._wanted():
            if func is F.scaled_dot_product_attention:
                return self._attend(*args, **kwargs)
            if func in _FACTORS and (read := self._factors(func, args, kwargs)):
                return self._product(func, args, kwargs, *read)
        out = func(*args, **kwargs)
        self._follow(func, args, kwargs, out)
        return out

    def _factors(
        self, func: _Function, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if func is torch.einsum and (len(args) != 3 or not isinstance(args[0], str)):
            return None
        read = [args[at] if at < len(args) else kwargs.get(keyword) for at, keyword in _FACTORS[func]]
        left, right = read
        return (left, right) if _is_data(left) and _is_data(right) else None  # type: ignore[return-value]

    def _product(
        self, func: _Function, args: Sequence[Any], kwargs: dict[str, Any], left: torch.Tensor, right: torch.Tensor
    ) -> Any:
        names = SCORES
        if self._is_soft(left) or self._is_soft(right):
            names = VALUES if self._is_soft(left) else VALUES[::-1]
        args, kwargs = list(args), dict(kwargs)
        for (at, keyword), name, x in zip(_FACTORS[func], names, (left, right)):
            if at < len(args):
                args[at] = self._see(name, x)
            else:
                kwargs[keyword] = self._see(name, x)
        out = func(*args, **kwargs)
        self._tell(names, out, _terms(args[0], left) if func is torch.einsum else left.shape[-1])
        return out

    def _tell(self, names: tuple[str, ...], out: torch.Tensor, terms: int) -> None:
        if self._made is not None:
            self._made((names[0], names[1]), out, out.numel() * terms)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """As ``F.scaled_dot_product_attention``."""
        q, k, v = (self._see(n, x) for n, x in zip(("query", "key", "value"), (query, key, value)))
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        self._tell(SCORES, scores, q.shape[-1])
        if is_causal:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            p = scores.masked_fill(~attn_mask, -torch.inf).softmax(-1)
            if not is_causal:  # a query may see no key at all
                p = p.masked_fill(~attn_mask.any(-1, keepdim=True), 0.0)
        else:
            p = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
        out = self._see("probabilities", F.dropout(p, dropout_p, dropout_p > 0)) @ v
        self._tell(VALUES, out, p.shape[-1])
        return out

    def _is_soft(self, x: torch.Tensor) -> bool:
        held = self._by_softmax.get(id(x))
        return held is not None and held() is x

    def _follow(self, func: _Function, args: object, kwargs: object, out: object) -> None:
        """Note what was made of a softmax, other than a product."""
        if func in _FACTORS or func is F.scaled_dot_product_attention:
            return
        soft = "softmax" in getattr(func, "__name__", "")
        if soft or any(isinstance(t, torch.Tensor) and self._is_soft(t) for t in tree_leaves((args, kwargs))):
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self._by_softmax[id(tensor)] = weakref.ref(tensor)


def _is_data(x: object) -> bool:
    if not isinstance(x, torch.Tensor) or isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter):
        return False
    return x.ndim > 2 and x.is_floating_point()


def _terms(equation: str, left: torch.Tensor) -> int:
    """Terms of each sum of an ``einsum`` of two factors."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    before, dots, after = first.partition("...")
    sizes = dict(zip(before, left.shape)) | (dict(zip(after[::-1], reversed(left.shape))) if dots else {})
    kept = output if arrow else [c for c in first + second if (first + second).count(c) == 1]
    return torch.Size(n for c, n in sizes.items() if c in second and c not in kept).numel()


HOLDER = "attention_quantizers"


def holder_of(module: nn.Module) -> AttentionQuantizers | None:
    """The quantizers of a module's attention, if it has some."""
    held = None if isinstance(module, torch.jit.ScriptModule) else module._modules.get(HOLDER)
    return held if isinstance(held, AttentionQuantizers) else None


def attention_is_on(module: nn.Module) -> bool:
    """Whether any of these quantizers is on, or what stands in its place in a deployed network."""
    holder = holder_of(module)
    return holder is not None and any(map(is_on, holder.values()))


def is_on(quantizer: Any) -> bool:
    """Also of what stands in its place in a deployed network, which is always on."""
    return bool(getattr(quantizer, "bits", True)) and not getattr(quantizer, "fake_quant_disabled", False)


def put_holder(module: nn.Module, holder: AttentionQuantizers) -> None:
    """Let a module's attention read through quantizers, in place; its class stays."""
    if holder_of(module) is None:
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)
    module._modules[HOLDER] = holder


def drop_holder(module: nn.Module) -> None:
    """Undo :func:`put_holder`."""
    if holder_of(module) is not None:
        del module._modules[HOLDER]
        for hooks, ours in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
            for key in [k for k, hook in hooks.items() if hook is ours]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


_PRODUCT = ""  # in an operand's place: visitors of products
_VISITS: weakref.WeakKeyDictionary[nn.Module, list[tuple[str, Any]]] = weakref.WeakKeyDictionary()


# runs as it is written inside of what is compiled, which would not know of the mode
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _enter(module: nn.Module, args: object) -> None:
    def see(operand: str, x: torch.Tensor) -> torch.Tensor:
        for name, visit in list(_VISITS.get(module, ())):
            x = visit(x) if name == operand else x
        holder = holder_of(module)
        return x if holder is None else holder[operand](x)

    def wanted() -> bool:
        return bool(_VISITS.get(module)) or any(map(_learns_or_is_on, holder_values(module)))

    def made(operands: tuple[str, str], product: torch.Tensor, macs: int) -> None:
        for name, tell in list(_VISITS.get(module, ())):
            if name == _PRODUCT:
                tell(operands, product, macs)

    AttentionProducts(see, wanted, made).__enter__()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _leave(module: nn.Module, args: object, output: object) -> None:
    if _ACTIVE.modes:
        _ACTIVE.modes[-1].__exit__(None, None, None)


def holder_values(module: nn.Module) -> list[nn.Module]:
    """The quantizers, where there are some."""
    holder = holder_of(module)
    return [] if holder is None else list(holder.values())


def _learns_or_is_on(quantizer: nn.Module) -> bool:
    """DistributedDataParallel wants gradients of learned steps that are off, too."""
    return is_on(quantizer) or (quantizer.training and next(quantizer.parameters(), None) is not None)


def leave_modes(left: Sequence[TorchFunctionMode]) -> None:
    """Take modes off torch's stack, whatever was put on it since.

    Args:
        left: modes that nobody will leave any more.
    """
    above = []
    for _ in range(len(_get_current_function_mode_stack())):
        if (mode := _pop_mode()) not in left:
            above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)


def forget_products() -> None:
    """Leave modules whose forward was cut off by an exception that hooks are not told of (``BaseException``)."""
    left, _ACTIVE.modes[:] = [*_ACTIVE.modes], []
    if left:
        leave_modes(left)


class Visited:
    """A visitor of one operand, or of the products, of a module's attention until it is removed.

    Args:
        module: whose attention it is.
        visit: gives what is read in a tensor's place; or is told of each product, as by :class:`AttentionProducts`.
        operand: one of :data:`OPERANDS`, or nothing for products.
    """

    def __init__(
        self, module: nn.Module, visit: Callable[[torch.Tensor], torch.Tensor] | Made, operand: str = ""
    ) -> None:
        self._module, self._entry = module, (operand, visit)
        self._hooks = []
        if holder_of(module) is None and not _VISITS.get(module):
            self._hooks = [
                module.register_forward_pre_hook(_enter), module.register_forward_hook(_leave, always_call=True)
            ]  # fmt: skip
        _VISITS.setdefault(module, []).append(self._entry)

    def remove(self) -> None:
        """Detach."""
        entries = _VISITS.get(self._module, [])
        if self._entry in entries:
            entries.remove(self._entry)
        for hook in self._hooks:
            hook.remove()
