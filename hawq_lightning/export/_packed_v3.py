"""Packed files of release 0.1.0, versions 1 to 3: few blobs in a fixed order, and a compressed index of their parts."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from hawq_lightning._plan import PlanSite, check_choice
from hawq_lightning._types import JsonObject
from hawq_lightning.export._bits import packed_bytes, unpack
from hawq_lightning.export._contents import FORMAT, PackedFile, StoredSite
from hawq_lightning.export._safetensors import TORCH_TYPES, shape_from, size_from
from hawq_lightning.quantization import Storage

VERSIONS = ("1", "2", "3")
_CODE_FORMATS = ("affine", "midrise", "codebook")  # stored as 0, 1 and 2
_BASIS = 4  # numbers of an activation's basis
_INFLATION = 50  # the index is never longer than so many times its compressed text
_LEAST_INDEX = 1 << 16


class _Index(NamedTuple):
    weights: list[list[object]]  # name, layers, shape, channel axis, type unless F32
    activations: list[list[object]]  # name, layers, shape, elements an image
    rest: list[list[object]]  # keys, shape, type


def read(path: str | Path) -> PackedFile:
    """Sites and everything else, quantizers' storage unchecked.

    Raises:
        ValueError: damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if set(metadata) != {"format", "version", "index", "sha256", "pad"} or metadata["pad"].strip(" "):
                raise ValueError("its metadata hold other entries than they should")
            blobs = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OverflowError, MemoryError, OSError) as error:
        raise ValueError(f"it is cut short or unreadable: {error}") from error
    if any(blob.ndim != 1 for blob in blobs.values()):
        raise ValueError("a blob has no one axis")
    if _digest(metadata, blobs) != metadata["sha256"]:
        raise ValueError("its checksum does not match its content")
    index = _Index(*json.loads(_inflated(metadata["index"])))
    parts = {name: _Parts(blob) for name, blob in blobs.items()}
    try:
        sites = [*_weights(index, parts), *_activations(index, parts)]
        rest = {}
        for keys, shape, dtype in index.rest:
            shape = shape_from(shape)
            rest[tuple(map(str, _list(keys)))] = parts[f"rest_{dtype}"].take(math.prod(shape)).reshape(shape)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{type(error).__name__} in its index: {error}") from error
    if not index.weights or any(part.left for part in parts.values()):
        raise ValueError("its blobs do not fit its index")
    return PackedFile(tuple(sites), rest)


class _Parts:
    """A blob that is taken apart from its start."""

    def __init__(self, blob: torch.Tensor) -> None:
        self.blob, self.at = blob, 0

    @property
    def left(self) -> int:
        return self.blob.numel() - self.at

    def take(self, count: int) -> torch.Tensor:
        if count > self.left:
            raise ValueError("a blob is shorter than its index says")
        self.at += count
        return self.blob[self.at - count : self.at].clone()


def _weights(index: _Index, parts: Mapping[str, _Parts]) -> Iterator[StoredSite]:
    for name, layers, shape, axis, *dtype in index.weights:
        shape, bits, number = shape_from(shape), int(parts["bits"].take(1)), int(parts["kinds"].take(1))
        if type(axis) is not int or not 0 <= axis < len(shape) or number >= len(_CODE_FORMATS):
            raise ValueError(f"{name!r} has channel axis {axis!r} and code format {number}")
        code, channels = _CODE_FORMATS[number], shape[axis]
        check_choice(str(name), "weight", bits, code)
        numel = math.prod(shape)
        codes = unpack(parts["codes"].take(packed_bytes(numel, bits)).numpy(), bits, numel).reshape(shape)
        tensors = {"scale": parts["scales"].take(channels)}
        if "zeros" in parts:
            tensors["zero_point"] = parts["zeros"].take(1).reshape(())
        if code == "codebook":
            tensors = {"basis": parts["basis"].take(channels * bits).reshape(channels, bits)}
        site = PlanSite(str(name), "weight", tuple(map(str, _list(layers))), shape, numel, bits, code)
        yield _site(site, Storage(tensors, plain=code != "codebook"), codes, axis, *map(str, dtype))


def _activations(index: _Index, parts: Mapping[str, _Parts]) -> Iterator[StoredSite]:
    for name, layers, shape, numel in index.activations:
        shape, numel = shape_from(shape), size_from(numel)
        bits = int(parts["act_bits"].take(1))
        check_choice(str(name), "activation", bits, "affine")
        facts: JsonObject = {"scale": float(parts["act_scales"].take(1))}
        facts["zero_point"] = float(parts["act_zeros"].take(1))
        basis = parts["act_basis"].take(_BASIS) if "act_basis" in parts else torch.zeros(_BASIS, dtype=torch.float32)
        learned = bool(basis.any())
        site = PlanSite(str(name), "activation", tuple(map(str, _list(layers))), shape, numel, bits, "affine")
        yield _site(site, Storage({"basis": basis} if learned else {}, facts, plain=not learned))


def _site(
    site: PlanSite, storage: Storage, codes: torch.Tensor | None = None, axis: int = 0, dtype: str = "F32"
) -> StoredSite:
    if dtype not in TORCH_TYPES or not site.layers:
        raise ValueError(f"{site.name!r} has type {dtype!r} and layers {site.layers}")
    return StoredSite(site, storage, "uniform" if storage.plain else "lq_nets", codes, axis, dtype)


def _list(value: object) -> list[object]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{str(value)[:40]} is no list of names")
    return value


def _inflated(text: str) -> bytes:
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(base64.b64decode(text, validate=True), _LEAST_INDEX + _INFLATION * len(text))
    except zlib.error as error:
        raise ValueError(f"its index is damaged: {error}") from error
    if not inflater.eof or inflater.unused_data:
        raise ValueError("its index is too long or cut short")
    return raw


def _digest(metadata: Mapping[str, str], blobs: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(f"{FORMAT} {metadata['version']} {metadata['index']}".encode())
    for name in sorted(blobs):
        digest.update(f" {name} ".encode())
        digest.update(blobs[name].contiguous().view(torch.uint8).numpy().data if blobs[name].numel() else b"")
    return digest.hexdigest()
