"""A plan: which bit-width and code format every site gets, and the numbers that led there (paper, Fig. 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._fields import sealed
from hawq_lightning._io import json_text, with_infinity, without_infinity, write_text
from hawq_lightning._plan_site import (
    ACTIVATION_BITS,
    WEIGHT_BITS,
    Candidate,
    PlanSite,
    check_choice,
    read_site,
    reconciled,
)
from hawq_lightning._sealed import load_sealed
from hawq_lightning._site_table import ActivationProduct, Layer, Site
from hawq_lightning._types import JsonObject, Options

__all__ = [
    "ACTIVATION_BITS",
    "FORMAT",
    "VERSION",
    "WEIGHT_BITS",
    "Candidate",
    "Plan",
    "PlanSite",
    "check_choice",
    "check_version",
]

FORMAT = "hawq_lightning.plan"
VERSION = 2


@dataclass(frozen=True)
class Plan:
    """Site -> bits and code format, with traces, costs, settings and the fingerprint that they came from.

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
        products: of attention, with their activation sites and MACs: BOPs, too.
        biases: layers whose biases are INT32 -> the BatchNorm that each takes in, or nothing.
    """

    sites: tuple[PlanSite, ...]
    layers: tuple[Layer, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)
    budget: object = None
    selector: str = "pareto"
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    quantizer: str = "uniform"
    quantizer_options: Options = field(default_factory=dict)
    products: tuple[ActivationProduct, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)

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

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""
        body = {f.name: getattr(self, f.name) for f in fields(self)}
        body["sites"] = [_plain(asdict(s)) for s in self.sites]
        body["layers"] = [_plain(asdict(layer)) for layer in self.layers]
        body["products"] = [_plain(asdict(product)) for product in self.products]
        for name in ("products", "biases"):
            if not body[name]:
                del body[name]
        numbers: JsonObject = without_infinity(body)  # the error of a single batch is infinite: not known
        return {"format": FORMAT, "version": VERSION} | numbers

    @classmethod
    def from_dict(cls, data: object) -> Plan:
        """Read what :meth:`to_dict` wrote; every field is checked, nothing is imported by name.

        Raises:
            HawqError: not a plan, an unknown version, or a field out of range; the message names it.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise HawqError(f'This is not a plan: expected a JSON object with "format": "{FORMAT}".')
        check_version(data.get("version"))
        names = {"format", "version", "sha256", *(f.name for f in fields(cls))}
        if extra := [k for k in data if k not in names]:
            raise HawqError(f"The plan has an unknown field {extra[0]!r}.{nearest(extra[0], names)}")
        try:
            sites = tuple(read_site(s) for s in data["sites"])
            layers = tuple(Layer.from_dict(layer) for layer in data.get("layers", []))
            plan = cls(
                sites=sites,
                layers=layers,
                costs={str(k): float(v) for k, v in data.get("costs", {}).items()},
                budget=data.get("budget"),
                selector=str(data.get("selector", "manual")),
                settings=with_infinity(dict(data.get("settings", {}))),
                fingerprint=str(data.get("fingerprint", "")),
                quantizer=str(data.get("quantizer", "uniform")),  # version 1 knew no other
                products=tuple(ActivationProduct.from_dict(p) for p in data.get("products", [])),
                biases={str(k): str(v) for k, v in data.get("biases", {}).items()},
                quantizer_options={str(k): v for k, v in data.get("quantizer_options", {}).items()},
            )
        except HawqError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise HawqError(f"The plan is damaged: {type(error).__name__}: {error}.") from error
        listed = [s.name for s in sites]
        if twice := sorted({n for n in listed if listed.count(n) > 1}):
            raise HawqError(f"The plan names these sites twice: {', '.join(twice)}.")
        if not listed:
            raise HawqError("The plan has no sites.")
        return plan

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically, with a checksum of what it says."""
        write_text(path, json_text(sealed(self.to_dict()), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read JSON written by :meth:`save` or by hand; warns of one that was changed since it was written.

        Raises:
            HawqError: no such file, no JSON, or no valid plan.
        """
        return load_sealed(path, "plan", cls.from_dict)

    def reconciled(self) -> Plan:
        """The plan with the code formats, grids and Ω that belong to its bits, where bits were edited by hand.

        A site was edited if what it carries is that of another width among its options. Costs are not touched: see
        :func:`hawq_lightning.selection.recost`.

        Raises:
            HawqError: an activation has no grid for its bits: the width was never weighed.
        """
        sites = tuple(reconciled(s) for s in self.sites)
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


def check_version(version: object) -> None:
    """Raise HawqError unless plans of this version can be read: 1 (quantizer ``uniform`` only) and 2."""
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise HawqError(
            f"Plan version {version} is newer than this release, which reads up to {VERSION}: update hawq_lightning, "
            "since what a newer version adds would be lost silently."
        )
    if version not in range(1, VERSION + 1) or isinstance(version, bool):
        raise HawqError(f"Plan version {version!r} is unknown here; this release reads 1 to {VERSION}.")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
