"""Many runs read together: one row a run, grouped by all settings but the seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hawq_lightning._errors import HawqError
from hawq_lightning.report._run import Run, read_overrides, read_run
from hawq_lightning.report._text import plain

NUMBERS = {
    "w_comp": ("costs", "w_comp"), "weight_bytes": ("sizes", "weight_bytes"), "model_comp": ("costs", "model_comp"),
    "file_bytes": ("sizes", "file_bytes"), "bops": ("costs", "bops"), "seconds": ("seconds", "total"),
}  # fmt: skip
_OF_COLUMNS = ("seed", "select", "select.budget", "select.selector")  # overrides that have a column of their own


@dataclass(frozen=True)
class Row:
    """One finished run.

    Attributes:
        name: folder below the sweep's.
        title: name of the experiment.
        seed: of the run.
        selector: rule of choice.
        budget: as the user gave it.
        metric: what the scores are.
        scores: stage -> value.
        numbers: w_comp, model_comp, weight_bytes, file_bytes, bops, seconds; those that were recorded.
        overrides: of the command line, key -> value.
    """

    name: str
    title: str
    seed: str
    selector: str
    budget: str
    metric: str
    scores: Mapping[str, float]
    numbers: Mapping[str, float]
    overrides: Mapping[str, str] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """After fine-tuning, or right after quantizing where nothing was fine-tuned."""
        return self.scores.get("fine_tuned", self.scores.get("quantized"))


@dataclass(frozen=True)
class Sweep:
    """All runs below a folder.

    Attributes:
        folder: where they are.
        rows: the finished ones, by experiment, selector, size and seed.
        left_out: folder -> why a run is in no row.
        varied: overrides beside seed, selector and budget that differ between the runs.
    """

    folder: Path
    rows: Sequence[Row]
    left_out: Mapping[str, str]
    varied: Sequence[str]

    def groups(self) -> dict[tuple[str, ...], list[Row]]:
        """Runs that differ in nothing but the seed, by title, selector, budget, metric and varied overrides."""
        groups: dict[tuple[str, ...], list[Row]] = {}
        for r in self.rows:
            varied = (f"{k}={r.overrides[k]}" for k in self.varied if k in r.overrides)
            groups.setdefault((r.title, r.selector, r.budget, r.metric, *varied), []).append(r)
        return groups


def read_sweep(folder: str | Path) -> Sweep:
    """Read every run folder below ``folder``, or the one that it is.

    Raises:
        HawqError: no such folder, or no finished run below it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HawqError(f"There is no folder {folder} to collect runs from.")
    run_folders = {p.parent for name in ("metrics.json", "unfinished.json") for p in folder.rglob(name)}
    run_folders |= {p.parent.parent for p in folder.rglob(".hydra/config.yaml")}
    rows, left_out = [], {}
    for path in sorted(run_folders):
        name = path.relative_to(folder).as_posix()
        if not (path / "metrics.json").is_file():
            left_out[name] = "not finished: no metrics.json; the same command goes on with it."
            continue
        try:
            rows.append(_row(name, read_run(path)))
        except HawqError as error:
            left_out[name] = str(error)
    if not rows:
        more = f" {len(left_out)} are unfinished or unreadable." if left_out else ""
        raise HawqError(f"There is no finished run below {folder}.{more}")
    rows.sort(key=lambda r: (r.title, r.selector, -r.numbers.get("weight_bytes", 0.0), r.budget, _seed_order(r.seed)))
    keys = sorted({k for r in rows for k in r.overrides if k not in _OF_COLUMNS})
    varied = [k for k in keys if len({r.overrides.get(k) for r in rows}) > 1]
    return Sweep(folder, rows, left_out, varied)


def _row(name: str, run: Run) -> Row:
    if not run.metrics:
        raise HawqError(run.missing.get("metrics.json", "metrics.json is empty."))
    metric, scores = run.metric
    if not scores:
        raise HawqError("metrics.json holds no score.")
    pairs = (override.partition("=") for override in read_overrides(run.folder))
    return Row(
        name=name,
        title=plain(run.metrics.get("name", "")),
        seed=plain(run.metrics.get("seed", "")),
        selector=run.plan.selector if run.plan else "",
        budget=plain(run.plan.budget) if run.plan else "",
        metric=metric,
        scores=scores,
        numbers={key: v for key, path in NUMBERS.items() if (v := run.number(*path)) is not None},
        overrides={key.lstrip("+"): value for key, _, value in pairs},
    )


def _seed_order(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.inf
    return value if math.isfinite(value) else math.inf
