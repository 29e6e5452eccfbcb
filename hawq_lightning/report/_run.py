"""What a run folder holds, read leniently: a missing or damaged file costs its section, never the report."""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hawq_lightning._csv import cell_text
from hawq_lightning._errors import HawqError
from hawq_lightning._io import RECORD_JSON, read_json, with_infinity
from hawq_lightning._plan import Plan
from hawq_lightning._types import JsonObject
from hawq_lightning.selection import Outlook
from hawq_lightning.sensitivity import Sensitivity

T = TypeVar("T")
EXPECTED = ("kl", "changed", "kl_batchnorm", "changed_batchnorm")
"""Columns of frontier.csv where what plans will cost was forecast."""
_MOST_ROWS = 200_000
STAGES = {
    "float": ("float", "fp32", "before"),
    "quantized": ("quantized", "quantised", "after_quantizing", "quantized_before_fine_tuning"),
    "fine_tuned": ("fine_tuned", "finetuned", "after_fine_tuning", "final"),
}
METRICS = {
    "accuracy": "accuracy",
    "acc": "accuracy",
    "top1": "accuracy",
    "map": "mAP",
    "map_50": "AP50",
    "loss": "loss",
}


@dataclass(frozen=True)
class FrontierPoint:
    """One row of frontier.csv. ``bits`` and ``expected``, the columns of the outlook, may be empty."""

    cost: float
    omega: float
    bits: Mapping[str, int] = field(default_factory=dict)
    expected: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LossCheck:
    """Half Omega against what is measured when one site alone is quantized.

    Attributes:
        site: its name.
        kind: ``weight`` or ``activation``.
        bits: of the site.
        predicted: half of Omega.
        measured: the change of the loss.
        q: half of the quadratic form of the rounding error, if it was measured.
        kl: the distance to the float network, which both predict; ``None`` in files of older releases.
    """

    site: str
    kind: str
    bits: int
    predicted: float
    measured: float
    q: float | None = None
    kl: float | None = None

    @property
    def expected(self) -> float:
        """The better prediction that there is."""
        return self.predicted if self.q is None else self.q

    @property
    def outcome(self) -> float:
        """What came of it."""
        return self.measured if self.kl is None else self.kl


