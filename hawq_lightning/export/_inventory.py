"""What a model holds, as the packed file sees it: sites, the rest, and whether a file fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._float_rest import Owned, plain
from hawq_lightning._float_rest import rest_of as all_the_rest
from hawq_lightning._plan import PlanSite
from hawq_lightning._site_table import Site
from hawq_lightning.export._contents import PackedFile
from hawq_lightning.export._safetensors import DTYPES
from hawq_lightning.layers import (
    OperandReader,
    WeightReader,
    find_kind,
    is_result,
    operand_readers,
    readers_of,
    split_operand,
)
from hawq_lightning.quantization import IntegerBias, Quantizer


def readers_by_name(model: nn.Module) -> dict[str, WeightReader]:
    """Every weight that a layer reads, under all names that its layer has."""
    readers: dict[str, WeightReader] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if find_kind(module) is not None:
            readers |= readers_of(plain(name), module)
    return readers


def operands_by_name(model: nn.Module) -> dict[str, OperandReader]:
    """Everything that attention may read through quantizers, under all names that its module has."""
    modules = model.named_modules(remove_duplicate=False)
    return {x.name: x for name, module in modules for x in operand_readers(plain(name), module)}


def weight_of(site: Site | PlanSite, readers: Mapping[str, WeightReader]) -> WeightReader | None:
    """The first reader of a weight site, checked against the site; ``None`` for an activation site.

    Raises:
        HawqError: the site is another model's, or its weight has a type that the file cannot hold.
    """
    if missing := [n for n in site.layers if n not in readers and not split_operand(n) and not is_result(n)]:
        raise HawqError(f"Site {site.name!r} was made for another model: this one has no layer {missing[0]!r}.")
    if site.kind != "weight":
        return None
    reader = readers[site.layers[0]]
    if tuple(reader.weight.shape) != tuple(site.shape):
        raise HawqError(
            f"Site {site.name!r} has shape {list(site.shape)}; the model's weight has {list(reader.weight.shape)}."
        )
    _check_type(site.name, reader.weight)
    return reader


def rest_to_store(
    model: nn.Module, sites: Iterable[Site | PlanSite], tensors_alone: bool = False
) -> dict[tuple[str, ...], torch.Tensor]:
    """All keys of each tensor that is stored as it is -> the tensor.

    Args:
        model: float or with fake-quant layers.
        sites: whose weights are stored as codes.
        tensors_alone: pass over what is no tensor, such as extra state: nothing is packed.

    Raises:
        HawqError: one has a type that the file cannot hold.
    """
    rest = dict(rest_of(model, owned_by(sites, readers_by_name(model)), tensors_alone))
    for keys, tensor in rest.items():
        _check_type(keys[0], tensor)
    return rest


def _check_type(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise HawqError(f"{name!r} has type {tensor.dtype}, which the packed file cannot hold.")


def owned_by(sites: Iterable[Site | PlanSite], readers: Mapping[str, WeightReader]) -> Owned:
    """The parameters that weight sites store as codes."""
    names = {n for s in sites if s.kind == "weight" for n in s.layers}
    return {(id(holder), name) for holder, name in (readers[n].holder for n in names if n in readers)}


def rest_of(
    model: nn.Module, owned: Owned, tensors_alone: bool = False
) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Keys and tensor of all that a file stores as it is, see :func:`hawq_lightning._float_rest.rest_of`.

    Args:
        model: float or with fake-quant layers.
        owned: parameters that are stored as codes.
        tensors_alone: pass over what is no tensor.

    Raises:
        HawqError: the state holds something that is no tensor.
    """
    for keys, value in all_the_rest(model, owned, lambda module: isinstance(module, (Quantizer, IntegerBias))):
        if isinstance(value, torch.Tensor):
            yield keys, value
        elif not tensors_alone:
            raise HawqError(
                f"The model's state holds {keys[0]!r}, a {type(value).__name__}; only tensors can be packed."
            )


@dataclass(frozen=True)
class Renaming:
    """Names in the file -> names in the model."""

    drop: str
    add: str

    def __call__(self, name: str) -> str:
        """The model's name for the file's ``name``."""
        root = self.drop.rstrip(".")
        if root and name.startswith(f"{root}:"):  # a result of what was wrapped
            name = self.drop + name[len(root) :]
        inner = name.removeprefix(self.drop)
        return self.add.rstrip(".") + inner if inner.startswith(":") else self.add + inner

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
    file: PackedFile,
    readers: Mapping[str, WeightReader | OperandReader],
    targets: Mapping[tuple[str, ...], torch.Tensor],
    stored: Mapping[tuple[str, ...], torch.Tensor],
    rename: Renaming,
) -> None:
    """Raise HawqError, naming what differs, unless the file was made from such a model."""
    unknown, reshaped = [], []
    for held in file.sites:
        site = held.site
        layers = [readers[rename(n)] for n in site.layers if rename(n) in readers]
        if len(layers) < len(site.layers):
            unknown.append(site.name)
        elif site.kind == "weight":
            of_weight = [x for x in layers if isinstance(x, WeightReader)]
            weights = {x.key: x.weight for x in of_weight}
            shapes, types = {tuple(w.shape) for w in weights.values()}, {DTYPES.get(w.dtype) for w in weights.values()}
            if shapes != {site.shape} or of_weight[0].channel_axis != held.axis:
                reshaped.append(f"{site.name} {list(site.shape)} against {list(shapes.pop())}")
            elif types != {held.dtype}:
                reshaped.append(f"{site.name} {held.dtype} against {types.pop()}")
            elif len(weights) != 1:
                reshaped.append(f"{site.name} is one weight shared by {', '.join(site.layers)}")
    for keys, tensor in stored.items():
        if keys not in targets:
            unknown.append(keys[0])
        elif targets[keys].shape != tensor.shape or targets[keys].dtype != tensor.dtype:
            have, want = (f"{list(t.shape)} {DTYPES.get(t.dtype, t.dtype)}" for t in (targets[keys], tensor))
            reshaped.append(f"{keys[0]} {want} against {have}")
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
