"""A plan: which bit-width and code kind every site gets, and the numbers that led there (paper, Fig. 1)."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hawq_lightning._code_formats import CODE_FORMATS
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._io import read_json, write_text
from hawq_lightning._site_table import Layer, Site

FORMAT = "hawq_lightning.plan"
VERSION = 2
WEIGHT_BITS = range(1, 9)
ACTIVATION_BITS = range(2, 9)


@dataclass(frozen=True)
class Candidate:
    """One way to quantize one site.

    Attributes:
        bits: code width, 1 to 8 for weights and 2 to 8 for activations.
        code: code kind: ``affine``, ``midrise`` or ``codebook``.
        omega: second-order perturbation, twice the predicted loss change (paper eq. 10).
        perturbation: ``||Q(W) - W||^2``; for activations the mean over images of ``||Q(a) - a||^2``.
        scale: activations only: the step of the grid.
        zero_point: activations only: the integer that stands for 0.
    """

    bits: int
    code: str
    omega: float
    perturbation: float
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True)
class PlanSite:
    """The choice for one site, with its trace, and every option that was weighed (so a plan can be re-costed)."""

    name: str
    kind: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    numel: int
    bits: int
    code: str
    scale: float | None = None
    zero_point: int | None = None
    trace: float | None = None
    stderr: float | None = None
    stderr_data: float | None = None
    mean_trace: float | None = None
    omega: float | None = None
    perturbation: float | None = None
    stability: float | None = None
    options: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Site -> bits and code kind, with traces, costs, settings and the fingerprint that they came from.

    Attributes:
        sites: one entry a site, in network order, weights before activations.
        layers: the layers with their weight site, activation site and MACs an image: what BOPs are made of.
        costs: ``weight_bytes``, ``float_weight_bytes``, ``file_bytes``, ``bops``, ``act_bits`` ... of this plan.
        budget: the budget as the user gave it.
        selector: the name of the rule that chose.
        settings: what the numbers depend on (estimator, images, seeds...).
        fingerprint: of the weights and data that the traces were measured on.
        quantizer: registered name of the quantizer; its Omega is what was weighed.
        quantizer_options: keywords of that quantizer.
    """

    sites: tuple[PlanSite, ...]
    layers: tuple[Layer, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)
    budget: Any = None
    selector: str = "pareto"
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    quantizer: str = "uniform"
    quantizer_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> dict[str, int]:
        """Site name -> bits."""
        return {s.name: s.bits for s in self.sites}

    @property
    def weights(self) -> tuple[PlanSite, ...]:
        """The weight sites."""
        return tuple(s for s in self.sites if s.kind == "weight")

    @property
    def activations(self) -> tuple[PlanSite, ...]:
        """The activation sites."""
        return tuple(s for s in self.sites if s.kind == "activation")

    @property
    def omega(self) -> float:
        """Total second-order perturbation (eq. 10) over weights and activations that have one."""
        return math.fsum(s.omega or 0.0 for s in self.sites)

    def __getitem__(self, name: str) -> PlanSite:
        """The site called ``name``."""
        for site in self.sites:
            if site.name == name:
                return site
        raise HawqError(f"The plan has no site {name!r}.{nearest(name, self.bits)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        body = {f.name: getattr(self, f.name) for f in fields(self)}
        body["sites"] = [_plain(asdict(s)) for s in self.sites]
        body["layers"] = [_plain(asdict(layer)) for layer in self.layers]
        return {"format": FORMAT, "version": VERSION} | body

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Read what :meth:`to_dict` wrote; every field is checked, nothing is imported by name.

        Raises:
            HawqError: not a plan, an unknown version, or a field out of range; the message names it.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise HawqError(f'This is not a plan: expected a JSON object with "format": "{FORMAT}".')
        check_version(data.get("version"))
        known = {"format", "version", "sha256", *(f.name for f in fields(cls))}
        if extra := [k for k in data if k not in known]:
            raise HawqError(f"The plan has an unknown field {extra[0]!r}.{nearest(extra[0], known)}")
        try:
            sites = tuple(_read_site(s) for s in data["sites"])
            layers = tuple(Layer.from_dict(layer) for layer in data.get("layers", []))
            plan = cls(
                sites=sites,
                layers=layers,
                costs={str(k): float(v) for k, v in data.get("costs", {}).items()},
                budget=data.get("budget"),
                selector=str(data.get("selector", "manual")),
                settings=dict(data.get("settings", {})),
                fingerprint=str(data.get("fingerprint", "")),
                quantizer=str(data.get("quantizer", "uniform")),  # version 1 knew no other
                quantizer_options={str(k): v for k, v in data.get("quantizer_options", {}).items()},
            )
        except HawqError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise HawqError(f"The plan is damaged: {type(error).__name__}: {error}.") from error
        names = [s.name for s in sites]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise HawqError(f"The plan names these sites twice: {', '.join(twice)}.")
        if not names:
            raise HawqError("The plan has no sites.")
        return plan

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically, with a checksum of what it says."""
        body = json.loads(json.dumps(self.to_dict()))
        head = {"format": FORMAT, "version": VERSION, "sha256": _digest(body)}
        write_text(path, json.dumps(head | body, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read JSON written by :meth:`save` or by hand; warns of one that was changed since it was written.

        Raises:
            HawqError: no such file, no JSON, or no valid plan.
        """
        data = read_json(path, "plan")
        plan = cls.from_dict(data)
        if "sha256" in data and data["sha256"] != _digest({k: v for k, v in data.items() if k != "sha256"}):
            warnings.warn(
                f"The plan at {path} was changed after it was written; it is taken as it now stands (delete its line "
                "'sha256' to say that this is meant).",
                stacklevel=2,
            )
        return plan

    def settled(self) -> Plan:
        """The plan with the code kinds, grids and Ω that belong to its bits, where bits were edited by hand.

        A site was edited if what it carries is that of another width among its options. Costs are not touched: see
        :func:`hawq_lightning.selection.recost`.

        Raises:
            HawqError: an activation has no grid for its bits: the width was never weighed.
        """
        sites = tuple(_settled(s) for s in self.sites)
        return self if sites == self.sites else self.replace(sites=sites)

    def replace(self, **changes: Any) -> Plan:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def check_fits(self, sites: Mapping[str, Site] | tuple[Site, ...]) -> None:
        """Compare with the sites of a model.

        Raises:
            HawqError: the plan was made for another model; the message says which sites differ.
        """
        have = sites if isinstance(sites, Mapping) else {s.name: s for s in sites}
        unknown = [n for n in self.bits if n not in have]
        missing = [n for n, s in have.items() if n not in self.bits and s.kind == "weight"]
        reshaped = [
            f"{s.name} {list(s.shape)} against {list(have[s.name].shape)}"
            for s in self.sites
            if s.kind == "weight" and s.name in have and tuple(have[s.name].shape) != tuple(s.shape)
        ]
        if unknown or missing or reshaped:
            parts = [
                f"{what}: {', '.join(which[:4])}{f' and {len(which) - 4} more' if len(which) > 4 else ''}"
                for what, which in (
                    ("only in the plan", unknown),
                    ("only in the model", missing),
                    ("other shapes", reshaped),
                )
                if which
            ]
            raise HawqError("This plan was made for another model; sites differ: " + "; ".join(parts) + ".")


def check_version(version: Any) -> None:
    """Raise HawqError unless plans of this version can be read: 1 (quantizer ``uniform`` only) and 2."""
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise HawqError(
            f"Plan version {version} is newer than this release, which reads up to {VERSION}: update hawq_lightning, "
            "since what a newer version adds would be lost silently."
        )
    if version not in range(1, VERSION + 1) or isinstance(version, bool):
        raise HawqError(f"Plan version {version!r} is unknown here; this release reads 1 to {VERSION}.")


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _settled(site: PlanSite) -> PlanSite:
    own = [o for o in site.options if o.bits == site.bits]
    if site.kind == "weight":
        edited = not any(o.omega == site.omega for o in own) and any(o.omega == site.omega for o in site.options)
        if edited and own:
            return _with_option(site, min(own, key=lambda o: o.omega))
        if edited:  # never weighed: the step is fitted when it is armed, the prediction is unknown
            site = replace(site, code="affine" if site.bits > 2 else site.code, omega=None, perturbation=None)
        return replace(site, code="midrise") if site.bits == 1 and site.code == "affine" else site
    grid = (site.scale, site.zero_point)
    if any((o.scale, o.zero_point) == grid for o in own):
        return site
    if None not in grid and all((o.scale, o.zero_point) != grid for o in site.options):
        return site  # a grid of the user's own
    if not own:
        if not site.options:
            return site
        widths = sorted({o.bits for o in site.options})
        close, shown = min(widths, key=lambda b: abs(b - site.bits)), ", ".join(map(str, widths))
        raise HawqError(
            f"Site {site.name!r} of the plan has {site.bits} bits, but was calibrated for {shown} only; "
            f"the nearest is {close}."
        )
    return _with_option(site, own[0])


def _with_option(site: PlanSite, option: Candidate) -> PlanSite:
    return replace(
        site, code=option.code, omega=option.omega, perturbation=option.perturbation,
        scale=option.scale, zero_point=option.zero_point,
    )  # fmt: skip


def _read_site(raw: Any) -> PlanSite:
    raw = dict(raw)
    name = raw.get("name")
    if not isinstance(name, str) or not name:
        raise HawqError("The plan has a site without a name.")
    known = {f.name for f in fields(PlanSite)}
    if extra := sorted(set(raw) - known):
        raise HawqError(f"Site {name!r} of the plan has an unknown field {extra[0]!r}.{nearest(extra[0], known)}")
    raw["layers"] = tuple(str(x) for x in raw.get("layers", ()))
    raw["shape"] = tuple(_whole(x, f"shape of {name!r}") for x in raw.get("shape", ()))
    raw["numel"] = _whole(raw.get("numel"), f"numel of {name!r}")
    options = []
    for option in raw.get("options", ()):
        option = Candidate(**option)
        check_choice(name, str(raw.get("kind")), option.bits, option.code)
        options.append(option)
    raw["options"] = tuple(options)
    site = PlanSite(**raw)
    check_choice(name, site.kind, site.bits, site.code)
    for number in ("scale", "trace", "stderr", "stderr_data", "mean_trace", "omega", "perturbation", "stability"):
        value = getattr(site, number)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value)):
            raise HawqError(f"Site {name!r} of the plan: {number} is {value!r}, not a number.")
    if site.scale is not None and not (0 < site.scale < math.inf):
        raise HawqError(f"Site {name!r} of the plan: scale must be positive and finite, not {site.scale!r}.")
    for zero in (site.zero_point, *(o.zero_point for o in site.options)):
        if zero is not None and (isinstance(zero, bool) or not isinstance(zero, int) or not 0 <= zero < 256):
            raise HawqError(f"Site {name!r} of the plan: zero_point is {zero!r}, not a whole number from 0 to 255.")
    return site


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
        raise HawqError(f"The plan's {what} is {value!r}, not a whole number.")
    return value


def check_choice(name: str, kind: str, bits: Any, code: Any) -> None:
    """Raise HawqError unless ``bits`` and ``code`` exist for a site of this kind."""
    if kind not in ("weight", "activation"):
        raise HawqError(f"Site {name!r}: kind is {kind!r}; use 'weight' or 'activation'.")
    allowed = WEIGHT_BITS if kind == "weight" else ACTIVATION_BITS
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in allowed:
        shown = bits if isinstance(bits, (int, float)) and not isinstance(bits, bool) else allowed[-1]
        close = min(allowed, key=lambda b: abs(b - shown))
        raise HawqError(
            f"Site {name!r}: {bits!r} bits is out of range for {kind}s "
            f"({allowed[0]} to {allowed[-1]}); the nearest is {close}."
        )
    if code not in CODE_FORMATS:
        raise HawqError(f"Site {name!r}: code kind {code!r} is unknown; use one of {', '.join(CODE_FORMATS)}.")
