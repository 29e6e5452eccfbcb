"""Sites that take the same bits, and what couples them: ties, fixed bits, and pairs that the device lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hawq_lightning._errors import HawqError
from hawq_lightning._site_table import Layer, Site
from hawq_lightning.selection._constraints import Pairs, Ties, device_pairs, narrow_to_device, narrowed, tie_indices
from hawq_lightning.selection._pareto import Floats, connected_groups


@dataclass(frozen=True)
class Group:
    """Sites of one kind that take the same bits: the unit of choice.

    Attributes:
        members: indices of the sites.
        kind: ``weight`` or ``activation``.
        bits: the widths it may take, ascending.
        score: what selection minimises at each of them, added up over the members.
        omega: Ω at each of them, added up over the members.
    """

    members: tuple[int, ...]
    kind: str
    bits: tuple[int, ...]
    score: Floats
    omega: Floats


class Structure(NamedTuple):
    """What ties and the device leave: members and bits of every group, and what couples them."""

    members: list[list[int]]
    bits: list[list[int]]
    layer_groups: list[tuple[Layer, int, int | None]]
    allowed_pairs: dict[tuple[int, int], NDArray[np.bool_]]


def structure_of(
    sites: Sequence[Site], layers: Sequence[Layer], order: Sequence[Layer], widths: Sequence[Sequence[int]], *,
    ties: Ties, fixed: Mapping[str, int] | None, min_bits: int | Mapping[str, int] | None, pairs: Pairs | None,
) -> Structure:  # fmt: skip
    """Groups of sites, with the bits that every member may take.

    Args:
        sites: quantized ones.
        layers: what ties weights to activations.
        order: the same layers from the network's first to its last, as constraints mean these words.
        widths: by site, the bits that were weighed, ascending.
        ties: see :class:`hawq_lightning.selection.Problem`, as for the rest.
        fixed: site -> bits.
        min_bits: least bits, of all sites or by site.
        pairs: that the device has; ``None``: all.

    Raises:
        HawqError: constraints that leave a site without bits, or a layer of unknown sites.
    """
    index = {s.name: i for i, s in enumerate(sites)}
    allowed = narrowed(widths, sites, order, fixed, min_bits)
    members = connected_groups(len(sites), tie_indices(ties, sites, order))
    bits = [_common(sites, tied, allowed) for tied in members]
    group_of = {i: g for g, tied in enumerate(members) for i in tied}
    for layer in layers:
        if layer.weight not in index:
            raise HawqError(f"Layer {layer.name!r} uses {layer.weight!r}, which is no site.")
    layer_groups = [
        (x, group_of[index[x.weight]], group_of[index[x.activation]] if x.activation in index else None) for x in layers
    ]
    return Structure(members, bits, layer_groups, narrow_to_device(bits, layer_groups, device_pairs(pairs, layers)))


def _common(sites: Sequence[Site], members: Sequence[int], allowed: Sequence[Sequence[int]]) -> list[int]:
    common = [b for b in allowed[members[0]] if all(b in allowed[i] for i in members)]
    if not common:
        listed = "; ".join(f"{sites[i].name} {', '.join(map(str, allowed[i]))}" for i in members[:4])
        raise HawqError(f"These tied sites conflict, they have no bits in common: {listed}.")
    return common
