"""What plans are expected to cost, by a forecast that was held against a few plans, which were measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np

from hawq_lightning._errors import HawqError, choice
from hawq_lightning._fields import number, sealed, sequence, shown, table, text, whole
from hawq_lightning._io import json_text, write_text
from hawq_lightning._plan import Plan
from hawq_lightning._sealed import load_sealed
from hawq_lightning._types import JsonObject
from hawq_lightning.quantization import After, Forecast, PlanLoss
from hawq_lightning.selection._calibration import Line, fit_line
from hawq_lightning.selection._pareto import Floats, Ints
from hawq_lightning.selection._plan_frontier import PlanFrontier
from hawq_lightning.selection._problem import Problem

FORMAT = "hawq_lightning.outlook"
VERSION = 1
FRONTIER = "frontier"
_KL_SLOPE, _CHANGED_SLOPE = (1.0, 0.3), (0.5, 0.1)  # of the lines in logs, as expected, and how firmly
_OF_LEAST = 0.9  # how much of what the largest plan measures is taken for what is left at the end
_LEAST = 1e-12  # to take logarithms of
_KL_ERROR = 0.2  # of the logarithm of a plan's KL around the line
_CHANGED_AT_ONE = 0.2  # share of changed predictions at a KL of 1, where nothing was measured


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan that an outlook was held against.

    Attributes:
        label: such as ``uniform, 4 bit``.
        after: of which network.
        weight_bytes: its size.
        forecast: of the KL, the sum over its sites.
        omega: its Ω.
        kl: measured.
        changed: share of changed predictions, measured; ``None``: nothing is predicted.
    """

    label: str
    after: After
    weight_bytes: float
    forecast: float
    omega: float
    kl: float
    changed: float | None = None


