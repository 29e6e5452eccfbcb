"""Weights that a hook computes before every call (old-style weight and spectral norm, pruning), as leaves of the graph.

The trace of such a layer is by its *effective* weight, the one that gets a quantizer, not by what that is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hawq_lightning._errors import HawqError
from hawq_lightning.layers import WeightReader


class EffectiveWeights:
    """Inside, the weight of each layer is one leaf for all calls of a pass, whatever computed it.

    Args:
        readers: site -> layer; layers whose weight is a parameter are left alone.
        offsets: site -> what is added to a computed weight.
    """

    def __init__(self, readers: Mapping[str, WeightReader], offsets: Mapping[str, torch.Tensor] | None = None) -> None:
        self._readers, self._offsets = readers, offsets or {}
        self._leaves: dict[str, torch.Tensor] = {}
        self._put_back: dict[str, Callable[[], None]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> EffectiveWeights:
        for site, reader in self._readers.items():
            if reader.recomputed:
                self._put_back[site] = reader.put_weight(reader.weight)
                self._put_back[site]()
                # the last of the hooks before a call: behind the one that computes the weight
                self._handles.append(reader.module.register_forward_pre_hook(self._hook(site, reader)))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for put_back in self._put_back.values():
            put_back()

    def __getitem__(self, site: str) -> torch.Tensor:
        """The leaf of a site, after a forward pass; of a layer that was not called one that nothing follows from."""
        reader = self._readers[site]
        if not reader.recomputed:
            return reader.weight
        if site not in self._leaves:
            return reader.weight.detach().clone().requires_grad_(True)
        return self._leaves[site]

    def _hook(self, site: str, reader: WeightReader) -> Callable[[nn.Module, object], None]:
        def replace(module: nn.Module, args: object) -> None:
            leaf = self._leaves.get(site)
            if leaf is not None and reader.weight is leaf:
                return  # a parametrization computes nothing while a tensor lies in its place
            weight = reader.weight.detach()
            if site in self._offsets:
                weight = weight + self._offsets[site]
            if leaf is None:
                leaf = self._leaves[site] = weight.clone().requires_grad_(True)
            elif not torch.equal(leaf, weight):
                raise HawqError(
                    f"The weight of {reader.name!r} changes from call to call; its trace is not defined. Exclude it."
                )
            reader.put_weight(leaf)

        return replace
