"""What a measurement leaves for the user to read, on the callback that measures and on the one that quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Candidate
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import JsonObject
from hawq_lightning.selection import Frontier, Outlook
from hawq_lightning.sensitivity import Sensitivity

Value = TypeVar("Value")
_WHEN = "it is there once trainer.fit has started to measure."


@dataclass
class Results:
    """What has been measured so far.

    Attributes:
        sites: the tensors that get quantizers.
        sensitivity: their traces.
        frontier: of Omega and size.
        no_frontier: why there is none.
        no_sensitivity: why there is none.
        candidates: site -> bit-widths that were weighed.
        loss_per_site: predicted and measured loss changes.
        outlook: what plans are expected to cost.
    """

    sites: SiteTable | None = None
    sensitivity: Sensitivity | None = None
    frontier: Frontier | None = None
    no_frontier: str = _WHEN
    no_sensitivity: str = _WHEN
    candidates: Mapping[str, tuple[Candidate, ...]] = field(default_factory=dict)
    loss_per_site: list[JsonObject] = field(default_factory=list)
    outlook: Outlook | None = None

    def no_traces(self) -> None:
        """None were measured."""
        reason = "no traces were measured, since the selector reads none: MeasureTraces measures them all the same."
        self.sensitivity, self.frontier = None, None
        self.no_sensitivity = self.no_frontier = reason


class HasResults:
    """A callback that shows them; what is not there yet raises HawqError."""

    results: Results

    @property
    def sites(self) -> SiteTable:
        """The tensors that get quantizers."""
        return there(self.results.sites, "table of sites")

    @property
    def has_sensitivity(self) -> bool:
        """Whether traces were measured, or taken from a file or a checkpoint."""
        return self.results.sensitivity is not None

    @property
    def sensitivity(self) -> Sensitivity:
        """The traces that were measured or given."""
        return there(self.results.sensitivity, "sensitivity", self.results.no_sensitivity)

    @property
    def frontier(self) -> Frontier:
        """Every plan that no other beats in both Omega and size."""
        return there(self.results.frontier, "frontier", self.results.no_frontier)

    @property
    def candidates(self) -> Mapping[str, tuple[Candidate, ...]]:
        """Bit-widths weighed for every site, by its name."""
        return self.results.candidates

    @property
    def outlook(self) -> Outlook:
        """What plans are expected to cost, with ``MeasureConfig(forecast=...)`` or a budget by loss."""
        return there(self.results.outlook, "outlook", "give MeasureConfig(forecast='fast'), or a budget by loss.")

    @property
    def loss_per_site(self) -> list[JsonObject]:
        """Predicted and measured loss changes, with ``MeasureConfig(loss_per_site=True)``."""
        return self.results.loss_per_site


def there(value: Value | None, what: str, reason: str = _WHEN) -> Value:
    """The value.

    Args:
        value: or ``None``.
        what: it is called.
        reason: why it is not there.

    Raises:
        HawqError: it is not there.
    """
    if value is None:
        raise HawqError(f"There is no {what}: {reason}")
    return value
