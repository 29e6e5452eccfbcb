"""What a model holds, as the packed file sees it: sites, the rest, and whether a file fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import PlanSite
from hawq_lightning._site_table import Site
from hawq_lightning.export._index import DTYPES, Index, IndexedSite, IndexedTensor
from hawq_lightning.layers import channel_axis, find_kind
from hawq_lightning.quantization import Quantizer


def index_of(model: nn.Module, sites: Sequence[Site | PlanSite]) -> Index:
    """The index of the file that this model and these sites make.

    Raises:
        HawqError: the sites are another model's, or the model holds something that the file cannot.
    """
    modules = {plain(n): m for n, m in model.named_modules(remove_duplicate=False)}
    weights, activations = [], []
    for site in sites:
        if missing := [n for n in site.layers if n not in modules]:
            raise HawqError(f"Site {site.name!r} was made for another model: this one has no layer {missing[0]!r}.")
        if site.kind == "weight":
            layer = modules[site.layers[0]]
            shape = tuple(getattr(layer, "weight", torch.empty(0)).shape)
            if shape != tuple(site.shape):
                raise HawqError(
                    f"Site {site.name!r} has shape {list(site.shape)}; the model's weight has {list(shape)}."
                )
            if layer.weight.dtype not in DTYPES:
                raise HawqError(f"{site.name!r} has type {layer.weight.dtype}, which the packed file cannot hold.")
            kind = DTYPES[layer.weight.dtype]  # type: ignore[index]
            weights.append(IndexedSite(site.name, tuple(site.layers), shape, channel_axis(layer), kind))
        else:
            activations.append(IndexedSite(site.name, tuple(site.layers), tuple(site.shape), site.numel))
    if not weights:
        raise HawqError("There is no weight site to pack.")
    rest = []
    for keys, tensor in rest_of(model, owning(model, weights)):
        if tensor.dtype not in DTYPES:
            raise HawqError(f"{keys[0]!r} has type {tensor.dtype}, which the packed file cannot hold.")
        rest.append(IndexedTensor(keys, tuple(tensor.shape), DTYPES[tensor.dtype]))
    return Index(tuple(weights), tuple(activations), tuple(rest))


def owning(model: nn.Module, weights: Iterable[IndexedSite]) -> set[int]:
    """Ids of the layers whose weights are stored as codes."""
    names = {n for w in weights for n in w.layers}
    return {id(m) for n, m in model.named_modules(remove_duplicate=False) if plain(n) in names}


def rest_of(model: nn.Module, owned: set[int]) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Keys and tensor of all in the state dict that is neither a quantizer's nor the weight of an ``owned`` layer.

    What a module names in its attribute ``training_only`` (an auxiliary head) is no part of the deployed network.
    """
    modules = {plain(n): m for n, m in model.named_modules(remove_duplicate=False)}
    skipped = tuple(f"{n}.{part}.".lstrip(".") for n, m in modules.items() for part in getattr(m, "training_only", ()))
    groups: dict[int, tuple[list[str], torch.Tensor]] = {}
    for raw, tensor in model.state_dict(keep_vars=True).items():
        key = plain(raw)
        owner = modules.get(key.rpartition(".")[0])
        if (
            key.startswith(skipped)
            or isinstance(owner, Quantizer)
            or (key.rpartition(".")[2] == "weight" and id(owner) in owned)
        ):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise HawqError(f"The model's state holds {key!r}, a {type(tensor).__name__}; only tensors can be packed.")
        groups.setdefault(id(tensor), ([], tensor))[0].append(key)
    return ((tuple(keys), tensor) for keys, tensor in groups.values())


@dataclass(frozen=True)
class Renaming:
    """Names in the file -> names in the model."""

    drop: str
    add: str

    def __call__(self, name: str) -> str:
        """The model's name for the file's ``name``."""
        return self.add + name.removeprefix(self.drop)

    def keys(self, stored: Iterable[str]) -> tuple[str, ...]:
        """The model's keys for the file's; what belongs to a wrapper alone falls away."""
        return tuple(self(key) for key in stored if key.startswith(self.drop))

    def inside(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Those of the model's keys that the file can know about."""
        return tuple(key for key in keys if key.startswith(self.add))


def renaming(first: str, layers: Sequence[str]) -> Renaming:
    """What is stored for ``task.net`` fits ``net`` and the other way round: the prefix that has to go, or to come.

    Args:
        first: a layer's name as it is stored.
        layers: names of the model's layers.
    """
    if first in layers:
        return Renaming("", "")
    if inner := [name for name in layers if name and first.endswith("." + name)]:
        return Renaming(first[: -len(max(inner, key=len))], "")
    if outer := [name for name in layers if name.endswith("." + first)]:
        return Renaming("", min(outer, key=len)[: -len(first)])
    return Renaming("", "")


def check_same(
    index: Index,
    modules: Mapping[str, nn.Module],
    targets: Mapping[tuple[str, ...], torch.Tensor],
    stored: Mapping[tuple[str, ...], IndexedTensor],
    rename: Renaming,
) -> None:
    """Raise HawqError, naming what differs, unless a file with this index was made from such a model."""
    unknown, reshaped = [], []
    for site in (*index.weights, *index.activations):
        found = [modules.get(rename(n)) for n in site.layers]
        if any(m is None or find_kind(m) is None for m in found):
            unknown.append(site.name)
        elif site in index.weights:
            shapes = {tuple(m.weight.shape) for m in found}  # type: ignore[union-attr, arg-type]
            if shapes != {site.shape} or channel_axis(found[0]) != site.extra:  # type: ignore[arg-type]
                reshaped.append(f"{site.name} {list(site.shape)} against {list(shapes.pop())}")
            elif (kinds := {DTYPES.get(m.weight.dtype) for m in found}) != {site.dtype}:  # type: ignore[union-attr, arg-type]
                reshaped.append(f"{site.name} {site.dtype} against {kinds.pop()}")
            elif len({id(m.weight) for m in found}) != 1:  # type: ignore[union-attr]
                reshaped.append(f"{site.name} is one weight shared by {', '.join(site.layers)}")
    for keys, want in stored.items():
        if keys not in targets:
            unknown.append(want.keys[0])
        elif tuple(targets[keys].shape) != want.shape or DTYPES.get(targets[keys].dtype) != want.dtype:
            reshaped.append(
                f"{want.keys[0]} {list(want.shape)} {want.dtype} against {list(targets[keys].shape)} "
                f"{DTYPES.get(targets[keys].dtype, targets[keys].dtype)}"
            )
    missing = [keys[0] for keys in targets if keys not in stored]
    parts = [
        f"{what}: {', '.join(which[:4])}{f' and {len(which) - 4} more' if len(which) > 4 else ''}"
        for what, which in (
            ("only in the file", unknown),
            ("only in the model", missing),
            ("other shapes or types", reshaped),
        )
        if which
    ]
    if parts:
        raise HawqError("This packed file was made for another model; sites differ: " + "; ".join(parts) + ".")


def plain(name: str) -> str:
    """The name without a compiled wrapper's parts: it is the same module."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
