"""Telling weight quantizers of the BatchNorm behind their layer, for those that fold it while training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from hawq_lightning._batchnorm import is_norm
from hawq_lightning._patterns import WRAPPERS
from hawq_lightning._site_table import Layer


def norms_to_fold(model: nn.Module, layers: Iterable[Layer]) -> dict[str, nn.Module]:
    """Layer -> the BatchNorm that it can take in; weights that several layers share have none.

    Args:
        model: of the layers.
        layers: of a plan or of a :class:`hawq_lightning.SiteTable`.
    """
    listed = tuple(layers)
    users = Counter(x.weight for x in listed)
    foldable = {x.name: x.norm for x in listed if x.norm is not None and users[x.weight] == 1}
    if not foldable:
        return {}
    plain = {".".join(p for p in n.split(".") if p not in WRAPPERS): m for n, m in model.named_modules()}
    return {name: plain[norm] for name, norm in foldable.items() if norm in plain and is_norm(plain[norm])}
