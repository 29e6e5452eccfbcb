"""Weights that a hook computes before every call: old-style weight and spectral norm, and pruning."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


@torch.no_grad()
def renew_weight(layer: nn.Module) -> None:
    """Compute ``weight`` from what it is made of, which ``load_state_dict`` may have changed since the last call."""
    if "weight" in layer._parameters:
        return
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, BasePruningMethod)):
            hook(layer, None)
        elif isinstance(hook, SpectralNorm):
            layer.weight = hook.compute_weight(layer, do_power_iteration=False)
