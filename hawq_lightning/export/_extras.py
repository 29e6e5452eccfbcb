"""The blobs of a packed file that only some quantizers need: bases of codebooks and activations, zero points."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning.export._index import Index
from hawq_lightning.quantization.methods import MOST_BITS


def most_extras(index: Index, codebooks: bool, zero_points: bool, bases: bool) -> dict[str, int]:
    """Elements of the optional blobs at 8 bits."""
    most = {"basis": 8 * sum(w.channels for w in index.weights)} if codebooks else {}
    most |= {"zeros": len(index.weights)} if zero_points else {}
    return most | ({"act_basis": MOST_BITS * len(index.activations)} if bases and index.activations else {})


def read_bases(index: Index, blobs: Mapping[str, torch.Tensor], bad: Callable[[str], HawqError]) -> list[torch.Tensor]:
    """The basis of every activation site, zeros where its steps are even; none of an earlier version."""
    if "act_basis" not in blobs:
        return [torch.zeros(MOST_BITS)] * len(index.activations)
    basis, bits = blobs["act_basis"], blobs["act_bits"].tolist()
    if basis.numel() != MOST_BITS * len(bits) or not bool(torch.isfinite(basis).all()):
        raise bad("the bases do not fit the activations")
    rows = basis.reshape(-1, MOST_BITS).clone()
    for read, b, zero, row in zip(index.activations, bits, blobs["act_zeros"].tolist(), rows):
        if bool(row[b:].any()) or (bool(row.any()) and (b > MOST_BITS or zero != 0)):
            raise bad(f"{read.name!r} has a basis that its {b} bits do not")
    return list(rows)


def read_extras(
    index: Index,
    blobs: Mapping[str, torch.Tensor],
    bits: list[int],
    kinds: list[str],
    bad: Callable[[str], HawqError],
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Zero points and bases by weight site, checked."""
    basis, zero = blobs.get("basis", torch.empty(0)), blobs.get("zeros", torch.zeros(len(bits)))
    books = [(w, b) for w, b, kind in zip(index.weights, bits, kinds) if kind == "codebook"]
    if basis.numel() != sum(w.channels * b for w, b in books) or not bool(torch.isfinite(basis).all()):
        raise bad("the bases do not fit the codebooks")
    zeros: dict[str, float] = {}
    if zero.numel() != len(bits):
        raise bad("the zero points do not fit the sites")
    for site, b, z in zip(index.weights, bits, zero.tolist()):
        if z not in range(-(1 << (b - 1)), 1 << (b - 1)):
            raise bad(f"{site.name!r} has zero point {z}")
        zeros |= {site.name: z} if z else {}
    at, bases = 0, {}
    for site, b in books:
        bases[site.name] = basis[at : at + site.channels * b].reshape(site.channels, b).clone()
        at += site.channels * b
    return zeros, bases
