"""What a model's state holds beside the weights that are stored as codes: it stays float, whatever the plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from hawq_lightning._site_table import FloatPart, FloatTensor
from hawq_lightning._tensor_sizes import size_of
from hawq_lightning.layers import FakeQuantLayer, WeightReader, find_kind, made_by_hook, quantizer_parts

Owned = set[tuple[int, str]]
"""Id of a module and name of a parameter of its own, for each weight whose codes are stored."""
_LAZY = (nn.UninitializedParameter, nn.UninitializedBuffer)
_CHANNELWISE = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


def plain(name: str) -> str:
    """The name without a compiled wrapper's parts: it is the same module."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def rest_of(
    model: nn.Module, owned: Owned, is_quantizer: Callable[[nn.Module], bool]
) -> Iterator[tuple[tuple[str, ...], object]]:
    """All keys and the value of each thing in the state that is no quantizer's and none of the ``owned`` parameters.

    What a module names in its attribute ``training_only`` (an auxiliary head) is no part of the deployed network.

    Args:
        model: float or with fake-quant layers.
        owned: parameters that are stored as codes.
        is_quantizer: tells a quantizer, whose state follows from the plan.
    """
    modules = {plain(n): m for n, m in model.named_modules(remove_duplicate=False)}
    skipped = tuple(f"{n}.{part}.".lstrip(".") for n, m in modules.items() for part in getattr(m, "training_only", ()))
    # what codes are computed from has served
    skipped += tuple(
        f"{n}.parametrizations.{name}.".lstrip(".") for n, m in modules.items() if hasattr(m, "parametrizations")
        for name in m.parametrizations if (id(m), name) in owned
    )  # fmt: skip
    by_id = {id(m): m for m in modules.values()}
    owned = owned | {(i, part) for i, name in owned if i in by_id for part in made_by_hook(by_id[i], name)}
    groups: dict[int, tuple[list[str], object]] = {}
    for raw, value in model.state_dict(keep_vars=True).items():
        key = plain(raw)
        holder, _, name = key.rpartition(".")
        owner = modules.get(holder)
        if key.startswith(skipped) or (owner is not None and is_quantizer(owner)) or (id(owner), name) in owned:
            continue
        groups.setdefault(id(value), ([], value))[0].append(key)
    return ((tuple(keys), value) for keys, value in groups.values())


def float_tensors(
    model: nn.Module, weights: Iterable[WeightReader], floats: Sequence[FloatPart]
) -> tuple[FloatTensor, ...]:
    """Every tensor of the state that stays as it is, with its bytes and the reason.

    Args:
        model: that was looked at.
        weights: layers whose weights are sites.
        floats: modules that stay float, and why.
    """
    owned = {(id(holder), name) for holder, name in (w.holder for w in weights)}
    quantizers = quantizer_parts(model)
    reasons = {f.name: f.reason for f in floats}
    modules = {plain(n): m for n, m in model.named_modules(remove_duplicate=False)}
    out = []
    for keys, value in rest_of(model, owned, quantizers.__contains__):
        if isinstance(value, torch.Tensor) and not isinstance(value, _LAZY):
            holder = keys[0].rpartition(".")[0]
            reason = _reason(holder, modules, value, reasons)
            size, small = size_of([value]), _is_small(keys[0], value, modules.get(holder))
            out.append(FloatTensor(keys[0], size.bytes, reason, small, size.float32_bytes))
    return tuple(out)


def _reason(holder: str, modules: Mapping[str, nn.Module], value: torch.Tensor, reasons: Mapping[str, str]) -> str:
    module = modules.get(holder)
    if not isinstance(value, nn.Parameter):
        return "a buffer, no parameter"
    if holder in reasons:
        return reasons[holder]
    if module is not None and find_kind(module) is not None:
        return f"not the weight of its {_type_name(module)}"
    above = _nearest(holder, reasons)
    return reasons[above] if above is not None else "of no known kind of layer"


def _nearest(holder: str, names: Collection[str]) -> str | None:
    """The innermost of the modules around ``holder`` that is among ``names``."""
    while holder:
        holder = holder.rpartition(".")[0]
        if holder in names:
            return holder
    return None


def _type_name(module: nn.Module) -> str:
    return (module.float_type if isinstance(module, FakeQuantLayer) else type(module)).__name__


def _is_small(name: str, value: torch.Tensor, module: nn.Module | None) -> bool:
    """Whether it is a bias, a scale, a count: one number a channel, which nobody quantizes."""
    one_axis = value.numel() == max((*value.shape, 1))
    known = module is None or isinstance(module, _CHANNELWISE) or find_kind(module) is not None
    by_name = name.endswith("bias") or "norm" in type(module).__name__.lower()
    return value.ndim == 0 or (one_axis and (known or by_name))
