"""The choice for one site, and what there was to choose from."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from hawq_lightning._code_formats import CODE_FORMATS
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._fields import check_names, number, shown, table, text, whole
from hawq_lightning._io import with_infinity
from hawq_lightning._types import JsonObject

_NUMBERS = ("scale", "trace", "stderr", "stderr_data", "mean_trace", "omega", "perturbation", "stability")
WEIGHT_BITS = range(1, 9)
ACTIVATION_BITS = range(2, 9)


@dataclass(frozen=True)
class Candidate:
    """One way to quantize one site.

    Attributes:
        bits: code width, 1 to 8 for weights and 2 to 8 for activations.
        code: code format: ``affine``, ``midrise`` or ``codebook``.
        omega: second-order perturbation, twice the predicted loss change (paper eq. 10).
        perturbation: ``||Q(W) - W||^2``; for activations the mean over images of ``||Q(a) - a||^2``.
        scale: activations only: the step of the grid.
        zero_point: activations only: the integer that stands for 0.
        q: the quadratic form of the real rounding error, of which Omega takes the size alone; twice the predicted loss
            change, where it was measured.
        q_stderr: its standard error against the exact one on the same images.
    """

    bits: int
    code: str
    omega: float
    perturbation: float
    scale: float | None = None
    zero_point: int | None = None
    q: float | None = None
    q_stderr: float | None = None


@dataclass(frozen=True)
class PlanSite:
    """The choice for one site, with its trace, and every candidate that was weighed (so a plan can be re-costed)."""

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


def reconciled(site: PlanSite) -> PlanSite:
    """The site with the code format, grid and Ω that belong to its bits, where bits were edited by hand.

    Raises:
        HawqError: an activation has no grid for its bits: the width was never weighed.
    """
    same_bits = [o for o in site.options if o.bits == site.bits]
    if site.kind == "weight":
        edited = not any(o.omega == site.omega for o in same_bits) and any(o.omega == site.omega for o in site.options)
        if edited and same_bits:
            return _with_candidate(site, min(same_bits, key=lambda o: o.omega))
        if edited:  # never weighed: the step is fitted when it is enabled, the prediction is unknown
            site = replace(site, code="affine" if site.bits > 2 else site.code, omega=None, perturbation=None)
        return replace(site, code="midrise") if site.bits == 1 and site.code == "affine" else site
    grid = (site.scale, site.zero_point)
    if any((o.scale, o.zero_point) == grid for o in same_bits):
        return site
    if None not in grid and all((o.scale, o.zero_point) != grid for o in site.options):
        return site  # a grid of the user's own
    if not same_bits:
        if not site.options:
            return site
        widths = sorted({o.bits for o in site.options})
        close, listed = min(widths, key=lambda b: abs(b - site.bits)), ", ".join(map(str, widths))
        raise HawqError(
            f"Site {site.name!r} of the plan has {site.bits} bits, but was calibrated for {listed} only; "
            f"the nearest is {close}."
        )
    return _with_candidate(site, same_bits[0])


def _with_candidate(site: PlanSite, candidate: Candidate) -> PlanSite:
    return replace(
        site, code=candidate.code, omega=candidate.omega, perturbation=candidate.perturbation,
        scale=candidate.scale, zero_point=candidate.zero_point,
    )  # fmt: skip


def read_site(data: JsonObject) -> PlanSite:
    """A site from JSON; every field is checked.

    Raises:
        HawqError: an unknown field, or one out of range.
    """
    data = dict(data)
    name = data.get("name")
    if not isinstance(name, str) or not name:
        raise HawqError("The plan has a site without a name.")
    names = {f.name for f in fields(PlanSite)}
    if extra := sorted(set(data) - names):
        raise HawqError(f"Site {name!r} of the plan has an unknown field {extra[0]!r}.{nearest(extra[0], names)}")
    data["layers"] = tuple(str(x) for x in data.get("layers", ()))
    data["shape"] = tuple(_whole(x, f"shape of {name!r}") for x in data.get("shape", ()))
    data["numel"] = _whole(data.get("numel"), f"numel of {name!r}")
    try:
        data["options"] = tuple(read_candidate(name, str(data.get("kind")), o) for o in data.get("options", ()))
    except HawqError as error:
        raise HawqError(f"The plan is damaged: {str(error).rstrip('.')}.") from error
    site = PlanSite(**with_infinity(data, _NUMBERS))
    check_choice(name, site.kind, site.bits, site.code)
    for key in _NUMBERS:
        value = getattr(site, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value)):
            raise HawqError(f"Site {name!r} of the plan: {key} is {value!r}, not a number.")
    if site.scale is not None and not (0 < site.scale < math.inf):
        raise HawqError(f"Site {name!r} of the plan: scale must be positive and finite, not {site.scale!r}.")
    for zero in (site.zero_point, *(o.zero_point for o in site.options)):
        if zero is not None and (isinstance(zero, bool) or not isinstance(zero, int) or not 0 <= zero < 256):
            raise HawqError(f"Site {name!r} of the plan: zero_point is {zero!r}, not a whole number from 0 to 255.")
    return site


def read_candidate(name: str, kind: str, raw: object) -> Candidate:
    """A candidate from JSON; every field is checked.

    Args:
        name: of its site, for messages.
        kind: ``weight`` or ``activation``.
        raw: the fields.

    Raises:
        HawqError: bits or a code format that do not exist for such a site, an unknown or missing field, or a number
            that cannot be; the message names it.
    """
    what = f"a candidate of {shown(name)}"
    data: JsonObject = with_infinity(table(raw, what), (*_NUMBERS, "q", "q_stderr"))
    check_names(data, what, ("bits", "code", "omega", "perturbation"), ("scale", "zero_point", "q", "q_stderr"))
    code = text(data["code"], f"code of {what}")
    check_choice(name, kind, data["bits"], code)
    scale, zero = data.get("scale"), data.get("zero_point")
    if scale is not None and number(scale, f"scale of {what}", low=0.0) == 0.0:
        raise HawqError(f"scale of {what} is 0; it must be positive")
    return Candidate(
        data["bits"],
        code,
        _real(data["omega"], f"omega of {what}"),
        _real(data["perturbation"], f"perturbation of {what}", low=0.0),
        None if scale is None else float(scale),
        None if zero is None else whole(zero, f"zero_point of {what}", 0, 255),
        *(None if data.get(key) is None else _real(data[key], f"{key} of {what}") for key in ("q", "q_stderr")),
    )


def _real(value: object, what: str, low: float = -math.inf) -> float:
    """A number that is finite, or infinite where a float overflowed."""
    return math.inf if value == math.inf else number(value, what, low)


def _whole(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
        raise HawqError(f"The plan's {what} is {value!r}, not a whole number.")
    return value


def check_choice(name: str, kind: str, bits: object, code: str) -> None:
    """Raise HawqError unless ``bits`` and ``code`` exist for a site of this kind.

    Args:
        name: of the site, for messages.
        kind: ``weight`` or ``activation``.
        bits: 1 to 8 for weights, 2 to 8 for activations.
        code: code format.
    """
    if kind not in ("weight", "activation"):
        raise HawqError(f"Site {name!r}: kind is {kind!r}; use 'weight' or 'activation'.")
    allowed = WEIGHT_BITS if kind == "weight" else ACTIVATION_BITS
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in allowed:
        near_to = bits if isinstance(bits, (int, float)) and not isinstance(bits, bool) else allowed[-1]
        close = min(allowed, key=lambda b: abs(b - near_to))
        raise HawqError(
            f"Site {name!r}: {shown(bits)} bits is out of range for {kind}s "
            f"({allowed[0]} to {allowed[-1]}); the nearest is {close}."
        )
    if code not in CODE_FORMATS:
        near = nearest(str(code), CODE_FORMATS)
        raise HawqError(f"Site {name!r}: code format {code!r} is unknown; use one of {', '.join(CODE_FORMATS)}.{near}")
