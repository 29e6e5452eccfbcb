"""The packed file's container: one safetensors file of few blobs, an index, a checksum and a fixed header length.

The header of a safetensors file is JSON text, so the number of digits in its offsets would make the file's size depend
on the bit choice in more than the codes. A padding entry takes that up: every plan of one model has the same header.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_bytes
from hawq_lightning.export._index import TORCH_TYPES, Index

FORMAT = "hawq_lightning.packed"
EXTRAS = {"basis": "2", "zeros": "2", "act_basis": "3"}  # blobs that readers of earlier versions do not know
VERSIONS = ("1", "2", "3")
_METADATA = {"format", "version", "index", "sha256", "pad"}


def header_bound(index: Index, code_bytes: int, extras: Mapping[str, int] | None = None) -> int:
    """Bytes before the data when codes take at most ``code_bytes`` bytes, and ``extras`` so many elements."""
    return 8 + _aligned(len(_header_text(index, code_bytes, extras or {}, "0" * 64, "")))


def write(
    path: str | Path,
    index: Index,
    blobs: Mapping[str, torch.Tensor],
    most_code_bytes: int,
    most_extras: Mapping[str, int] | None = None,
) -> int:
    """Write the file, atomically, and return its size in bytes.

    Args:
        path: of the file; missing folders are made.
        index: what it holds.
        blobs: as :meth:`Index.blobs` lists them, 1-D on the CPU.
        most_code_bytes: size of the codes at 8 bits, which fixes the header's length.
        most_extras: likewise the elements of the blobs that only some files have.

    Raises:
        HawqError: the file cannot be written there.
    """
    code_bytes = blobs["codes"].numel()
    extras = {name: blobs[name].numel() for name in EXTRAS if name in blobs}
    most = len(_header_text(index, most_code_bytes, most_extras or {}, "0" * 64, ""))
    encoded, digest = index.encode(), _digest(index, blobs)
    pad = " " * (most - len(_header_text(index, code_bytes, extras, digest, "", encoded)))
    text = _header_text(index, code_bytes, extras, digest, pad, encoded)
    raw = bytearray(safetensors.torch.save(dict(blobs), _metadata(encoded, digest, pad, _version(blobs))))
    # the library writes metadata in random order; the same entries in a fixed one make equal files byte-equal
    length = int.from_bytes(raw[:8], "little")
    if length != _aligned(most) or json.loads(raw[8 : 8 + length]) != json.loads(text):
        raise AssertionError("safetensors laid the file out in an unforeseen way")
    raw[8 : 8 + length] = text.encode().ljust(length)
    write_bytes(Path(path), raw)
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
            if metadata.get("version") not in VERSIONS:
                raise HawqError(
                    f"{path} has version {metadata.get('version')!r}; this release reads {', '.join(VERSIONS)}."
                )
            if set(metadata) != _METADATA or metadata["pad"].strip(" "):
                raise HawqError(f"The packed file {path} is corrupt: its metadata holds other entries than it should.")
            index = Index.decode(metadata["index"])
            names = set(file.keys())
            if "codes" not in names:
                raise HawqError(f"The packed file {path} is corrupt: it holds no codes.")
            found = {n: (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape()) for n in names}
            extras = {
                n: math.prod(found[n][1]) for n, since in EXTRAS.items() if n in names and metadata["version"] >= since
            }
            wanted = {n: (d, [c]) for n, d, c in index.blobs(math.prod(found["codes"][1]), extras)}
            if found != wanted:
                wrong = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
                raise HawqError(f"The packed file {path} is corrupt: {', '.join(wrong)} do not fit its index.")
            blobs = {n: file.get_tensor(n) for n in names}
    except (SafetensorError, OSError, OverflowError, MemoryError) as error:
        raise HawqError(f"The packed file {path} is corrupt, cut short or unreadable: {error}.") from error
    if _digest(index, blobs) != metadata["sha256"]:
        raise HawqError(f"The packed file {path} is corrupt: its checksum does not match its content.")
    return index, blobs


def _version(blobs: Iterable[str]) -> str:
    return max((EXTRAS[name] for name in blobs if name in EXTRAS), default="1")


def _metadata(encoded: str, digest: str, pad: str, version: str) -> dict[str, str]:
    return {"format": FORMAT, "index": encoded, "pad": pad, "sha256": digest, "version": version}


def _header_text(
    index: Index, code_bytes: int, extras: Mapping[str, int], digest: str, pad: str, encoded: str | None = None
) -> str:
    header: dict[str, Any] = {"__metadata__": _metadata(encoded or index.encode(), digest, pad, _version(extras))}
    at = 0
    for name, dtype, count in index.blobs(code_bytes, extras):
        end = at + count * TORCH_TYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [at, end]}
        at = end
    return json.dumps(header, separators=(",", ":"))


def _digest(index: Index, blobs: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(f"{FORMAT} {_version(blobs)} {index.encode()}".encode())
    for name in sorted(blobs):
        digest.update(f" {name} ".encode())
        digest.update(blobs[name].contiguous().view(torch.uint8).numpy().data if blobs[name].numel() else b"")
    return digest.hexdigest()


def _aligned(length: int) -> int:
    return -(-length // 8) * 8