@dataclass(frozen=True)
class Landscape:
    """Losses around the trained weights.

    Attributes:
        offsets: along each of two eigenvectors, in units of the weight.
        grids: weight site -> loss[i][j] at the i-th and j-th offset.
        eigenvalues: weight site -> the two eigenvalues.
    """

    offsets: Sequence[float]
    grids: Mapping[str, Sequence[Sequence[float]]]
    eigenvalues: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: where it is.
        plan: of plan.json.
        sensitivity: of sensitivity.json.
        frontier: of frontier.csv, ascending cost.
        metrics: of metrics.json, as it is.
        loss_check: of loss_check.csv.
        export: of export.json, as it is.
        outlook: of forecast.json.
        landscape: of figures/landscape.csv.
        missing: file name -> one sentence why its section is left out.
        command: that made the run, when the folder tells.
    """

    folder: Path
    plan: Plan | None = None
    sensitivity: Sensitivity | None = None
    frontier: Sequence[FrontierPoint] = ()
    metrics: Mapping[str, object] = field(default_factory=dict)
    loss_check: Sequence[LossCheck] = ()
    export: Mapping[str, object] = field(default_factory=dict)
    outlook: Outlook | None = None
    landscape: Landscape | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None

    @property
    def metric(self) -> tuple[str, dict[str, float]]:
        """The metric's name and its value in each stage that was measured: float, quantized, fine_tuned."""
        monitored = self.metrics.get("monitor")
        own = {"monitor": str(monitored.get("name"))} if isinstance(monitored, Mapping) else {}
        for key, name in (own | METRICS).items():
            table = self.metrics.get(key)
            if isinstance(table, Mapping):
                stages = {stage: _first(table, names) for stage, names in STAGES.items()}
                if values := {k: v for k, v in stages.items() if v is not None}:
                    return name, values
        return "accuracy", {}

    @property
    def packed_bytes(self) -> int | None:
        """Size of the packed file that lies in the folder."""
        path = self.folder / "model.safetensors"
        return path.stat().st_size if path.is_file() else None

    def number(self, *path: str) -> float | None:
        """A finite number in metrics.json, ``number("sizes", "file_bytes")``."""
        value: object = self.metrics
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return finite(value)


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        HawqError: no such folder, or nothing in it that could be reported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HawqError(f"No run folder at {folder}.")
    missing: dict[str, str] = {}

    def attempt(name: str, read: Callable[[Path], T]) -> T | None:
        path = folder / name
        if not path.is_file():
            missing[name] = f"{name} is not in the run folder."
            return None
        try:
            return read(path)
        except (HawqError, OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            missing[name] = f"{name} could not be read: {error}"
            return None

    metrics = attempt("metrics.json", _read_metrics) or {}
    run = Run(
        folder=folder,
        plan=attempt("plan.json", Plan.load),
        sensitivity=attempt("sensitivity.json", Sensitivity.load),
        frontier=attempt("frontier.csv", _read_frontier) or (),
        metrics=metrics,
        loss_check=attempt("loss_check.csv", _read_loss_check) or (),
        export=attempt("export.json", _read_metrics) or {},
        outlook=attempt("forecast.json", Outlook.load),
        landscape=attempt("figures/landscape.csv", _read_landscape),
        missing=missing,
        command=_command(folder, metrics),
    )
    if not (run.plan or run.sensitivity or run.frontier or run.metrics or run.loss_check):
        raise HawqError(f"Nothing to report in {folder}: " + " ".join(missing.values()))
    return run


def _read_metrics(path: Path) -> JsonObject:
    data = read_json(path, "metrics file", RECORD_JSON)
    if not isinstance(data, dict):
        raise HawqError("it holds no JSON object.")
    metrics: JsonObject = with_infinity(data)
    return metrics


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = []
        for row in csv.DictReader(file):
            rows.append({cell_text((k or "").strip()): cell_text(v or "") for k, v in row.items()})
            if len(rows) > _MOST_ROWS:
                raise HawqError(f"it has more than {_MOST_ROWS} rows.")
    return rows


def _read_frontier(path: Path) -> list[FrontierPoint]:
    points = []
    for row in _rows(path):
        cost = next((row[k] for k in ("cost", "weight_bytes", "file_bytes", "bytes") if row.get(k)), "")
        bits = {}
        for key, value in row.items():
            name = key.removeprefix("bits:").removeprefix("bits.")
            if name.endswith((".weight", ".input")) and value.strip().isdigit():
                bits[name] = int(value)
        expected = {k: float(row[k]) for k in EXPECTED if row.get(k)}
        point = FrontierPoint(float(cost), float(row["omega"]), bits, expected)
        if math.isfinite(point.cost) and math.isfinite(point.omega):
            points.append(point)
    return sorted(points, key=lambda p: p.cost)


def _read_loss_check(path: Path) -> list[LossCheck]:
    return [
        LossCheck(
            r["site"],
            r["kind"],
            int(r["bits"]),
            float(r["predicted"]),
            float(r["measured"]),
            *(float(r[k]) if r.get(k) else None for k in ("q", "kl")),
        )
        for r in _rows(path)
    ]


def _read_landscape(path: Path) -> Landscape | None:
    table: dict[str, dict[tuple[float, float], float]] = {}
    values: dict[str, tuple[float, ...]] = {}
    for r in _rows(path):
        table.setdefault(r["site"], {})[float(r["first"]), float(r["second"])] = float(r["loss"])
        values[r["site"]] = tuple(float(r[k]) for k in ("eigenvalue_1", "eigenvalue_2") if r.get(k))
    offsets = sorted({a for grid in table.values() for a, _ in grid})
    if len(offsets) < 2:
        return None
    grids = {n: [[grid[a, b] for b in offsets] for a in offsets] for n, grid in table.items()}
    return Landscape(offsets, grids, values)


def read_overrides(folder: Path) -> list[str]:
    """The overrides that Hydra noted in a run folder; empty where it did not, or where they cannot be read."""
    import yaml

    try:
        overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    return [str(item) for item in overrides] if isinstance(overrides, list) else []


def _command(folder: Path, metrics: Mapping[str, object]) -> str | None:
    command = metrics.get("command")
    if isinstance(command, list):
        return shlex.join(map(str, command))
    if isinstance(command, str):
        return command
    overrides = read_overrides(folder)
    return shlex.join(["hawq-lightning", *overrides]) if overrides else None


def _first(table: Mapping[str, object], names: Sequence[str]) -> float | None:
    return next((v for n in names if (v := finite(table.get(n))) is not None), None)


def finite(value: object) -> float | None:
    """The number, or ``None`` for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