@dataclass(frozen=True)
class Outlook:
    """The expected loss of any plan: KL to the float network on held-out data, and share of changed predictions.

    Forecasts sum over sites, each as if all others had its bits, and know what the errors do; Ω/2 takes errors for
    noise, and orders the plans of a frontier, which it made. Along the frontier either may be off by a factor, or their
    geometric mean by less: that of the three is taken which says best what plans measure that are left out in turn,
    through a line in logarithms for each network. Another line, for all, leads from the KL to the changed predictions.

    Attributes:
        forecasts: by the network that they are of.
        omega: site -> bits -> Ω; empty: no traces were measured.
        measured: the plans that they were held against.
        samples: of the held-out data.
        measured_on: these, in words.
    """

    forecasts: Mapping[After, Forecast]
    omega: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    measured: tuple[MeasuredPlan, ...] = ()
    samples: int = 0
    measured_on: str = ""

    def of(self, plan: Plan | Mapping[str, int], after: After = "quantizing") -> PlanLoss:
        """What is expected of a plan.

        Args:
            plan: or site -> bits.
            after: of which network; without BatchNorm, and where it was not forecast, the network as it is quantized.

        Raises:
            HawqError: a site or width that was not looked at.
        """
        after = after if after in self.forecasts else next(iter(self.forecasts))
        bits = plan.bits if isinstance(plan, Plan) else plan
        forecast = self.forecasts[after].of(bits)
        omega = math.fsum(self.omega.get(name, {}).get(b, 0.0) for name, b in bits.items())
        kl, changed = self._expected(np.asarray([forecast]), np.asarray([omega]), after)
        return PlanLoss(float(kl[0]), None if changed is None else float(changed[0]))

    def columns(self, front: PlanFrontier, points: Ints) -> dict[str, Floats]:
        """``kl``, ``changed`` and, with BatchNorm measured again, ``kl_batchnorm``, ``changed_batchnorm`` of points.

        Args:
            front: a frontier.
            points: of it.
        """
        choices, problem, out = front.choices(points), front.problem, {}
        omega = sum((g.omega[choices[:, j]] for j, g in enumerate(problem.groups)), np.zeros(len(choices)))
        for after in self.forecasts:
            kl, changed = self._expected(forecast_of(problem, choices, self.forecasts[after]), omega, after)
            suffix = "" if after == "quantizing" else f"_{after}"
            out[f"kl{suffix}"] = kl
            if changed is not None:
                out[f"changed{suffix}"] = changed
        return out

    @property
    def kl_factor(self) -> Mapping[After, float]:
        """By which factor half of the measured KL are missed at the most, each left out in turn; 1 is perfect."""
        return {after: line.factor for after, line in self._fits[1].items()}

    @property
    def changed_error(self) -> float | None:
        """By which share of the predictions the changed ones are missed from the KL, in the same way."""
        rows, line = self._with_changes, self._changed_line
        if line is None or not line.left_out:
            return None
        return statistics.median(abs(min(p, 1.0) - (m.changed or 0.0)) for p, m in zip(line.left_out, rows))

    def quality(self) -> str:
        """One sentence: how good the expectations are."""
        parts = []
        for after, factor in self.kl_factor.items():
            if math.isfinite(factor):
                again = " with BatchNorm measured again" if after != "quantizing" else ""
                parts.append(f"KL{again} within a factor of {factor:.2f}")
        if (error := self.changed_error) is not None:
            parts.append(f"changed predictions within {100 * error:.2g} points")
        held = f"half of the {len(self.measured)} plans measured on {self.measured_on}, each left out in turn"
        return f"Expected: {', '.join(parts)} ({held})." if parts else "The forecast was held against nothing."

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "omega": {name: {str(b): v for b, v in of_site.items()} for name, of_site in self.omega.items()},
            "forecasts": [f.to_dict() for f in self.forecasts.values()],
            "measured": [asdict(m) for m in self.measured],
            "samples": self.samples,
            "measured_on": self.measured_on,
        }

    @classmethod
    def from_dict(cls, data: object) -> Outlook:
        """Read what :meth:`to_dict` wrote; every field is checked.

        Raises:
            HawqError: no such object, an unknown version, or a field that cannot be; the message names it.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise HawqError(f'This is not an outlook: expected a JSON object with "format": "{FORMAT}".')
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise HawqError(f"Outlook version {shown(data.get('version'))} is unknown; this release reads {VERSION}.")
        try:
            made = [Forecast.from_dict(f) for f in sequence(data.get("forecasts"), "forecasts")]
            if not made:
                raise HawqError("forecasts is empty")
            return cls(
                {f.after: f for f in made},
                {str(n): _read_omega(v) for n, v in table(data.get("omega", {}), "omega").items()},
                tuple(_read_measured(m) for m in sequence(data.get("measured", []), "measured")),
                whole(data.get("samples", 0), "samples"),
                text(data.get("measured_on", ""), "measured_on"),
            )
        except HawqError as error:
            raise HawqError(f"The outlook is damaged: {str(error).rstrip('.')}.") from error

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically, with a checksum of what it says."""
        write_text(path, json_text(sealed(self.to_dict()), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Outlook:
        """Read JSON written by :meth:`save`; warns of a file that was changed since it was written.

        Raises:
            HawqError: no such file, no JSON, or damaged; the message names file and field.
        """
        return load_sealed(path, "outlook", cls.from_dict)

    @cached_property
    def _fits(self) -> tuple[float, dict[After, Line]]:
        """Ω's share of what is taken, and the line of each network."""
        with_omega = any(m.omega > 0 for m in self.measured)
        fits = {w: self._lines_of(w) for w in ((0.5, 0.0, 1.0) if with_omega else (0.0,))}

        def missed(w: float) -> float:
            return sum(math.log(line.factor) for line in fits[w].values() if math.isfinite(line.factor))

        best = min(fits, key=missed)
        return best, fits[best]

    def _lines_of(self, share: float) -> dict[After, Line]:
        lines: dict[After, Line] = {}
        for after in self.forecasts:
            rows = [m for m in self.measured if m.after == after and m.kl > 0]
            # the forecast is right for uniform plans by construction, and not for others
            rows = [m for m in rows if m.label == FRONTIER] or rows
            forecast, omega = ([getattr(m, name) for m in rows] for name in ("forecast", "omega"))
            x = self._mixed(np.asarray(forecast), np.asarray(omega), after, share)
            y = [m.kl for m in rows]
            # statistics of other images alone change the outputs: something is left however many bits there are
            left = min(zip(x, y), default=(1.0, 0.0)) if after != "quantizing" else (1.0, 0.0)
            least = _OF_LEAST * (left[1] - float(left[0])) if left[1] > 3 * left[0] else 0.0
            least = min([least, *(_OF_LEAST * v for v in y)])
            lines[after] = fit_line([float(v) for v in x], y, [_KL_ERROR**2] * len(y), _KL_SLOPE, (1.0, 1.0), least)
        return lines

    def _mixed(self, forecast: Floats, omega: Floats, after: After, share: float) -> Floats:
        """Between forecast and Ω/2, geometrically."""
        # sums of shares may fall below zero; nothing costs less than the most bits everywhere
        floor = min((v for v in self.forecasts[after].measured_uniform.values() if v > 0), default=_LEAST)
        mixed: Floats = np.maximum(forecast, floor) ** (1 - share) * np.maximum(omega / 2, _LEAST) ** share
        return mixed

    @property
    def _with_changes(self) -> list[MeasuredPlan]:
        return [m for m in self.measured if m.changed is not None and m.kl > 0]

    @cached_property
    def _changed_line(self) -> Line | None:
        rows, n = self._with_changes, max(self.samples, 1)
        if self.measured and not rows:
            return None
        shares = [((m.changed or 0.0) * n + 0.5) / (n + 1) for m in rows]
        errors = [(1 - p) / (n * p) + 0.05**2 for p in shares]  # of logarithms: binomial, and what a line cannot say
        return fit_line([m.kl for m in rows], shares, errors, _CHANGED_SLOPE, (1.0, _CHANGED_AT_ONE))

    def _expected(self, forecast: Floats, omega: Floats, after: After) -> tuple[Floats, Floats | None]:
        share, lines = self._fits
        kl = lines[after](self._mixed(forecast, omega, after, share))
        line = self._changed_line
        return kl, None if line is None else np.minimum(line(kl), 1.0)


def _read_omega(data: object) -> dict[int, float]:
    return {int(b): number(v, f"omega at {b} bits") for b, v in table(data, "omega of a site").items() if b.isdigit()}


def _read_measured(data: object) -> MeasuredPlan:
    row = table(data, "a measured plan")
    changed = row.get("changed")
    return MeasuredPlan(
        text(row.get("label"), "label of a measured plan"),
        choice("after", row.get("after"), get_args(After)),
        number(row.get("weight_bytes"), "weight_bytes of a measured plan", low=0.0),
        number(row.get("forecast"), "forecast of a measured plan"),
        number(row.get("omega"), "omega of a measured plan", low=0.0),
        number(row.get("kl"), "kl of a measured plan"),
        None if changed is None else number(changed, "changed of a measured plan", low=0.0, high=1.0),
    )


def forecast_of(problem: Problem, choices: Ints, forecast: Forecast) -> Floats:
    """The forecast of many choices, ``[points]``.

    Args:
        problem: whose choices they are.
        choices: ``[points, groups]`` positions in the groups' bits.
        forecast: of its sites.
    """
    shares, slopes = np.zeros(len(choices)), np.zeros(len(choices))
    for g, group in enumerate(problem.groups):
        names = [problem.sites[i].name for i in group.members]
        for total, of in ((shares, forecast.share), (slopes, forecast.slope)):
            total += np.asarray([math.fsum(of(name, b) for name in names) for b in group.bits])[choices[:, g]]
    return np.asarray(forecast.of_sums(shares, slopes))


def omega_table(problem: Problem) -> dict[str, dict[int, float]]:
    """Site -> bits -> Ω of the candidates of a problem; of several code formats the better."""
    out = {}
    for i, site in enumerate(problem.sites):
        listed = problem.candidates[site.name]
        out[site.name] = {b: float(listed[k].omega) for b, (k, *_) in problem.best[i].items()}
    return out
