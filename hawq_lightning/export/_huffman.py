"""The Huffman file: a packed file whose codes have lengths by how often they occur (Han et al. 2016, section 4).

It is a safetensors file as the packed file is. A weight site ``s`` has, in the place of ``s.codes``, the code lengths
``s.lengths`` of its 2^b symbols and the ``s.stream`` of canonical codes. Where most of a weight is one symbol, as after
pruning, only the others are kept, with the number of places that each skips (``s.gaps``, Huffman-coded as well): the
relative index of section 2. The smaller of the two is taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning._types import JsonObject, Model
from hawq_lightning.export import _safetensors
from hawq_lightning.export._bits import pack, packed_bytes
from hawq_lightning.export._contents import CODES, PackedFile, StoredSite, contents, metadata_of, ordered, site_entry
from hawq_lightning.export._huffman_codes import code_lengths, decode, encode, stream_bytes
from hawq_lightning.export._inventory import rest_to_store
from hawq_lightning.export._packed import put_packed
from hawq_lightning.export._safetensors import Spec, spec_of
from hawq_lightning.export._stored import stored_sites
from hawq_lightning.quantization import plan_of, plan_with_copies

FORMAT, VERSION = "hawq_lightning.huffman", "1"
_STREAM, _LENGTHS, _GAPS, _GAP_LENGTHS = "stream", "lengths", "gaps", "gap_lengths"
_SKIPPED = "skipped"  # in the entry of a site: the symbol that is left out, and how many others there are
_FARTHEST = 255  # a longer way has stations: the skipped symbol itself


@dataclass(frozen=True)
class HuffmanSize:
    """What the file takes, known before it is written.

    Attributes:
        file_bytes: all of it.
        code_bytes: weight site -> bytes of its codes and of the table that reads them.
        packed_bytes: weight site -> bytes of the same codes at a fixed width.
        float_bytes: of all weight sites as float32.
        entropy: weight site -> bits a weight that no code of single symbols goes below.
        elements: weights in all sites.
    """

    file_bytes: int
    code_bytes: Mapping[str, int]
    packed_bytes: Mapping[str, int]
    float_bytes: int
    entropy: Mapping[str, float]
    elements: int

    @property
    def bits(self) -> float:
        """Mean bits of a weight's code."""
        return 8 * sum(self.code_bytes.values()) / max(1, self.elements)

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""
        return {
            "file_bytes": self.file_bytes, "code_bytes": sum(self.code_bytes.values()),
            "packed_code_bytes": sum(self.packed_bytes.values()), "float_weight_bytes": self.float_bytes,
            "mean_bits": self.bits,
        }  # fmt: skip

    def __str__(self) -> str:
        codes = sum(self.code_bytes.values())
        return (
            f"{self.file_bytes:,} bytes, of which {codes:,} are codes: {self.bits:.2f} bits a weight, "
            f"{self.float_bytes / max(1, codes):.2f}x smaller than float32 "
            f"({self.float_bytes / max(1, sum(self.packed_bytes.values())):.2f}x at fixed widths)"
        )


@dataclass(frozen=True)
class HuffmanCheck:
    """Whether a Huffman file gives the network's weights back, bit for bit; and its size."""

    same: bool
    size: HuffmanSize

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""
        return {"same_state": self.same, **self.size.to_dict()}

    def __str__(self) -> str:
        return f"{self.size}; {'the same state, bit for bit' if self.same else 'ANOTHER STATE'}"


def huffman_size(model: nn.Module, plan: Plan) -> HuffmanSize:
    """The size of the file that :func:`save_huffman` would write, to the byte, from how often each code occurs.

    Args:
        model: with fake-quant layers, enabled.
        plan: the plan that it carries.

    Raises:
        HawqError: as :func:`hawq_lightning.save_packed`, or the extra ``huffman`` is missing.
    """
    return _size(model, list(_coded(model, plan_with_copies(model, plan))), plan)


def save_huffman(model: nn.Module, plan: Plan, path: str | Path) -> HuffmanSize:
    """Write the Huffman file of a model that is quantized by ``plan``.

    Args:
        model: with fake-quant layers, enabled; it stays as it is.
        plan: the plan that it carries.
        path: of the file; replaced atomically.

    Raises:
        HawqError: as :func:`huffman_size`, or the path cannot be written.
    """
    coded = list(_coded(model, plan_with_copies(model, plan)))
    size = _size(model, coded, plan)
    rest = {keys: t.detach().cpu().contiguous() for keys, t in rest_to_store(model, plan.sites).items()}
    _safetensors.write(path, ordered(_tensors(coded), rest), _metadata(coded, rest, plan))
    return size


