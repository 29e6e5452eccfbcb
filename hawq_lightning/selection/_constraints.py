"""What a plan may not do: fixed bits, minimum bits, ties, and the (weight, activation) pairs that a device has."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._site_table import Layer, Site

Ties = Mapping[str, Sequence[str]] | Sequence[Sequence[str]]
Pairs = Mapping[str, Iterable[Sequence[int]]] | Iterable[Sequence[int]]
FLOAT_BITS = 32


def matching(pattern: str, sites: Sequence[Site], layers: Sequence[Layer]) -> list[int]:
    """Indices of the sites that a site name, a glob, ``first``, ``last`` or a layer's name means (there: its weight).

    Raises:
        HawqError: it means none.
    """
    names = [s.name for s in sites]
    if not isinstance(pattern, str):
        raise HawqError(f"A site is named by text, not by {pattern!r}.")
    if pattern in names:
        return [names.index(pattern)]
    weights = {layer.name: layer.weight for layer in layers}
    if pattern in ("first", "last") and pattern not in weights:
        order = [i for i, s in enumerate(sites) if s.kind == "weight"]
        if layers:
            order = [names.index(layer.weight) for layer in layers]
        return [order[0 if pattern == "first" else -1]]
    indices = [i for i, n in enumerate(names) if fnmatch.fnmatchcase(n, pattern)]
    if not indices:
        indices = sorted({names.index(w) for n, w in weights.items() if fnmatch.fnmatchcase(n, pattern)})
    if not indices:
        raise HawqError(f"No site matches {pattern!r}.{nearest(pattern, [*names, *weights])}")
    return indices


def narrowed(
    allowed: Sequence[Sequence[int]],
    sites: Sequence[Site],
    layers: Sequence[Layer],
    fixed: Mapping[str, int] | None,
    min_bits: int | Mapping[str, int] | None,
) -> list[list[int]]:
    """The bits that every site may still take.

    Args:
        allowed: bits that were measured, by site.
        sites: in the same order.
        layers: for ``first``, ``last`` and layer names.
        fixed: site name or glob -> bits. A full name beats a glob.
        min_bits: site name or glob -> least bits; a number goes for every weight.

    Raises:
        HawqError: names without a match, fixed bits that were not measured, contradictions.
    """
    out = [list(bits) for bits in allowed]
    if not isinstance(fixed or {}, Mapping):
        raise HawqError(f"fixed must map site names to bits, not be {fixed!r}.")
    fixed_at: dict[int, tuple[int, str, bool]] = {}
    for pattern, bits in (fixed or {}).items():
        for i in matching(pattern, sites, layers):
            exact = pattern == sites[i].name
            if i in fixed_at and fixed_at[i][2] == exact and fixed_at[i][0] != bits:
                raise HawqError(
                    f"Site {sites[i].name!r} is fixed at {fixed_at[i][0]} bits by {fixed_at[i][1]!r} "
                    f"and at {bits} bits by {pattern!r}; keep one."
                )
            if i not in fixed_at or exact or not fixed_at[i][2]:
                fixed_at[i] = (bits, pattern, exact)
    for i, (bits, _, _) in fixed_at.items():
        if bits not in out[i]:
            raise HawqError(f"Site {sites[i].name!r} is fixed at {bits!r} bits, but it can have only {_list(out[i])}.")
        out[i] = [bits]
    if not isinstance(min_bits if min_bits is not None else {}, (int, Mapping)):
        raise HawqError(f"min_bits must be a whole number or map site names to one, not be {min_bits!r}.")
    floors = {s.name: min_bits for s in sites if s.kind == "weight"} if isinstance(min_bits, int) else min_bits or {}
    for pattern, bits in floors.items():
        for i in matching(pattern, sites, layers):
            if not isinstance(bits, int):
                raise HawqError(f"min_bits of {pattern!r} is {bits!r}; give a whole number.")
            left = [b for b in out[i] if b >= bits]
            if not left:
                raise HawqError(
                    f"Site {sites[i].name!r} needs at least {bits} bits, but it can have only {_list(out[i])}."
                )
            out[i] = left
    return out


def tie_indices(ties: Ties, sites: Sequence[Site], layers: Sequence[Layer]) -> list[list[int]]:
    """Ties as lists of site indices, weights apart from activations.

    Raises:
        HawqError: a name without a match, or a tie that is no list of names.
    """
    named = ties if isinstance(ties, Mapping) else {f"number {i + 1}": t for i, t in enumerate(ties)}
    out = []
    for name, members in named.items():
        if isinstance(members, str):
            if len(matching(members, sites, layers)) < 2:
                raise HawqError(
                    f"The tie {members!r} has only one site; ties are lists of sites, such as [[a, b], [c, d]]."
                )
            members = [members]  # one glob
        if not isinstance(members, Sequence):
            raise HawqError(f"Tie {name!r} must list site names, not be {members!r}.")
        indices = {i for pattern in members for i in matching(pattern, sites, layers)}
        apart = [sorted(i for i in indices if sites[i].kind == kind) for kind in ("weight", "activation")]
        if all(len(t) == 1 for t in apart) and {*members} == {sites[i].name for i in indices}:
            weight, activation = (sites[t[0]].name for t in apart)
            raise HawqError(
                f"Tie {name!r} is of a weight, {weight}, and an activation, {activation}: ties are among weights or "
                "among activations. pairs={layer: [(4, 4), (8, 8)]} says which bits a layer's two may have together."
            )
        out += apart
    return [t for t in out if t]


def device_pairs(pairs: Pairs | None, layers: Sequence[Layer]) -> dict[str, frozenset[tuple[int, int]]]:
    """Layer name -> the (weight bits, activation bits) that the device has for it; layers without an entry are free.

    Args:
        pairs: a list for all layers, or by layer name, layer type, or glob on either (the more specific wins). A layer
            whose input stays float has 32 activation bits.
        layers: the layers.

    Raises:
        HawqError: no layer of that name or type, or pairs that are no pairs of whole numbers.
    """
    if pairs is None:
        return {}
    table: Mapping[Any, Any] = pairs if isinstance(pairs, Mapping) else {"*": pairs}
    by_key: dict[str, frozenset[tuple[int, int]]] = {}
    for key, values in table.items():
        try:
            by_key[key] = frozenset((int(w), int(a)) for w, a in values)
        except (TypeError, ValueError) as error:
            raise HawqError(f"The pairs for {key!r} must look like [[4, 8], [8, 8]], not {values!r}.") from error
        if not by_key[key]:
            raise HawqError(f"The device has no (weight, activation) pair for {key!r}.")
    keys = [n for layer in layers for n in (layer.name, layer.type)]
    for key in by_key:
        if not any(fnmatch.fnmatchcase(n, key) for n in keys):
            raise HawqError(f"Pairs are given for {key!r}, which is no layer or layer type.{nearest(key, set(keys))}")

    def look_up(layer: Layer) -> frozenset[tuple[int, int]] | None:
        for exact in (layer.name, layer.type):
            if exact in by_key:
                return by_key[exact]
        globs = [k for k in by_key if fnmatch.fnmatchcase(layer.name, k) or fnmatch.fnmatchcase(layer.type, k)]
        return by_key[max(globs, key=len)] if globs else None

    return {layer.name: pairs_of_layer for layer in layers if (pairs_of_layer := look_up(layer)) is not None}


def narrow_to_device(
    bits: list[list[int]],
    layer_groups: Sequence[tuple[Layer, int, int | None]],
    device: Mapping[str, frozenset[tuple[int, int]]],
) -> dict[tuple[int, int], NDArray[np.bool_]]:
    """Drop bits that no pair of the device supports (until nothing changes), and return what couples the rest.

    Args:
        bits: by group; narrowed in place.
        layer_groups: (layer, weight group, activation group or None).
        device: what :func:`device_pairs` returned.

    Raises:
        HawqError: a layer is left without bits.
    """
    changed = True
    while changed:
        changed = False
        for layer, w, a in layer_groups:
            if layer.name not in device:
                continue
            pairs = device[layer.name]
            other = [FLOAT_BITS] if a is None else bits[a]
            left = [x for x in bits[w] if any((x, y) in pairs for y in other)]
            right = [y for y in other if any((x, y) in pairs for x in left)]
            if not left:
                have = ", ".join(f"{x}/{y}" for x, y in sorted(pairs))
                raise HawqError(
                    f"The device lacks the bits of layer {layer.name!r}: it has weight/activation pairs {have}, "
                    f"the layer weights of {', '.join(map(str, bits[w]))} bits with activations of "
                    f"{', '.join(map(str, other))} bits."
                )
            changed |= left != bits[w] or right != other
            bits[w] = left
            if a is not None:
                bits[a] = right
    allowed_pairs: dict[tuple[int, int], NDArray[np.bool_]] = {}
    for layer, w, a in layer_groups:
        if layer.name in device and a is not None:
            table = np.asarray([[(x, y) in device[layer.name] for y in bits[a]] for x in bits[w]])
            if not table.all():
                allowed_pairs[w, a] = allowed_pairs.get((w, a), True) & table
    return allowed_pairs


def _list(bits: Iterable[int]) -> str:
    return ", ".join(map(str, bits)) or "none"
