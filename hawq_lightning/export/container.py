"""The packed file's container: one safetensors file of few blobs, an index, a checksum and a fixed header length.

The header of a safetensors file is JSON text, so the number of digits in its offsets would make the file's size depend
on the bit choice in more than the codes. A padding entry takes that up: every plan of one model has the same header.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from hawq_lightning.errors import HawqError

FORMAT = "hawq_lightning.packed"
VERSION = "1"
DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64", torch.float32: "F32", torch.int32: "I32",
    torch.uint32: "U32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int16: "I16", torch.uint16: "U16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TORCH_TYPES = {name: dtype for dtype, name in DTYPES.items()}
_MOST_ELEMENTS = 1 << 40
_MOST_INDEX = 1 << 26  # bytes of index text, some hundred thousand tensors
_METADATA = {"format", "version", "index", "sha256", "pad"}


@dataclass(frozen=True)
class IndexedSite:
    """A site as the index names it: a weight with its channel axis, or an activation with its elements an image."""

    name: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    extra: int

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

    def blobs(self, code_bytes: int) -> list[tuple[str, str, int]]:
        """Name, type and elements of every blob, in file order (safetensors: wide types first, then by name)."""
        sites, reads = len(self.weights), len(self.activations)
        sizes = {
            "codes": ("U8", code_bytes),
            "scales": ("F32", sum(w.channels for w in self.weights)),
            "bits": ("U8", sites),
            "kinds": ("U8", sites),
        }
        if reads:
            sizes |= {"act_bits": ("U8", reads), "act_scales": ("F32", reads), "act_zeros": ("F32", reads)}
        for dtype in {t.dtype for t in self.rest}:
            sizes[f"rest_{dtype}"] = (dtype, sum(t.numel for t in self.rest if t.dtype == dtype))
        return [(name, *sizes[name]) for name in sorted(sizes, key=lambda n: (-_RANK[sizes[n][0]], n))]

    def encode(self) -> str:
        """Compressed text."""
        sites = [
            [[s.name, list(s.layers), list(s.shape), s.extra] for s in part]
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
                tuple(IndexedSite(_text(n), _texts(ls), _shape(s), _whole(x)) for n, ls, s, x in weights),
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


def header_bound(index: Index, code_bytes: int) -> int:
    """Bytes before the data when the codes take at most ``code_bytes`` bytes."""
    return 8 + _aligned(len(_header_text(index, code_bytes, "0" * 64, "")))


def write(path: str | Path, index: Index, blobs: Mapping[str, torch.Tensor], most_code_bytes: int) -> int:
    """Write the file, atomically, and return its size in bytes.

    Args:
        path: of the file; missing folders are made.
        index: what it holds.
        blobs: as :meth:`Index.blobs` lists them, 1-D on the CPU.
        most_code_bytes: size of the codes at 8 bits, which fixes the header's length.

    Raises:
        HawqError: the file cannot be written there.
    """
    code_bytes = blobs["codes"].numel()
    most = len(_header_text(index, most_code_bytes, "0" * 64, ""))
    encoded, digest = index.encode(), _digest(index, blobs)
    pad = " " * (most - len(_header_text(index, code_bytes, digest, "", encoded)))
    text = _header_text(index, code_bytes, digest, pad, encoded)
    raw = bytearray(safetensors.torch.save(dict(blobs), _metadata(encoded, digest, pad)))
    # the library writes metadata in random order; the same entries in a fixed one make equal files byte-equal
    length = int.from_bytes(raw[:8], "little")
    if length != _aligned(most) or json.loads(raw[8 : 8 + length]) != json.loads(text):
        raise AssertionError("safetensors laid the file out in an unforeseen way")
    raw[8 : 8 + length] = text.encode().ljust(length)
    _write_bytes(Path(path), raw)
    return len(raw)


def read(path: str | Path) -> tuple[Index, dict[str, torch.Tensor]]:
    """Index and blobs of a file. Types, sizes and checksum are right when this returns; values are not yet checked.

    Raises:
        HawqError: no such file, not a packed file, an unknown version, corrupt or cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise HawqError(f"No packed file at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise HawqError(
                    f"{path} is not a packed file of hawq_lightning (its format is {metadata.get('format')!r})."
                )
            if metadata.get("version") != VERSION:
                raise HawqError(f"{path} has version {metadata.get('version')!r}; this release reads {VERSION}.")
            if set(metadata) != _METADATA or metadata["pad"].strip(" "):
                raise HawqError(f"The packed file {path} is corrupt: its metadata holds other entries than it should.")
            index = Index.decode(metadata["index"])
            names = set(file.keys())
            if "codes" not in names:
                raise HawqError(f"The packed file {path} is corrupt: it holds no codes.")
            found = {n: (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape()) for n in names}
            wanted = {n: (d, [c]) for n, d, c in index.blobs(math.prod(found["codes"][1]))}
            if found != wanted:
                wrong = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
                raise HawqError(f"The packed file {path} is corrupt: {', '.join(wrong)} do not fit its index.")
            blobs = {n: file.get_tensor(n) for n in names}
    except (SafetensorError, OSError, OverflowError, MemoryError) as error:
        raise HawqError(f"The packed file {path} is corrupt, cut short or unreadable: {error}.") from error
    if _digest(index, blobs) != metadata["sha256"]:
        raise HawqError(f"The packed file {path} is corrupt: its checksum does not match its content.")
    return index, blobs


def _metadata(encoded: str, digest: str, pad: str) -> dict[str, str]:
    return {"format": FORMAT, "index": encoded, "pad": pad, "sha256": digest, "version": VERSION}


def _header_text(index: Index, code_bytes: int, digest: str, pad: str, encoded: str | None = None) -> str:
    header: dict[str, Any] = {"__metadata__": _metadata(encoded or index.encode(), digest, pad)}
    at = 0
    for name, dtype, count in index.blobs(code_bytes):
        end = at + count * TORCH_TYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [at, end]}
        at = end
    return json.dumps(header, separators=(",", ":"))


def _digest(index: Index, blobs: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(f"{FORMAT} {VERSION} {index.encode()}".encode())
    for name in sorted(blobs):
        digest.update(f" {name} ".encode())
        digest.update(blobs[name].contiguous().view(torch.uint8).numpy().data if blobs[name].numel() else b"")
    return digest.hexdigest()


def _aligned(length: int) -> int:
    return -(-length // 8) * 8


def _write_bytes(path: Path, data: bytes | bytearray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise HawqError(f"Cannot write {path}: {error.strerror or error}.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise HawqError(f"Cannot write {path}: {error.strerror or error}.") from error
        raise


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


def _dtype(value: Any) -> str:
    if value not in TORCH_TYPES:
        raise ValueError(f"{value!r} is not a type")
    return value
