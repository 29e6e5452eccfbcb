"""Budgets of energy: the table by hand, plans against every plan, users' tables, and the report's row."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from hawq_lightning import HAWQ, HawqError, Layer, MeasureConfig, SelectConfig
from hawq_lightning.selection import (
    HOROWITZ_45NM,
    EnergyTable,
    Problem,
    constraints_of,
    format_cost,
    parse_budget,
    recost,
    select,
)
from tests.selection_networks import random_network
from tests.trainers import Classifier, loader, trainer


def by_hand(problem, bits):
    total = 0.0
    for x in problem.layers:
        w, a = bits[x.weight], bits[x.activation]
        elements = [problem.sites[problem.index[n]].numel for n in (x.weight, x.activation)]
        total += x.macs * (0.2 * w * a / 64 + 0.1) + 162.5 * elements[0] * w / 8 + 12.5 * elements[1] * a / 8
    return total


def test_the_table_is_that_of_the_source():
    # an 8-bit multiplication of 0.2 pJ and an addition of 32 bits of 0.1 pJ; float32: 3.7 and 0.9 pJ
    assert HOROWITZ_45NM.of_mac(8, 8) == pytest.approx(0.3) and HOROWITZ_45NM.of_mac(32, 32) == pytest.approx(4.6)
    assert HOROWITZ_45NM.of_mac(4, 8) == pytest.approx(0.2) and HOROWITZ_45NM.of_mac(4, 32) == pytest.approx(4.6)
    assert HOROWITZ_45NM.weight_byte == 162.5 and HOROWITZ_45NM.activation_byte == 12.5


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_best_plan_under_an_energy_is_found(seed):
    problem = random_network(seed, 4, tied=False)[0]
    names = [s.name for s in problem.sites]
    at_8 = by_hand(problem, dict.fromkeys(names, 8))
    every = [dict(zip(names, c)) for c in itertools.product(*(problem.candidates[n] for n in names))]
    for text, limit in (("60%", 0.6 * at_8), (f"{0.5 * at_8:.3f}pJ", 0.5 * at_8)):
        plan = select(problem, {"energy": text})
        fitting = [
            math.fsum(c.omega for c in chosen.values())
            for chosen in every
            if by_hand(problem, {n: c.bits for n, c in chosen.items()}) <= limit * (1 + 1e-9)
        ]
        assert plan.omega == pytest.approx(min(fitting), rel=1e-9)
        assert plan.costs["energy_pj"] == pytest.approx(by_hand(problem, plan.bits))
        assert plan.costs["energy_8bit_pj"] == pytest.approx(at_8)
        assert recost(plan).costs["energy_pj"] == plan.costs["energy_pj"]
    assert format_cost(problem, "energy_pj", 1234.0).startswith("1.234 nJ = ")
    assert parse_budget({"energy": "2uJ"}, problem)[0].limit == 2e6


def test_a_table_of_ones_own_replaces_it(tmp_path: Path):
    path = tmp_path / "energy.csv"
    rows = [f"mac,{w},8,{w}" for w in (2, 8)] + ["weight_byte,,,10", "activation_byte,,,0"]
    path.write_text("\n".join(["what,weight_bits,activation_bits,pj", *rows]))
    names, omega = ["a.weight", "b.weight"], [[4.0, 0.3, 0.01], [1.0, 0.1, 0.001]]
    layers = [Layer(n[0], "Linear", n, None, 100) for n in names]
    table = EnergyTable({(2, 32): 2.0, (8, 32): 8.0}, weight_byte=10.0)  # inputs stay float here
    given = {"numel": [80, 160], "layers": layers, "tables": {"energy": table}}
    problem = Problem.from_arrays(names, (2, 4, 8), omega, **given)
    plan = select(problem, {"energy": "1500pJ"})
    # at 2 bits 200 + 200 and 200 + 400, at 8 bits 800 + 800 and 800 + 1600: nothing fits above 2, and 4 is not there
    assert plan.bits == {"a.weight": 2, "b.weight": 2} and plan.costs["energy_pj"] == 1000
    loaded = constraints_of(SelectConfig({"energy": "50%"}, energy=path))["tables"]["energy"]
    assert loaded.of_mac(2, 8) == 2 and loaded.of_mac(4, 8) == math.inf and loaded.weight_byte == 10
    for text, words in (
        ("what,pj\nwatt,3", "line 2 of .* is about 'watt'; use mac, weight_byte, activation_byte"),
        ("what,weight_bits,activation_bits,pj\nmac,8,8,x", "pj in line 2 of .* is 'x', not a number"),
        ("what,weight_bits,activation_bits,pj\nmac,9,8,1", "MACs of \\(9, 8\\) bits; widths are 1 to 8, or 32"),
        ("what,weight_bits,activation_bits,pj\nmac,8,8,-1", "energies are finite numbers, 0 or more"),
        ("what,pj\nweight_byte,3", "There are no MACs in"),
    ):
        path.write_text(text)
        with pytest.raises(HawqError, match=words):
            SelectConfig({"energy": "50%"}, energy=path)


def test_the_callback_and_the_report_have_it(tmp_path):
    choose = SelectConfig({"energy": "70%"})
    hawq = HAWQ(weight_bits=(2, 8), activation_bits=(4, 8), measure=MeasureConfig(rtol=0.9, images=16), select=choose)
    trainer(tmp_path, hawq, max_epochs=1).fit(Classifier(), loader())
    costs = hawq.plan.costs
    assert costs["energy_pj"] <= 0.7 * costs["energy_8bit_pj"] and 2 in hawq.plan.bits.values()