def read_huffman(path: str | Path) -> PackedFile:
    """Read and check a Huffman file, without a model.

    Raises:
        HawqError: no such file, not a Huffman file, an unknown version, corrupt or cut short.
    """
    tensors, metadata = _safetensors.read(path)
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        found = f"{metadata.get('format')!r}, version {metadata.get('version')!r}"
        raise HawqError(f"{path} is no Huffman file of version {VERSION} (it is {found}).")
    try:
        entries = json.loads(metadata["sites"])
        for name, entry in entries.items():
            if f"{name}.{_LENGTHS}" in tensors:
                tensors[f"{name}.{CODES}"] = _decoded(name, entry, tensors)
        file = contents(tensors, {**metadata, "sites": json.dumps(entries)})
        return PackedFile(tuple(s.checked() for s in file.sites), file.rest, file.biases)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # a HawqError is the first
        raise HawqError(f"The Huffman file {path} is corrupt: {error}.") from error


def load_huffman(path: str | Path, model: Model) -> Model:
    """Quantize a freshly built model from a Huffman file, as :func:`hawq_lightning.load_packed` does from a packed one.

    Raises:
        HawqError: the file is damaged, or made for another model; the model is then as it was.
    """
    return put_packed(read_huffman(path), model)


@dataclass(frozen=True)
class _Coded:
    """A site with the symbols that its streams hold; an activation has none."""

    stored: StoredSite
    symbols: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    gaps: torch.Tensor | None = None
    gap_lengths: torch.Tensor | None = None
    skipped: int = 0

    @property
    def specs(self) -> dict[str, tuple[int, torch.Tensor]]:
        """Name of a stream -> its bytes and the lengths of its codes."""
        out = {}
        if self.symbols is not None and self.lengths is not None:
            out[_STREAM] = (stream_bytes(self.symbols, self.lengths), self.lengths)
        if self.gaps is not None and self.gap_lengths is not None:
            out[_GAPS] = (stream_bytes(self.gaps, self.gap_lengths), self.gap_lengths)
        return out

    @property
    def bytes(self) -> int:
        """Streams and code lengths."""
        return sum(size + len(lengths) for size, lengths in self.specs.values())


def _coded(model: nn.Module, plan: Plan) -> Iterator[_Coded]:
    for stored in stored_sites(model, plan):
        if stored.codes is None:
            yield _Coded(stored)
            continue
        bits = stored.site.bits
        symbols = (stored.codes.reshape(-1).long() + (1 << (bits - 1))).cpu()
        dense = _Coded(stored, symbols, code_lengths(symbols, 1 << bits))
        sparse = _sparse(stored, symbols, 1 << bits)
        yield min(dense, sparse, key=lambda coded: coded.bytes) if sparse else dense


def _sparse(stored: StoredSite, symbols: torch.Tensor, alphabet: int) -> _Coded | None:
    """Without the most frequent symbol, where that is most of all."""
    counts = torch.bincount(symbols, minlength=alphabet)
    skipped = int(counts.argmax()) if len(symbols) else 0
    if 2 * int(counts[skipped]) <= len(symbols):
        return None
    places = (symbols != skipped).nonzero()[:, 0]
    way = places.diff(prepend=torch.tensor([-1])) - 1
    stations = way // (_FARTHEST + 1)
    at = torch.arange(len(places)) + stations.cumsum(0)  # where each symbol stands among stations and symbols
    total = int(at[-1]) + 1 if len(places) else 0
    kept = torch.full((total,), skipped)
    kept[at] = symbols[places]
    gaps = torch.full((total,), _FARTHEST)
    gaps[at] = way % (_FARTHEST + 1)
    lengths = code_lengths(kept, alphabet)
    return _Coded(stored, kept, lengths, gaps, code_lengths(gaps, _FARTHEST + 1), skipped)


def _entry(coded: _Coded) -> JsonObject:
    entry = site_entry(coded.stored)
    if coded.gaps is not None:
        entry[_SKIPPED] = [coded.skipped, len(coded.gaps)]
    return entry


