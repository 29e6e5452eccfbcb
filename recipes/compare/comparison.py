"""The result of a comparison: methods side by side at the same setting, with paired intervals against one of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from average_precision import Matches
from bootstrap import Interval, bootstrap_mean, bootstrap_score
from numpy.typing import NDArray
from per_image import read_per_image

from hawq_lightning import HawqError, Plan

METRICS = ("accuracy", "map")
STAGES = {"before": "quantized", "batchnorm": "batchnorm", "after": "fine_tuned"}  # in tables -> in the records


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        folder: where it is.
        setting, method, seed: what it is of; ``labels`` their names in tables.
        metric: ``accuracy`` or ``map``.
        before, batchnorm, after: its score right after quantizing, with BatchNorm measured again and nothing learned,
            and after fine-tuning; None where not measured.
        plan: bits, costs and perturbation.
        tuned: the point of the grid that it was fine-tuned with.
        images: stage -> what validation gave for every image.
    """

    folder: Path
    setting: str
    method: str
    seed: int
    labels: Mapping[str, str]
    reference: bool
    metric: str
    before: float | None
    batchnorm: float | None
    after: float | None
    plan: Plan
    tuned: Mapping[str, Any]
    images: Mapping[str, Mapping[str, NDArray[Any]]] = field(repr=False, default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A method at a setting, over its seeds.

    Attributes:
        runs: by seed.
        before, batchnorm, after: with intervals over images and seeds; None where a run kept nothing of its images.
        against: after fine-tuning, minus the reference at the same seeds and images; None for the reference itself.
    """

    runs: Sequence[Run]
    before: Interval | None
    batchnorm: Interval | None
    after: Interval | None
    against: Interval | None

    @property
    def first(self) -> Run:
        """The run of the first seed; its plan stands for all unless bits are drawn."""
        return self.runs[0]

    def mean(self, stage: str) -> float | None:
        """Mean score over seeds."""
        values = [v for r in self.runs if (v := getattr(r, stage)) is not None]
        return float(np.mean(values)) if values else None

    def spread(self, stage: str) -> float | None:
        """Standard deviation over seeds; None for one."""
        values = [v for r in self.runs if (v := getattr(r, stage)) is not None]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def number(self, what: str) -> float:
        """Mean over the runs' plans of a cost, or of ``omega`` or ``perturbation`` (of the weights)."""
        return float(np.mean([_number(r.plan, what) for r in self.runs]))


@dataclass(frozen=True)
class Pooled:
    """A method against the reference in all settings that have both: the mean of the paired differences.

    Of methods with several settings in common with it, or with a score that the rows compare with none: BatchNorm's.

    Attributes:
        label: the method's name in tables.
        pairs: how many pairs of runs; intervals are over images and pairs.
        before, batchnorm, after: the three stages; None where a run kept nothing of its images.
    """

    label: str
    pairs: int
    before: Interval | None
    batchnorm: Interval | None
    after: Interval | None


@dataclass(frozen=True)
class Comparison:
    """All rows of a sweep by setting, the reference first, its methods over all settings, and the float score."""

    rows: Mapping[str, Sequence[Row]]
    pooled: Sequence[Pooled]
    float_score: float | None
    metric: str
    left_out: Mapping[str, str]

    @property
    def has_batchnorm(self) -> bool:
        """Whether any run was scored with BatchNorm measured again."""
        return any(r.mean("batchnorm") is not None for rows in self.rows.values() for r in rows)


def read_comparison(out: str | Path, draws: int = 2000) -> Comparison:
    """Read the runs below ``out/runs`` and compare those of every setting with its reference.

    Args:
        out: folder of the sweep.
        draws: bootstrap samples.

    Raises:
        HawqError: no finished run there.
    """
    out, runs, left_out = Path(out), [], {}
    for path in sorted((out / "runs").rglob("job.json")):
        try:
            runs.append(_read(path.parent, out))
        except (HawqError, KeyError) as error:
            left_out[path.parent.relative_to(out).as_posix()] = str(error)
    if not runs:
        raise HawqError(f"There is no finished run below {out / 'runs'}.")
    by_setting: dict[str, dict[str, list[Run]]] = {}
    for run in sorted(runs, key=lambda r: r.seed):
        by_setting.setdefault(run.setting, {}).setdefault(run.method, []).append(run)
    rows: dict[str, list[Row]] = {}
    pairs: dict[str, list[tuple[Run, Run]]] = {}
    for setting, methods in by_setting.items():
        reference = next((m for m in methods.values() if m[0].reference), None)
        ordered = sorted(methods.values(), key=lambda of_method: not of_method[0].reference)
        rows[setting] = [_row(of_method, reference, draws) for of_method in ordered]
        for of_method in ordered:
            pairs.setdefault(of_method[0].method, []).extend(_pairs(of_method, reference))
    # of one setting alone the table says it all, but for the stages before the last
    pooled = [
        _pooled(p, draws)
        for p in pairs.values()
        if len({r.setting for r, _ in p}) > 1 or any(r.batchnorm is not None for r, _ in p)
    ]
    return Comparison(rows, pooled, _float_score(out, runs[0].metric), runs[0].metric, left_out)


def widths(plan: Plan, kind: str) -> str:
    """Bits as the paper's tables have them: ``4``, or ``3 MP`` for mixed precision from 3 bits; the input left out."""
    sites = plan.weights if kind == "weight" else plan.activations[1:]
    bits = {s.bits for s in sites}
    if not bits:
        return "32"
    return f"{min(bits)}" + (" MP" if len(bits) > 1 else "")


def _record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HawqError(f"{path} cannot be read: {error}.") from error
    return record


def _read(folder: Path, out: Path) -> Run:
    job = _record(folder / "job.json")
    record = _record(folder / "metrics.json")
    metric = next((m for m in METRICS if m in record), None)
    if metric is None:
        raise HawqError("it holds no score.")
    scores, images = dict(record[metric]), {stage: read_per_image(folder, stage) for stage in STAGES.values()}
    untrained = out / "untrained" / job["setting"] / job["method"]
    for place in (untrained, untrained / f"seed={job['seed']}"):  # the second where bits are drawn
        if (place / "metrics.json").is_file():
            scores = _record(place / "metrics.json")[metric] | scores
            images = {stage: found or read_per_image(place, stage) for stage, found in images.items()}
    return Run(
        folder=folder, setting=job["setting"], method=job["method"], seed=int(job["seed"]), labels=job["labels"],
        reference=bool(job["reference"]), metric=metric, plan=Plan.load(folder / "plan.json"),
        tuned=job["tuned"] or {}, images=images, **{name: scores.get(stage) for name, stage in STAGES.items()},
    )  # fmt: skip


def _pairs(runs: Sequence[Run], reference: Sequence[Run] | None) -> list[tuple[Run, Run]]:
    """Each run with the reference's of its seed; none for the reference itself."""
    of_seed = {r.seed: r for r in reference or () if not runs[0].reference}
    return [(r, of_seed[r.seed]) for r in runs if r.seed in of_seed]


def _row(runs: Sequence[Run], reference: Sequence[Run] | None, draws: int) -> Row:
    pairs = _pairs(runs, reference)
    return Row(runs, *(_interval(runs, s, draws) for s in STAGES.values()), _difference(pairs, "fine_tuned", draws))


def _pooled(pairs: Sequence[tuple[Run, Run]], draws: int) -> Pooled:
    return Pooled(pairs[0][0].labels["method"], len(pairs), *(_difference(pairs, s, draws) for s in STAGES.values()))


def _difference(pairs: Sequence[tuple[Run, Run]], stage: str, draws: int) -> Interval | None:
    return _interval([p[0] for p in pairs], stage, draws, [p[1] for p in pairs])


def _interval(runs: Sequence[Run], stage: str, draws: int, minus: Sequence[Run] = ()) -> Interval | None:
    """Of the mean over runs, less that of ``minus`` (pairs in order)."""
    tables = [r.images.get(stage, {}) for r in runs]
    others = [r.images.get(stage, {}) for r in minus]
    if not tables or not all([*tables, *others]):
        return None
    if "correct" in tables[0]:
        values = np.stack([t["correct"] for t in tables]).astype(np.float64)
        if others:
            values = values - np.stack([t["correct"] for t in others])
        return bootstrap_mean(values, draws)
    matches, subtracted = [Matches(t) for t in tables], [Matches(t) for t in others]

    def score(weights: NDArray[np.float64]) -> float:
        mean = float(np.mean([m.mean_average_precision(weights) for m in matches]))
        return mean - (float(np.mean([m.mean_average_precision(weights) for m in subtracted])) if subtracted else 0.0)

    return bootstrap_score(score, matches[0].images, draws)


def _number(plan: Plan, what: str) -> float:
    if what == "omega":
        return plan.omega
    if what == "perturbation":
        return float(sum(s.perturbation or 0.0 for s in plan.weights))
    return float(plan.costs.get(what, float("nan")))


def _float_score(out: Path, metric: str) -> float | None:
    try:
        record = json.loads((out / "float" / "metrics.json").read_text(encoding="utf-8"))
        return float(record[metric]["float"])
    except (OSError, ValueError, KeyError):
        return None
