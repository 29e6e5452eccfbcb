"""Weights that a hook computes before every call: old-style weight and spectral norm, and pruning."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_Hook = WeightNorm | SpectralNorm | BasePruningMethod
_STATE_HOOKS = ("_load_state_dict_pre_hooks", "_state_dict_hooks")


@torch.no_grad()
def renew_weight(layer: nn.Module) -> None:
    """Compute weights from what they are made of, which ``load_state_dict`` may have changed since the last call."""
    for name, hook in _hooks(layer):
        if isinstance(hook, SpectralNorm):
            setattr(layer, name, hook.compute_weight(layer, do_power_iteration=False))
        else:
            hook(layer, None)


def made_by_hook(module: nn.Module, name: str) -> tuple[str, ...]:
    """Parameters and buffers of a module that a hook makes its weight of; none where there is no such hook.

    Args:
        module: that has the weight.
        name: of the weight.
    """
    names = []
    for weight, hook in _hooks(module):
        if weight == name:
            ends = ("g", "v") if isinstance(hook, WeightNorm) else ("orig", "mask", "u", "v")
            names += [f"{name}_{end}" for end in ends]
    held = {**module._parameters, **module._buffers}
    return tuple(n for n in names if n in held)


def bake_hooks(module: nn.Module) -> None:
    """Make parameters of the weights that hooks compute, and drop the hooks with what they compute from, in place."""
    renew_weight(module)
    hooks = [*_hooks(module)]
    for name, _ in hooks:
        for part in made_by_hook(module, name):
            delattr(module, part)
        value = getattr(module, name).detach()
        module.__dict__.pop(name, None)
        setattr(module, name, nn.Parameter(value))
    ours = {id(hook) for _, hook in hooks}
    for key in [k for k, hook in module._forward_pre_hooks.items() if id(hook) in ours]:
        del module._forward_pre_hooks[key]
    for kept in _STATE_HOOKS if hooks else ():  # spectral norm's, which look for what is gone
        held = getattr(module, kept)
        for key in [k for k, hook in held.items() if id(getattr(getattr(hook, "hook", hook), "fn", None)) in ours]:
            del held[key]


def _hooks(module: nn.Module) -> Iterator[tuple[str, _Hook]]:
    """Name of the weight and hook, of each; those whose weight is no parameter."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            yield hook.name, hook
        elif isinstance(hook, BasePruningMethod):
            yield hook._tensor_name, hook
