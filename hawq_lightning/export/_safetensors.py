"""Safetensors files whose header has a length given beforehand and a checksum over all of the file.

``safetensors.safe_open`` reads them. They are written and read here, byte by byte, because the library writes metadata
in random order, has no room for a header of a fixed length, and checks no content: a file of strangers is bounded and
checked before anything of its size is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_bytes
from hawq_lightning._types import JsonObject

DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64", torch.float32: "F32", torch.int32: "I32",
    torch.uint32: "U32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int16: "I16", torch.uint16: "U16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
TORCH_TYPES = {name: dtype for dtype, name in DTYPES.items()}
MOST_ELEMENTS = 1 << 40
_MOST_HEADER = 1 << 24  # bytes, some hundred thousand tensors
_MOST_DIMENSIONS = 16
_NO_CHECKSUM = "0" * 64


class Spec(NamedTuple):
    """Type (``F32`` ...) and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * TORCH_TYPES[self.dtype].itemsize


def spec_of(tensor: torch.Tensor) -> Spec:
    """Type and shape."""
    return Spec(DTYPES[tensor.dtype], tuple(tensor.shape))


def header_bytes(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> int:
    """Bytes before the data of a file with these tensors, in this order, and this metadata."""
    return 8 + _aligned(len(_header(specs, metadata, _NO_CHECKSUM)))


def write(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], least_header_bytes: int = 0
) -> int:
    """Write the file, atomically, and return its size in bytes.

    Args:
        path: of the file; missing folders are made.
        tensors: in file order, wide types before narrow ones so that all are aligned; on the CPU, contiguous.
        metadata: the checksum comes into it.
        least_header_bytes: the header is filled up with spaces to so many bytes, its length included.

    Raises:
        HawqError: the file cannot be written there.
    """
    specs = {name: spec_of(t) for name, t in tensors.items()}
    length = max(header_bytes(specs, metadata), least_header_bytes) - 8
    data = b"".join(_raw(t) for t in tensors.values())
    digest = _digest(_header(specs, metadata, _NO_CHECKSUM).ljust(length), data)
    header = _header(specs, metadata, digest).ljust(length)
    write_bytes(path, b"".join([length.to_bytes(8, "little"), header, data]))
    return 8 + length + len(data)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file of any origin.

    Raises:
        HawqError: no such file, or no safetensors file.
    """
    with _refusals(path), open(path, "rb") as file:
        return _metadata(_parse(_read_header(file.read(8), file.read(_MOST_HEADER), Path(path).stat().st_size)))


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file that :func:`write` wrote: sizes and checksum are right when this returns.

    Raises:
        HawqError: no such file, no safetensors file, damaged or cut short.
    """
    with _refusals(path):
        raw = memoryview(Path(path).read_bytes())
        text = _read_header(raw[:8], raw[8 : 8 + _MOST_HEADER], len(raw))
        header, data = _parse(text), raw[8 + len(text) :]
        metadata = _metadata(header)
        checksum = metadata.pop("sha256", "")
        if not re.fullmatch("[0-9a-f]{64}", checksum) or text.count(checksum.encode()) != 1:
            raise ValueError("it has no checksum")
        if _digest(text.replace(checksum.encode(), _NO_CHECKSUM.encode()), data) != checksum:
            raise ValueError("its checksum does not match its content")
        return _tensors(header, data), metadata


class _refusals:
    """Every way in which reading goes wrong as one HawqError."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> None:
        if "\0" in str(self.path) or not self.path.is_file():
            raise HawqError(f"No packed file at {self.path}.")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, OSError, OverflowError, MemoryError, RecursionError)) and not isinstance(
            error, HawqError
        ):
            raise HawqError(f"The packed file {self.path} is corrupt, cut short or unreadable: {error}.") from error


def _read_header(length: bytes | memoryview, start: bytes | memoryview, size: int) -> bytes:
    count = int.from_bytes(length, "little")
    if size < 10 or not 2 <= count <= min(size - 8, _MOST_HEADER):
        raise ValueError(f"its header of {count} bytes does not fit a file of {size}")
    return bytes(start[:count])


def _parse(text: bytes) -> JsonObject:
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header


def _once(pairs: list[tuple[str, object]]) -> JsonObject:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return value


def _metadata(header: JsonObject) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are no texts")
    return metadata


def _tensors(header: JsonObject, data: memoryview) -> dict[str, torch.Tensor]:
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
        begin, stop = _offsets(entry)
        spec = Spec(entry["dtype"], shape_from(entry["shape"]))
        if len(entry) != 3 or spec.dtype not in TORCH_TYPES or begin != end or stop - begin != spec.nbytes:
            raise ValueError(f"{name!r} does not fit its place in the file")
        end = stop
        if end > len(data):
            break
        flat = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8) if end > begin else torch.empty(0)
        if spec.dtype == "BOOL" and bool((flat > 1).any()):
            raise ValueError(f"{name!r} holds other values than true and false")
        dtype = TORCH_TYPES[spec.dtype]
        tensors[name] = flat.view(dtype).reshape(spec.shape) if end > begin else torch.empty(spec.shape, dtype=dtype)
    if end != len(data):
        raise ValueError(f"its tensors take {end} bytes, and it holds {len(data)}")
    return tensors


def _offsets(entry: object) -> tuple[int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError("an entry of its header is no tensor")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not isinstance(entry["dtype"], str):
        raise ValueError("an entry of its header is no tensor")
    return size_from(offsets[0]), size_from(offsets[1])


def shape_from(values: object) -> tuple[int, ...]:
    """A shape out of JSON, bounded.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        raise ValueError(f"{str(values)[:40]} is no shape")
    shape = tuple(map(size_from, values))
    size_from(math.prod(shape))
    return shape


def size_from(value: object) -> int:
    """A number of elements or bytes out of JSON, bounded.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or not 0 <= value < MOST_ELEMENTS:
        raise ValueError(f"{str(value)[:40]} is no size")
    return value


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str], checksum: str) -> bytes:
    header: JsonObject = {"__metadata__": {**metadata, "sha256": checksum}}
    at = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _raw(tensor: torch.Tensor) -> bytes:
    tensor = tensor.resolve_conj().resolve_neg()  # what it says, where the memory is that of its conjugate
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _digest(header: bytes, data: bytes | memoryview) -> str:
    digest = hashlib.sha256(header)
    digest.update(data)
    return digest.hexdigest()


def _aligned(length: int) -> int:
    return -(-length // 8) * 8
