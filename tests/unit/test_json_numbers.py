"""Numbers that JSON lacks: every file is JSON by the standard, and both its forms and those of 0.1.0 are read."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hawq_lightning import Candidate, Candidates, HawqError, Plan, PlanSite, Sensitivity
from hawq_lightning.selection import problem_of, recost
from hawq_lightning.sensitivity import SiteTrace
from tests.internals import internal
from tests.trainers import Classifier, loader, measuring, trainer

INF = math.inf
SITE = PlanSite(
    "0.weight", "weight", ("0",), (3, 4), 12, 4, "affine", trace=1.5, stderr=INF, stderr_data=INF, mean_trace=0.125,
    omega=0.5, perturbation=4.0,
    options=(Candidate(2, "affine", INF, 9.0), Candidate(4, "affine", 0.5, 4.0)),
)  # fmt: skip
PLANS = {
    "errors": Plan((SITE,)),
    "costs": Plan((replace(SITE, stderr=0.1, stderr_data=0.2),), costs={"latency_ms": INF}),
    "settings": Plan((SITE,), settings={"rtol": INF, "steps": [1.0, -INF], "of": {"a": INF}}),
    "names": Plan((replace(SITE, name="NaN.weight", layers=("NaN",)), replace(SITE, name="Infinity", layers=("x",)))),
}
TRACES = Sensitivity((SiteTrace("0.weight", "weight", 1.5, INF, INF, 12, 0.125),), settings={"worst": INF})
CHOICES = Candidates({"0.weight": SITE.options}, {"0.weight": 12}, {"0.weight": "weight"})
VALUES: dict[str, Any] = {**PLANS, "traces": TRACES, "candidates": CHOICES}


def strictly(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds a bare {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("name", list(VALUES))
def test_files_hold_only_numbers_that_json_has_and_come_back_whole(name, tmp_path):
    value, path = VALUES[name], tmp_path / "file.json"
    value.save(path)
    strictly(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(value).load(path) == value
    assert type(value).from_dict(json.loads(json.dumps(value.to_dict(), allow_nan=False))) == value


@pytest.mark.parametrize("name", [n for n in VALUES if n != "names"])
def test_files_of_0_1_0_with_bare_infinity_are_read(name, tmp_path):
    value, path = VALUES[name], tmp_path / "file.json"
    value.save(path)
    text = path.read_text()
    for number in ("-Infinity", "Infinity"):
        text = text.replace(f'"{number}"', number)
    body = json.loads(text)
    if "sha256" in body:  # as that release had it, over its own text
        body["sha256"] = internal("_fields").checksum(body)
    path.write_text(json.dumps(body))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(value).load(path) == value


def test_one_batch_leaves_files_by_the_standard(tmp_path):
    torch.manual_seed(0)
    callback = measuring(images=8, dirpath=tmp_path)
    trainer(tmp_path, callback).fit(Classifier(), loader(8, shuffle=False))
    for name in ("plan.json", "sensitivity.json"):
        strictly(tmp_path / name)
    assert Plan.load(tmp_path / "plan.json") == callback.plan


@pytest.mark.parametrize("lacks", ["stderr", "stderr_data"])
def test_a_trace_without_its_error_is_refused_and_not_taken_for_exact(lacks):
    plan = Plan((replace(SITE, **{lacks: None}),))
    for use in (problem_of, recost):
        with pytest.raises(HawqError, match=f"'0.weight' of the plan has a trace without {lacks};"):
            use(plan)
    assert math.isinf(problem_of(PLANS["errors"]).sensitivity["0.weight"].stderr)  # unknown stays so


def test_an_eigenvalue_that_is_no_number_is_refused_and_not_taken_for_zero(tmp_path, monkeypatch):
    callback = measuring(images=16, selector="top_eigenvalue")
    module = internal("callbacks._choose")
    monkeypatch.setattr(module, "top_eigenvalues", lambda *a, only, **k: dict.fromkeys(only, math.nan))
    with pytest.raises(HawqError, match="top eigenvalue of site 'net.0.weight' is not a finite number"):
        trainer(tmp_path, callback).fit(Classifier(), loader(8))
