"""Stopping rules look at statistics alone, and compose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hawq_lightning import Site, SiteTable
from hawq_lightning.sensitivity import (
    AllOf,
    AnyOf,
    MaxProbes,
    Progress,
    RelativeError,
    Satisfied,
    Stop,
    TraceStatistics,
)


def statistics(noise: float, probes: int = 40, rows: int = 30) -> TraceStatistics:
    """Rows of trace 1 with this relative noise, by two sites."""
    table = SiteTable(tuple(Site(n, "weight", (n,), (10,), 10) for n in ("a.weight", "b.weight")), ())
    filled = TraceStatistics(table, [rows], {"a.weight": True, "b.weight": True})
    g = torch.Generator().manual_seed(0)
    for _ in range(probes):
        filled.add(0, {s.name: (1 + noise * torch.randn(rows, generator=g, dtype=torch.float64)) / rows for s in table})
    filled.probes = probes
    return filled


def progress(noise: float = 0.1, steps: int = 20, probes: float = 40, next_probes: float = 42) -> Progress:
    return Progress(statistics(noise), steps, probes, next_probes)


@dataclass(frozen=True)
class Says:
    stop: Stop | None

    def decide(self, progress):
        return self.stop


def test_small_errors_stop_and_large_ones_do_not():
    error = math.sqrt(0.1**2 / (30 * 40))
    assert RelativeError(2 * error).decide(progress()) == Stop("error")
    assert RelativeError(0.5 * error).decide(progress()) is None
    assert RelativeError(1.05 * error).decide(progress()) is None  # within the safety for lucky first looks


def test_few_degrees_of_freedom_do_not_stop():
    few = statistics(0.1, probes=2, rows=3)
    assert few.degrees_of_freedom("a.weight") < 20
    assert RelativeError(10.0).decide(Progress(few, 1, 2, 4)) is None


def test_the_bound_on_probes_looks_ahead_and_says_where_it_stopped():
    assert MaxProbes(42, 0.05).decide(progress()) is None
    stop = MaxProbes(41, 0.05).decide(progress())
    assert stop is not None and stop.reason == "max_probes"
    assert "Stopped at 40 probes" in stop.note


def test_a_function_is_asked_after_step_4_and_every_8th():
    asked: list[int] = []
    for steps in range(1, 25):
        Satisfied(lambda rows, steps=steps: bool(asked.append(steps))).decide(progress(steps=steps))
    assert asked == [4, 8, 16, 24]
    assert Satisfied(lambda rows: True).decide(progress(steps=4)) == Stop("enough")
    assert Satisfied(lambda rows: True).decide(progress(steps=5)) is None


def test_any_takes_the_first_and_all_waits_for_the_last():
    first, second, never = Says(Stop("one")), Says(Stop("two", "A note.")), Says(None)
    assert AnyOf(never, first, second).decide(progress()) == Stop("one")
    assert AnyOf(never, never).decide(progress()) is None
    assert AllOf(first, never).decide(progress()) is None
    assert AllOf(first, second).decide(progress()) == Stop("one and two", "A note.")
    assert AnyOf(never, AllOf(first, AnyOf(never, second))).decide(progress()) == Stop("one and two", "A note.")