def _tensors(coded: list[_Coded]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for site in coded:
        name = site.stored.site.name
        tensors |= {f"{name}.{part}": t for part, t in site.stored.storage.tensors.items()}
        if site.symbols is not None and site.lengths is not None:
            tensors |= {f"{name}.{_LENGTHS}": site.lengths, f"{name}.{_STREAM}": encode(site.symbols, site.lengths)}
        if site.gaps is not None and site.gap_lengths is not None:
            tensors[f"{name}.{_GAP_LENGTHS}"] = site.gap_lengths
            tensors[f"{name}.{_GAPS}"] = encode(site.gaps, site.gap_lengths)
    return tensors


def _metadata(coded: list[_Coded], rest: Mapping[tuple[str, ...], object], plan: Plan) -> dict[str, str]:
    entries = {c.stored.site.name: _entry(c) for c in coded}
    return metadata_of(entries, rest, plan.biases) | {"format": FORMAT, "version": VERSION}


def _size(model: nn.Module, coded: list[_Coded], plan: Plan) -> HuffmanSize:
    specs: dict[str, Spec] = {}
    for site in coded:
        name = site.stored.site.name
        specs |= {f"{name}.{part}": spec_of(t) for part, t in site.stored.storage.tensors.items()}
        for part, (size, lengths) in site.specs.items():
            of_lengths = _LENGTHS if part == _STREAM else _GAP_LENGTHS
            specs |= {f"{name}.{part}": Spec("U8", (size,)), f"{name}.{of_lengths}": spec_of(lengths)}
    rest = rest_to_store(model, plan.sites)
    every = ordered(specs, {keys: spec_of(t) for keys, t in rest.items()})
    header = _safetensors.header_bytes(every, _metadata(coded, rest, plan))
    weights = {c.stored.site.name: c for c in coded if c.stored.codes is not None}
    sites = {name: c.stored.site for name, c in weights.items()}
    elements = sum(s.numel for s in sites.values())
    return HuffmanSize(
        header + sum(s.nbytes for s in every.values()),
        {name: c.bytes for name, c in weights.items()},
        {name: packed_bytes(s.numel, s.bits) for name, s in sites.items()},
        4 * elements,
        {name: _entropy(c.stored.codes) for name, c in weights.items() if c.stored.codes is not None},
        elements,
    )


def _entropy(codes: torch.Tensor) -> float:
    counts = codes.reshape(-1).unique(return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(-(share * share.log2()).sum()) if len(share) else 0.0


def _decoded(name: str, entry: JsonObject, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The site's codes as the packed file has them; its streams are taken out of ``tensors``."""
    lengths, stream = tensors.pop(f"{name}.{_LENGTHS}"), tensors.pop(f"{name}.{_STREAM}")
    bits, numel = int(entry["bits"]), math.prod(_safetensors.shape_from(entry["shape"]))
    if not 1 <= bits <= 8 or lengths.shape != (1 << bits,) or {lengths.dtype, stream.dtype} != {torch.uint8}:
        raise ValueError(f"{name!r} has no Huffman codes of {bits!r} bits")
    if _SKIPPED not in entry:
        symbols = decode(stream, lengths, numel)
    else:
        skipped, count = map(_safetensors.size_from, entry.pop(_SKIPPED))
        kept = decode(stream, lengths, count)
        gaps = decode(tensors.pop(f"{name}.{_GAPS}"), tensors.pop(f"{name}.{_GAP_LENGTHS}"), count)
        places = (gaps.long() + 1).cumsum(0) - 1
        if skipped >= 1 << bits or count > numel or (count and int(places[-1]) >= numel):
            raise ValueError(f"{name!r} has codes beyond its end")
        symbols = torch.full((numel,), skipped, dtype=torch.int32)
        symbols[places] = kept
    return torch.from_numpy(pack(symbols - (1 << (bits - 1)), bits))


def verify_huffman(model: nn.Module, path: str | Path) -> HuffmanCheck:
    """Whether the file holds the model's codes and everything else, bit for bit.

    Args:
        model: that the file was written of.
        path: of :func:`save_huffman`.
    """
    file, plan = read_huffman(path), plan_of(model)
    size, stored = huffman_size(model, plan), tuple(stored_sites(model, plan_with_copies(model, plan)))
    rest = rest_to_store(model, [s.site for s in file.sites])
    same = len(stored) == len(file.sites) and set(rest) == set(file.rest)
    same = same and all(_same(a, b) for a, b in zip(stored, file.sites))
    same = same and all(torch.equal(t.detach().cpu(), file.rest[k]) for k, t in rest.items())
    return HuffmanCheck(same and size.file_bytes == Path(path).stat().st_size, size)


def _same(stored: StoredSite, held: StoredSite) -> bool:
    parts = [{**s.storage.tensors, **({} if s.codes is None else {CODES: s.codes})} for s in (stored, held)]
    alike = stored.site.name == held.site.name and set(parts[0]) == set(parts[1])
    return alike and all(torch.equal(t.cpu(), parts[1][name]) for name, t in parts[0].items())
