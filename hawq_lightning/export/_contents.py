"""What a packed file holds: its sites, and everything else under its own name; and the metadata that tells of it.

In a file of version 4 a weight site ``s`` is the tensor ``s.codes``, bit-packed by :func:`hawq_lightning.export.pack`,
and what its quantizer stores beside it, such as ``s.scale``. The metadata entry ``sites`` is a JSON object: for each
site its bits, a weight's shape and code format (unless affine), and what its quantizer keeps as numbers, such as the
scale of an activation. Entries are short, since small networks have many tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan, PlanSite, check_choice
from hawq_lightning._types import JsonObject
from hawq_lightning.export._bits import packed_bytes, unpack
from hawq_lightning.export._safetensors import TORCH_TYPES, Spec, shape_from, spec_of
from hawq_lightning.quantization import Storage, quantizer_named

Value = TypeVar("Value", torch.Tensor, Spec)
FORMAT = "hawq_lightning.packed"
VERSION = "4"
DESCRIPTION = (
    "Weights are integer codes of `bits` bits, one after the other, least significant bit first, row-major, stored "
    "plus 2^(bits-1). affine, unless told: (code - zero_point) * scale; midrise: (code + 1/2) * scale; codebook: bit k "
    "of the stored number is the sign of basis k. Activations: (code - zero_point) * scale. Other tensors: as in the "
    "state dict."
)
_TABLES = " table: the stored number is that of a level in the table."
_OUTLIERS = (
    " outliers: affine, or midrise up to 2 bits, but for the values at the places within blocks of 65536 weights; "
    "blocks says how many each has."
)
CODES = "codes"
_PLAIN = "uniform"  # the quantizer that reads even steps
_FIELDS = ("bits", "code", "shape", "layers", "axis", "dtype", "quantizer")
_MANY_CHANNELS = 1 << 16


@dataclass(frozen=True)
class StoredSite:
    """A site with all that its layers need to give the same numbers.

    Attributes:
        site: as in a plan; an activation with scale and zero point, and without a shape.
        storage: of its quantizer.
        quantizer: registered name of the quantizer that reads the storage.
        codes: int32, of the weight's shape; ``None`` of an activation.
        axis: channel axis of the weight.
        dtype: of the weight in the saved model; codes and scales give its values in no other.
    """

    site: PlanSite
    storage: Storage
    quantizer: str = _PLAIN
    codes: torch.Tensor | None = None
    axis: int = 0
    dtype: str = "F32"

    def checked(self) -> StoredSite:
        """Itself, after a quantizer has taken the stored state; an activation with its grid.

        Raises:
            HawqError: values that the quantizer does not have, or no such quantizer.
        """
        spec, site = quantizer_named(self.quantizer), self.site
        if site.kind == "weight":
            channels = site.shape[self.axis]
            if channels > max(site.numel, _MANY_CHANNELS):
                raise HawqError(f"{channels} channels are too many")
            quantizer = spec.weight_quantizer(channels, self.axis)
            quantizer.from_storage(site.bits, site.code, self.storage)
            quantizer.check_fits(site.shape)
            return self
        reader = spec.activation_quantizer()
        reader.from_storage(site.bits, site.code, self.storage)
        return replace(self, site=replace(site, scale=float(reader.scale), zero_point=round(float(reader.zero_point))))


@dataclass(frozen=True)
class PackedFile:
    """What a packed file holds, read and checked.

    Attributes:
        sites: weights before activations.
        rest: state-dict keys of one tensor -> the tensor, stored as it was.
        biases: layers whose biases are INT32 -> the BatchNorm that each takes in, or nothing.
    """

    sites: tuple[StoredSite, ...]
    rest: Mapping[tuple[str, ...], torch.Tensor] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[StoredSite, ...]:
        """The weight sites."""
        return tuple(s for s in self.sites if s.site.kind == "weight")

    @property
    def plan(self) -> Plan:
        """Sites with bits, code formats and activation grids; no traces and no costs."""
        names = (s.quantizer for s in self.sites if s.quantizer != _PLAIN)
        sites = tuple(s.site for s in self.sites)
        return Plan(sites, selector="packed file", quantizer=next(names, _PLAIN), biases=self.biases)

    @property
    def codes(self) -> dict[str, torch.Tensor]:
        """Weight site -> int32 codes of the weight's shape."""
        return {s.site.name: s.codes for s in self.sites if s.codes is not None}

    def __getitem__(self, name: str) -> StoredSite:
        """The site called ``name``."""
        return {s.site.name: s for s in self.sites}[name]


def metadata_of(
    sites: Mapping[str, JsonObject], rest: Mapping[tuple[str, ...], object], biases: Mapping[str, str]
) -> dict[str, str]:
    """The metadata of a file, without its checksum.

    Args:
        sites: of :func:`site_entry`.
        rest: keys of each tensor; those that one tensor has besides its first are told as aliases.
        biases: layers whose biases are INT32 -> the BatchNorm that each takes in, or nothing.
    """
    aliases = {keys[0]: keys[1:] for keys in rest if len(keys) > 1}
    codes = {str(entry.get("code", "")) for entry in sites.values()}
    more = (_TABLES if "table" in codes else "") + (_OUTLIERS if any(c.startswith("outliers") for c in codes) else "")
    metadata = {"format": FORMAT, "version": VERSION, "description": DESCRIPTION + more, "sites": _text(sites)}
    metadata |= {"aliases": _text(aliases)} if aliases else {}
    return metadata | ({"biases": _text(dict(biases))} if biases else {})


