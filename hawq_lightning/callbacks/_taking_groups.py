"""Which group of which optimizer takes a parameter of some shape: some are for matrices alone, as Muon is."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hawq_lightning.sensitivity import random_states_kept

Group = dict[str, Any]


class TakingGroups:
    """Finds groups for learned steps.

    Args:
        optimizers: whose groups; those that shard their states are left out, they take no parameters later.
        model: names its parameters, which tell the nearest group.
    """

    def __init__(self, optimizers: Sequence[Optimizer], model: nn.Module) -> None:
        self._groups = [
            (o, g) for o in optimizers if not hasattr(o, "consolidate_state_dict") for g in o.param_groups
        ]  # fmt: skip
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._known: dict[tuple[int, torch.Size], bool | None] = {}

    def holders(self, layer: set[int]) -> list[tuple[Optimizer, Group]]:
        """Those that hold one of a layer's parameters, given by their ids."""
        return [(o, g) for o, g in self._groups if not layer.isdisjoint(map(id, g["params"]))]

    def find(self, step: nn.Parameter, layer: set[int], name: str) -> tuple[Optimizer, Group] | None:
        """The group that a step goes into: the one that holds its layer, else the nearest that takes its shape.

        Args:
            step: of the quantizer.
            layer: ids of the layer's parameters.
            name: of the layer.

        Returns:
            ``None`` if none takes it, or none holds the layer.
        """
        holders = self.holders(layer)
        if not holders:
            return None
        first = next((x for x in holders if self._takes(*x, step) is not False), None)
        return first or next((x for x in self._others(holders, name) if self._takes(*x, step)), None)

    def _others(self, holders: list[tuple[Optimizer, Group]], name: str) -> Iterator[tuple[Optimizer, Group]]:
        """Groups of the same optimizer, then those whose parameters' names have most parts in common with the layer."""
        known, own = {id(g) for _, g in holders}, {id(o) for o, _ in holders}
        rest = [(o, g) for o, g in self._groups if id(g) not in known]

        def distance(held: tuple[Optimizer, Group]) -> tuple[bool, int]:
            shared = (_shared(name, self._names.get(id(p), "")) for p in held[1]["params"])
            return id(held[0]) not in own, -max(shared, default=0)

        yield from sorted(rest, key=distance)

    def _takes(self, optimizer: Optimizer, group: Group, step: nn.Parameter) -> bool | None:
        """``None``: it cannot be told."""
        key = (id(group), step.shape)
        if key not in self._known:
            self._known[key] = _takes(optimizer, group, step)
        return self._known[key]


def _takes(optimizer: Optimizer, group: Group, step: nn.Parameter) -> bool | None:
    if not group["params"]:
        return None
    if not _runs(optimizer, group, min(group["params"], key=torch.Tensor.numel)):
        return None  # it wants a closure, or more than its groups and states
    # an optimizer of matrices would take a step that happens to be one, and turn it
    return all(_runs(optimizer, group, step.new_ones(shape)) for shape in (step.shape, (1,)))


def _runs(optimizer: Optimizer, group: Group, like: torch.Tensor) -> bool:
    """Whether one step of a copy of an optimizer runs with a parameter like this."""
    parameter = nn.Parameter(torch.ones_like(like))
    parameter.grad = torch.ones_like(parameter)
    try:
        with random_states_kept():
            trial = copy.copy(optimizer)  # without hooks, and without a scheduler's count of steps
            trial.state = defaultdict(dict)
            trial.param_groups = [{**group, "params": [parameter]}]
            type(optimizer).step(trial)
    except Exception:
        return False
    return True


def _shared(a: str, b: str) -> int:
    """How many parts two names have in common, from the first."""
    pairs = list(zip(a.split("."), b.split(".")))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
