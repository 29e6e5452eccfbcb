"""Many runs read together: one row a run, and the mean over seeds of each setting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hawq_lightning._errors import HawqError
from hawq_lightning.report._run import Run, read_run
from hawq_lightning.report._text import plain

_OWN = ("seed", "select", "select.budget", "select.selector")  # overrides that have columns of their own


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
        numbers: w_comp, weight_bytes, file_bytes, bops, seconds; those that are known.
        overrides: of the command line, key -> value.
    """

    name: str
    title: str
    seed: str
    selector: str
    budget: str
    metric: str
    scores: dict[str, float]
    numbers: dict[str, float]
    overrides: dict[str, str] = field(default_factory=dict)

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
    left_out: dict[str, str]
    varied: Sequence[str]

    def setting(self, row: Row) -> tuple[str, ...]:
        """What runs that differ in nothing but the seed have in common."""
        varied = tuple(f"{k}={row.overrides[k]}" for k in self.varied if k in row.overrides)
        return (row.title, row.selector, row.budget, row.metric, *varied)

    def groups(self) -> dict[tuple[str, ...], list[Row]]:
        """Runs by setting, in the order of the rows."""
        found: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            found.setdefault(self.setting(row), []).append(row)
        return found


def read_sweep(folder: str | Path) -> Sweep:
    """Read every run folder below ``folder``, or the one that it is.

    Raises:
        HawqError: no such folder, or no finished run below it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HawqError(f"There is no folder {folder} to collect runs from.")
    rows, left_out = [], {}
    for path in sorted(_run_folders(folder)):
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
    rows.sort(key=lambda r: (r.title, r.selector, -r.numbers.get("weight_bytes", 0.0), r.budget, _as_number(r.seed)))
    keys = sorted({k for r in rows for k in r.overrides if k not in _OWN})
    varied = [k for k in keys if len({r.overrides.get(k) for r in rows}) > 1]
    return Sweep(folder, rows, left_out, varied)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; ``None`` for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _run_folders(folder: Path) -> set[Path]:
    found = {p.parent for p in folder.rglob("metrics.json")}
    found |= {p.parent for p in folder.rglob("unfinished.json")}
    return found | {p.parent.parent for p in folder.rglob(".hydra/config.yaml")}


def _row(name: str, run: Run) -> Row:
    if not run.metrics:
        raise HawqError(run.missing.get("metrics.json", "metrics.json is empty."))
    metric, scores = run.metric
    if not scores:
        raise HawqError("metrics.json holds no score.")
    keys = {
        "w_comp": ("costs", "w_comp"), "weight_bytes": ("sizes", "weight_bytes"), "file_bytes": ("sizes", "file_bytes"),
        "bops": ("costs", "bops"), "seconds": ("seconds", "total"),
    }  # fmt: skip
    numbers = {k: v for k, path in keys.items() if (v := run.number(*path)) is not None}
    return Row(
        name=name,
        title=plain(run.metrics.get("name", "")),
        seed=plain(run.metrics.get("seed", "")),
        selector=run.plan.selector if run.plan else "",
        budget=plain(run.plan.budget) if run.plan else "",
        metric=metric,
        scores=scores,
        numbers=numbers,
        overrides=_overrides(run.folder / ".hydra" / "overrides.yaml"),
    )


def _overrides(path: Path) -> dict[str, str]:
    import yaml

    try:
        listed: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    if not isinstance(listed, list):
        return {}
    pairs = (str(item).partition("=") for item in listed)
    return {key.lstrip("+"): value for key, _, value in pairs}


def _as_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.inf
    return value if math.isfinite(value) else math.inf