def site_entry(stored: StoredSite) -> JsonObject:
    """What the metadata say of a site; what goes without saying is left out.

    Raises:
        HawqError: its quantizer's facts have a name that is taken.
    """
    site, weight = stored.site, stored.site.kind == "weight"
    entry: JsonObject = {"bits": site.bits}
    entry |= {} if site.code == "affine" else {"code": site.code}
    entry |= {"shape": site.shape} if weight else {}
    entry |= {} if site.layers == _layers(site.name) else {"layers": site.layers}
    entry |= {"axis": stored.axis} if stored.axis else {}
    entry |= {} if stored.dtype == "F32" else {"dtype": stored.dtype}
    entry |= {} if stored.quantizer == _PLAIN else {"quantizer": stored.quantizer}
    if taken := sorted(set(_FIELDS) & set(stored.storage.facts)):
        raise HawqError(
            f"Quantizer {stored.quantizer!r} stores a fact called {taken[0]!r}, which the file uses itself."
        )
    return entry | stored.storage.facts


def ordered(tensors: Mapping[str, Value], rest: Mapping[tuple[str, ...], Value]) -> dict[str, Value]:
    """All tensors of a file: wide types first, and codes last, whose sizes the bits change.

    Raises:
        HawqError: two have one name.
    """
    named: dict[str, Value] = {keys[0]: value for keys, value in rest.items()}
    if twice := sorted(set(named) & set(tensors)):
        raise HawqError(f"The model's state holds {twice[0]!r}, which is what a site's tensor is called in the file.")

    def key(item: tuple[str, Value]) -> tuple[int, bool, bool, str]:
        name, value = item
        spec = value if isinstance(value, Spec) else spec_of(value)
        return -TORCH_TYPES[spec.dtype].itemsize, name in tensors, name.endswith(f".{CODES}"), name

    named.update(tensors)
    return dict(sorted(named.items(), key=key))


def contents(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> PackedFile:
    """Sites and everything else of a file of version 4; what quantizers stored is not checked yet.

    Raises:
        ValueError: they are not what :func:`metadata_of` tells.
    """
    if set(metadata) - {"aliases", "biases"} != {"format", "version", "description", "sites"}:
        raise ValueError("its metadata hold other entries than they should")
    entries, aliases = _object(metadata["sites"]), _object(metadata.get("aliases", "{}"))
    biases = _object(metadata.get("biases", "{}"))
    if not all(isinstance(norm, str) for norm in biases.values()):
        raise ValueError("its biases name no norms")
    sites: list[StoredSite] = []
    left = dict(tensors)
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{name!r} is no site")
        sites.append(_read_site(name, entry, left))
    rest: dict[tuple[str, ...], torch.Tensor] = {}
    for name, tensor in left.items():
        others = aliases.pop(name, [])
        if not isinstance(others, list) or not all(isinstance(n, str) for n in others):
            raise ValueError(f"the aliases of {name!r} are no names")
        rest[(name, *others)] = tensor
    keys = [k for group in rest for k in group]
    if aliases or len(set(keys)) != len(keys):
        raise ValueError("its aliases do not fit its tensors")
    if not any(s.codes is not None for s in sites):
        raise ValueError("it holds no codes")
    return PackedFile(tuple(sites), rest, biases)


def _read_site(name: str, entry: JsonObject, left: dict[str, torch.Tensor]) -> StoredSite:
    packed = left.pop(f"{name}.{CODES}", None)
    kind, shape = ("weight", shape_from(entry.get("shape"))) if packed is not None else ("activation", ())
    bits, code = entry.get("bits", 0), entry.get("code", "affine")
    axis, dtype = entry.get("axis", 0), entry.get("dtype", "F32")
    layers, numel = entry.get("layers", list(_layers(name))), math.prod(shape) if packed is not None else 0
    quantizer = entry.get("quantizer", _PLAIN)
    check_choice(name, kind, bits, code)
    if not isinstance(layers, list) or not layers or not all(isinstance(n, str) for n in layers):
        raise ValueError(f"the layers of {name!r} are no names")
    if not isinstance(dtype, str) or dtype not in TORCH_TYPES or not isinstance(quantizer, str):
        raise ValueError(f"{name!r} has type {dtype!r} and quantizer {quantizer!r}")
    codes = None
    if packed is not None:
        if type(axis) is not int or not 0 <= axis < len(shape):
            raise ValueError(f"{name!r} has no channels")
        expected = packed_bytes(numel, bits)
        if packed.dtype != torch.uint8 or packed.shape != (expected,):
            raise ValueError(f"{name!r} has {packed.numel()} bytes of codes where its bits need {expected}")
        codes = unpack(packed.numpy(), bits, numel).reshape(shape)
    names = [key for key in left if key.startswith(f"{name}.") and "." not in key[len(name) + 1 :]]
    tensors = {key[len(name) + 1 :]: left.pop(key) for key in names}
    facts = {k: v for k, v in entry.items() if k not in _FIELDS}
    storage = Storage(tensors, facts, plain=quantizer == _PLAIN)
    site = PlanSite(name, kind, tuple(layers), shape, numel, bits, code)
    return StoredSite(site, storage, quantizer, codes, axis, dtype)


def _layers(name: str) -> tuple[str, ...]:
    """The one layer that most sites are named after."""
    return (name.rpartition(".")[0],)


def _text(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _object(text: str) -> JsonObject:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text[:20]!r} is no JSON object")
    return value
