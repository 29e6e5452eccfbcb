"""The blobs of a packed file that only some quantizers need: bases of codebooks, and zero points of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from hawq_lightning.errors import HawqError
from hawq_lightning.export.index import Index


def most_extras(index: Index, codebooks: bool, zero_points: bool) -> dict[str, int]:
    """Elements of the optional blobs at 8 bits."""
    most = {"basis": 8 * sum(w.channels for w in index.weights)} if codebooks else {}
    return most | ({"zeros": len(index.weights)} if zero_points else {})


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
