"""What a packed file holds, in order: names, shapes and types. It depends on the model only, never on the bits."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hawq_lightning._errors import HawqError

DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64", torch.float32: "F32", torch.int32: "I32",
    torch.uint32: "U32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int16: "I16", torch.uint16: "U16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TORCH_TYPES = {name: dtype for dtype, name in DTYPES.items()}
_MOST_ELEMENTS = 1 << 40
_MOST_INDEX = 1 << 26  # bytes of index text, some hundred thousand tensors


@dataclass(frozen=True)
class IndexedSite:
    """A site as the index names it: a weight with its channel axis, or an activation with its elements an image.

    ``dtype`` is that of the weight in the saved model; codes and scales give its values in no other.
    """

    name: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    extra: int
    dtype: str = "F32"

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Scales of the weight."""
        return self.shape[self.extra]


@dataclass(frozen=True)
class IndexedTensor:
    """A tensor stored as it is: all its state-dict keys, its shape and the name of its type (``F32`` ...)."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Index:
    """What the file holds, in order. It depends on the model only, never on the bits."""

    weights: tuple[IndexedSite, ...]
    activations: tuple[IndexedSite, ...]
    rest: tuple[IndexedTensor, ...]

    def blobs(self, code_bytes: int, extras: Mapping[str, int] | None = None) -> list[tuple[str, str, int]]:
        """Name, type and elements of every blob, in file order (safetensors: wide types first, then by name).

        Args:
            code_bytes: size of the codes.
            extras: float32 elements of the blobs that only some quantizers need: ``basis`` (codebooks, b numbers a
                channel), ``zeros`` (affine codes with a zero point, one number a site) and ``act_basis`` (activations
                on a learned basis, 4 numbers a site whatever its bits).
        """
        sites, reads = len(self.weights), len(self.activations)
        sizes = {
            "codes": ("U8", code_bytes),
            "scales": ("F32", sum(w.channels for w in self.weights)),
            "bits": ("U8", sites),
            "kinds": ("U8", sites),
        }
        if reads:
            sizes |= {"act_bits": ("U8", reads), "act_scales": ("F32", reads), "act_zeros": ("F32", reads)}
        sizes |= {name: ("F32", count) for name, count in (extras or {}).items()}
        for dtype in {t.dtype for t in self.rest}:
            sizes[f"rest_{dtype}"] = (dtype, sum(t.numel for t in self.rest if t.dtype == dtype))
        return [(name, *sizes[name]) for name in sorted(sizes, key=lambda n: (-_RANK[sizes[n][0]], n))]

    def encode(self) -> str:
        """Compressed text."""
        sites = [
            [[s.name, list(s.layers), list(s.shape), s.extra, *([] if s.dtype == "F32" else [s.dtype])] for s in part]
            for part in (self.weights, self.activations)
        ]
        rest = [[list(t.keys), list(t.shape), t.dtype] for t in self.rest]
        text = json.dumps([*sites, rest], separators=(",", ":"))
        return base64.b64encode(zlib.compress(text.encode(), 9)).decode()

    @classmethod
    def decode(cls, text: str) -> Index:
        """Read what :meth:`encode` wrote; everything is checked and bounded.

        Raises:
            HawqError: damaged.
        """
        try:
            inflater = zlib.decompressobj()
            raw = inflater.decompress(base64.b64decode(text, validate=True), _MOST_INDEX)
            if not inflater.eof or inflater.unused_data:
                raise ValueError("its index is too long or cut short")
            weights, activations, rest = json.loads(raw)
            index = cls(
                tuple(
                    IndexedSite(_text(n), _texts(ls), _shape(s), _whole(x), *_type(d)) for n, ls, s, x, *d in weights
                ),
                tuple(IndexedSite(_text(n), _texts(ls), _shape(s), _whole(x)) for n, ls, s, x in activations),
                tuple(IndexedTensor(_texts(k), _shape(s), _dtype(d)) for k, s, d in rest),
            )
            if not index.weights or any(w.extra >= len(w.shape) for w in index.weights):
                raise ValueError("a weight without channels")
            names = [s.name for s in (*index.weights, *index.activations)]
            keys = [k for t in index.rest for k in t.keys]
            if len(set(names)) != len(names) or len(set(keys)) != len(keys):
                raise ValueError("a name occurs twice")
            return index
        except (ValueError, TypeError, zlib.error, RecursionError, UnicodeDecodeError) as error:
            raise HawqError(f"The packed file is corrupt: {type(error).__name__} in its index: {error}.") from error


# alignment classes of the safetensors writer; it sorts by type, widest first
_RANK = {d: r for r, d in enumerate(
    ["BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64"])}  # fmt: skip


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a name")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{values!r} is not a list of names")
    return tuple(_text(v) for v in values)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST_ELEMENTS:
        raise ValueError(f"{value!r} is not a size")
    return value


def _shape(values: Any) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) > 16:
        raise ValueError(f"{values!r} is not a shape")
    shape = tuple(_whole(v) for v in values)
    _whole(math.prod(shape))
    return shape


def _type(values: Any) -> tuple[str, ...]:
    if len(values) > 1:
        raise ValueError(f"{values!r} are too many")
    return tuple(_dtype(v) for v in values)


def _dtype(value: Any) -> str:
    if value not in TORCH_TYPES:
        raise ValueError(f"{value!r} is not a type")
    return value
