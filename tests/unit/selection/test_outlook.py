"""What plans are expected to cost: forecasts, held against a few plans that are measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hawq_lightning import HawqError
from hawq_lightning.quantization import Forecast, PlanLoss, Tangent
from hawq_lightning.selection import (
    Outlook,
    forecast_of,
    hold_against,
    look_ahead,
    omega_table,
    plan_frontier,
)
from tests.selection_networks import random_network


def world(kind: str, after: str = "quantizing", floor: float = 0.0, seed: int = 0):
    """A problem, a forecast of it, and a loss that goes with Ω, with the forecast, or with both."""
    problem = random_network(seed, 8, (2, 3, 4, 8))[0]
    rng = np.random.default_rng(seed)
    noise = {s.name: float(np.exp(rng.normal(0, 1.5))) for s in problem.sites}
    omega = omega_table(problem)
    shares = {n: {b: 1e-4 * v * noise[n] for b, v in of.items()} for n, of in omega.items()}
    uniform = {b: sum(of.get(b, 0.0) for of in shares.values()) for b in (2, 3, 4, 8)}
    made = Forecast(shares, uniform, uniform, "accurate", after)

    def measured(plan) -> PlanLoss:
        p, o = made.of(plan), plan.omega / 2
        kl = {"omega": 3e-4 * o**1.1, "forecast": 0.3 * p, "both": 0.01 * math.sqrt(p * o)}[kind] + floor
        return PlanLoss(kl, min(1.0, 0.3 * math.sqrt(kl)))

    return problem, plan_frontier(problem), made, measured


def outlook_of(kind: str, **given) -> tuple:
    problem, front, made, measured = world(kind, **given)
    plans = look_ahead(front, problem, made)
    rows = hold_against(plans, made, measured)
    return Outlook({made.after: made}, omega_table(problem), rows, 512, "samples"), front, made, measured, plans


@pytest.mark.parametrize("flattens", [False, True])
def test_the_forecasts_of_a_frontier_are_those_of_its_plans(flattens):
    problem, front, made, _ = world("forecast", after="batchnorm")
    slopes = {n: {b: -0.3 * v for b, v in of.items()} for n, of in made.shares.items()}
    tangent = Tangent(1.0, slopes, made.forecast_uniform[2]) if flattens else None
    made = replace(made, start=0.05, tangent=tangent)
    points = np.linspace(0, len(front) - 1, 20).astype(int)
    along = forecast_of(problem, front.choices(points), made)
    assert along == pytest.approx([made.of(front.plan(int(i))) for i in points]) and along.min() > 0.05


@pytest.mark.parametrize("kind", ["omega", "forecast", "both"])
def test_that_of_forecast_and_omega_is_taken_which_plans_bear_out(kind):
    outlook, front, _, measured, plans = outlook_of(kind)
    assert 3 <= len(plans) <= 10 and len({tuple(p.bits.values()) for _, p in plans}) == len(plans)
    assert outlook.kl_factor["quantizing"] == pytest.approx(1.0, abs=0.05) and outlook.changed_error < 0.002
    for i in np.linspace(0, len(front) - 1, 20).astype(int):
        plan = front.plan(int(i))
        loss, expected = measured(plan), outlook.of(plan)
        assert abs(math.log(loss.kl / expected.kl)) < 0.15
        assert expected.changed == pytest.approx(loss.changed, rel=0.1, abs=0.002)
    assert "KL within a factor of 1.0" in outlook.quality() and "512" not in outlook.quality()


def test_columns_of_the_frontier_are_what_is_expected_of_its_plans(tmp_path):
    outlook, front, *_ = outlook_of("both")
    points = np.asarray([0, len(front) // 2, len(front) - 1])
    columns = outlook.columns(front, points)
    assert list(columns) == ["kl", "changed"]
    for k, i in enumerate(points):
        expected = outlook.of(front.plan(int(i)))
        assert columns["kl"][k] == pytest.approx(expected.kl) and columns["changed"][k] == pytest.approx(
            expected.changed
        )
    front.to_csv(tmp_path / "frontier.csv", more=outlook.columns)
    head, first = (tmp_path / "frontier.csv").read_text().splitlines()[:2]
    row = dict(zip(head.split(","), first.split(",")))
    assert float(row["kl"]) == pytest.approx(columns["kl"][0]) and list(row)[:2] == ["point", "cost"]


def test_what_is_left_at_the_end_is_no_error_of_rounding():
    outlook, front, _, measured, _ = outlook_of("forecast", after="batchnorm", floor=0.01)
    largest = front.plan(len(front) - 1)
    assert outlook.of(largest, "batchnorm").kl == pytest.approx(measured(largest).kl, rel=0.1)
    assert list(outlook.columns(front, np.asarray([0]))) == ["kl_batchnorm", "changed_batchnorm"]
    assert outlook.of(largest) == outlook.of(largest, "batchnorm")  # the only network that was looked at


def test_without_measurements_the_forecast_stands_as_it_is():
    problem, front, made, _ = world("both")
    outlook = Outlook({"quantizing": made})
    plan = front.plan(0)
    assert outlook.of(plan).kl == pytest.approx(made.of(plan)) and "nothing" in outlook.quality()
    assert outlook.changed_error is None and math.isnan(outlook.kl_factor["quantizing"])
    uniform = look_ahead(None, problem, made)
    assert [label for label, _ in uniform] and all("uniform" in label for label, _ in uniform)


def test_outputs_without_classes_have_no_changed_predictions():
    problem, front, made, measured = world("both")
    rows = hold_against(look_ahead(front, problem, made), made, lambda plan: PlanLoss(measured(plan).kl))
    outlook = Outlook({"quantizing": made}, omega_table(problem), rows, 9)
    assert outlook.of(front.plan(0)).changed is None and list(outlook.columns(front, np.asarray([0]))) == ["kl"]
    assert Outlook.from_dict(json.loads(json.dumps(outlook.to_dict()))) == outlook


def test_shares_below_zero_cost_what_most_bits_everywhere_cost():
    _, front, made, _ = world("both")
    negative = Forecast({n: dict.fromkeys(of, -1.0) for n, of in made.shares.items()}, {8: 0.1}, {8: 0.1})
    assert Outlook({"quantizing": negative}).of(front.plan(0)).kl == pytest.approx(0.1)


def test_it_is_saved_and_read_back(tmp_path):
    outlook = outlook_of("both")[0]
    outlook.save(tmp_path / "forecast.json")
    assert Outlook.load(tmp_path / "forecast.json") == outlook
    data = json.loads((tmp_path / "forecast.json").read_text())
    data["samples"] = 3
    (tmp_path / "forecast.json").write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="was changed"):
        assert Outlook.load(tmp_path / "forecast.json").samples == 3


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda d: d.update(format="x"), "hawq_lightning.outlook"), (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.update(forecasts=[]), "forecasts is empty"), (lambda d: d.update(forecasts=3), "forecasts"),
        (lambda d: d["measured"][0].update(kl="x"), "kl of a measured plan"),
        (lambda d: d.update(samples=-1), "samples"),
        (lambda d: d["measured"][0].update(after="never"), "quantizing"), (lambda d: d.update(omega=[1]), "omega"),
        (lambda d: d["forecasts"][0].update(mode="x"), "fast"),
        (lambda d: d["forecasts"][0].update(shares=1), "shares"),
        (lambda d: d["forecasts"][0]["forecast_uniform"].update(x=1), "no number of bits"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(spoil, match):
    data = outlook_of("both")[0].to_dict()
    data = json.loads(json.dumps(data))
    spoil(data)
    with pytest.raises(HawqError, match=match):
        Outlook.from_dict(data)
