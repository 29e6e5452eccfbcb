"""What a whole plan will cost before it is tried: the numbers of a site and width that path attribution gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hawq_lightning._config import ForecastMode
from hawq_lightning._errors import HawqError, choice, nearest
from hawq_lightning._fields import number, sealed, shown, table
from hawq_lightning._io import json_text, write_text
from hawq_lightning._plan import Plan
from hawq_lightning._sealed import load_sealed
from hawq_lightning._types import JsonObject

FORMAT = "hawq_lightning.forecast"
VERSION = 1
Mode = ForecastMode
"""One point of the path, which ranks plans; or three, which give the size as well."""
After = Literal["quantizing", "batchnorm"]
"""The network as it is quantized, or with its BatchNorm statistics measured again."""


@dataclass(frozen=True)
class Tangent:
    """The distance near the network of the lowest widths, where it has flattened: ``level + sum of slopes``.

    Attributes:
        level: what the tangent has where no site has an error.
        slopes: site -> bits -> slope along the site's rounding error.
        end: distance of the network of the lowest widths, measured.
    """

    level: float
    slopes: Mapping[str, Mapping[int, float]]
    end: float

    @property
    def at_end(self) -> float:
        """What the tangent has at the network of the lowest widths, where :attr:`end` was measured."""
        return self.level + math.fsum(of_site[min(of_site)] for of_site in self.slopes.values() if of_site)

    def counts(self, shares: NDArray[np.float64] | float) -> NDArray[np.float64] | float:
        """How far the tangent counts, from 0 to 1: as far as the sum of a plan's shares goes to :attr:`end`.

        Args:
            shares: of one plan or of many.
        """
        part: NDArray[np.float64] | float = np.clip(shares / self.end, 0.0, 1.0)
        return part


@dataclass(frozen=True)
class Forecast:
    """The expected distance to the float network, site by site and width by width.

    Attributes:
        shares: site -> bits -> what the site adds at these bits.
        forecast_uniform: bits -> the sum of the shares when every site has these bits, or those nearest to them.
        measured_uniform: bits -> the distance of that network, measured; from the float one at the same stage.
        mode: ``fast`` or ``accurate``.
        after: ``quantizing`` or ``batchnorm``.
        start: the distance of the float network itself: with its BatchNorm statistics measured again.
        tangent: tells plans apart that are nearly as far off as the network of the lowest widths; ``None``: the
            distance does not flatten towards it, and shares tell.
    """

    shares: Mapping[str, Mapping[int, float]]
    forecast_uniform: Mapping[int, float] = field(default_factory=dict)
    measured_uniform: Mapping[int, float] = field(default_factory=dict)
    mode: Mode = "fast"
    after: After = "quantizing"
    start: float = 0.0
    tangent: Tangent | None = None

    def of(self, plan: Plan | Mapping[str, int]) -> float:
        """The forecast of a plan.

        Args:
            plan: or site -> bits.

        Raises:
            HawqError: a site or width that was not looked at.
        """
        bits = _bits(plan)
        shares = math.fsum(self.share(name, b) for name, b in bits.items())
        return float(self.of_sums(shares, math.fsum(self.slope(name, b) for name, b in bits.items())))

    def of_sums(
        self, shares: NDArray[np.float64] | float, slopes: NDArray[np.float64] | float
    ) -> NDArray[np.float64] | float:
        """The forecast from the sums over the sites: as far as shares go to the lowest network, its tangent counts.

        Args:
            shares: sum of :meth:`share`, of one plan or of many.
            slopes: sum of :meth:`slope`.
        """
        if self.tangent is None:
            return self.start + shares
        near = self.tangent.counts(shares)
        return self.start + (1 - near) * shares + near * (self.tangent.level + slopes)

    def share(self, name: str, bits: int) -> float:
        """What one site adds.

        Args:
            name: of the site.
            bits: at which.

        Raises:
            HawqError: a site or width that was not looked at.
        """
        return _looked_up(self.shares, name, bits)

    def slope(self, name: str, bits: int) -> float:
        """What one site adds to the tangent, 0 without one.

        Args:
            name: of the site.
            bits: at which.

        Raises:
            HawqError: a site or width that was not looked at.
        """
        return 0.0 if self.tangent is None else _looked_up(self.tangent.slopes, name, bits)

    def error(self, plan: Plan | Mapping[str, int]) -> float:
        """How far off :meth:`of` may be: what shares and tangent were off at the uniform networks, in proportion.

        Args:
            plan: or site -> bits.
        """
        bits = _bits(plan)
        shares = {name: self.share(name, b) for name, b in bits.items()}
        off = math.fsum(abs(share) * abs(self.residual(bits[name])) for name, share in shares.items())
        if self.tangent is None:
            return off
        near = float(self.tangent.counts(math.fsum(shares.values())))
        return (1 - near) * off + near * abs(self.tangent.at_end - self.tangent.end)

    def residual(self, bits: int) -> float:
        """Forecast over measured distance of the uniform network of these bits, less 1; 0 where it was not measured."""
        measured = self.measured_uniform.get(bits, 0.0)
        return self.forecast_uniform[bits] / measured - 1 if measured > 0 else 0.0

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "mode": self.mode,
            "after": self.after,
            "shares": {name: _keyed(of_site) for name, of_site in self.shares.items()},
            "forecast_uniform": _keyed(self.forecast_uniform),
            "measured_uniform": _keyed(self.measured_uniform),
            "start": self.start,
            "tangent": None if self.tangent is None else {
                "level": self.tangent.level,
                "slopes": {name: _keyed(of_site) for name, of_site in self.tangent.slopes.items()},
                "end": self.tangent.end,
            },
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: object) -> Forecast:
        """Read what :meth:`to_dict` wrote; every field is checked.

        Raises:
            HawqError: not a forecast, an unknown version, or a field that cannot be; the message names it.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise HawqError(f'This is not a forecast: expected a JSON object with "format": "{FORMAT}".')
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise HawqError(f"Forecast version {shown(data.get('version'))} is unknown; this release reads {VERSION}.")
        try:
            return cls(
                _by_site(data.get("shares"), "shares"),
                _by_bits(data.get("forecast_uniform", {}), "forecast_uniform"),
                _by_bits(data.get("measured_uniform", {}), "measured_uniform"),
                choice("mode", data.get("mode"), get_args(Mode)),
                choice("after", data.get("after"), get_args(After)),
                number(data.get("start", 0.0), "start", 0.0),  # files of the first releases have none
                _tangent(data.get("tangent")),
            )
        except HawqError as error:
            raise HawqError(f"The forecast is damaged: {str(error).rstrip('.')}.") from error

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically, with a checksum of what it says."""
        write_text(path, json_text(sealed(self.to_dict()), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Forecast:
        """Read JSON written by :meth:`save`; warns of a file that was changed since it was written.

        Raises:
            HawqError: no such file, no JSON, or damaged; the message names file and field.
        """
        return load_sealed(path, "forecast", cls.from_dict)


def _keyed(of_bits: Mapping[int, float]) -> JsonObject:
    return {str(bits): float(value) for bits, value in of_bits.items()}


def _by_bits(data: object, what: str) -> dict[int, float]:
    out = {}
    for key, value in table(data, what).items():
        if not str(key).isdigit():
            raise HawqError(f"{what} has {shown(key)}, which is no number of bits")
        out[int(key)] = number(value, f"{what} at {key} bits")
    return out


def _by_site(data: object, what: str) -> dict[str, dict[int, float]]:
    return {str(name): _by_bits(of_site, f"{what} of {shown(name)}") for name, of_site in table(data, what).items()}


def _tangent(data: object) -> Tangent | None:
    if data is None:
        return None
    fields = table(data, "tangent")
    slopes = _by_site(fields.get("slopes"), "slopes")
    level = number(fields.get("level"), "level of the tangent")
    end = number(fields.get("end"), "end of the tangent", 0.0)
    if not end > 0:
        raise HawqError("end of the tangent is 0, where there is nothing to tell apart")
    return Tangent(level, slopes, end)


def _looked_up(of: Mapping[str, Mapping[int, float]], name: str, bits: int) -> float:
    if name not in of:
        raise HawqError(f"There is no forecast for site {name!r}.{nearest(name, of)}")
    if bits not in of[name]:
        widths = ", ".join(map(str, sorted(of[name])))
        raise HawqError(f"There is no forecast for site {name!r} at {bits} bits, but at {widths}.")
    return of[name][bits]


def _bits(plan: Plan | Mapping[str, int]) -> Mapping[str, int]:
    return plan.bits if isinstance(plan, Plan) else plan
