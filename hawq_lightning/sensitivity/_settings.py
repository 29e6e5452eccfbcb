"""What a call of ``measure`` may override of its config, and what it takes beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypedDict

from hawq_lightning._config import Distribution, L1Curvature, MeasureConfig, Precision, Sampling
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._patterns import Patterns, as_list
from hawq_lightning._types import BatchSizeFn
from hawq_lightning.sensitivity._result import Sensitivity
from hawq_lightning.sensitivity._rounding import RoundingErrors

StopFn = Callable[[Sensitivity], bool]
"""From the traces measured so far to whether they will do."""


class MeasureOverrides(TypedDict, total=False):
    """Keywords of :func:`hawq_lightning.measure`: fields of :class:`MeasureConfig`, and what is no setting."""

    estimator: str
    rtol: float
    max_probes: int
    distribution: Distribution
    rotate: bool
    sampling: Sampling
    l1_curvature: L1Curvature
    precision: Precision
    seed: int
    include: Patterns
    exclude: Patterns
    batch_dim: int
    batch_size_fn: BatchSizeFn
    stop: StopFn | None
    rounding: RoundingErrors | None


@dataclass(frozen=True)
class MeasureSettings:
    """Config and keywords of one call.

    Attributes:
        config: how to measure.
        include: which layers; see :func:`hawq_lightning.sites`.
        exclude: which layers not.
        stop: whether the traces so far will do, however large the errors.
        rounding: errors whose quadratic forms are measured in the same passes.
    """

    config: MeasureConfig
    include: Patterns = None
    exclude: Patterns = None
    stop: StopFn | None = None
    rounding: RoundingErrors | None = None

    @classmethod
    def of(cls, config: MeasureConfig | None, overrides: Mapping[str, object]) -> MeasureSettings:
        """Settings from a config and keywords beside it.

        Args:
            config: ``None``: the defaults.
            overrides: see :class:`MeasureOverrides`.

        Raises:
            HawqError: a keyword that there is not, or a value that the config refuses.
        """
        keywords = MeasureOverrides.__annotations__
        for name in overrides:
            if name not in keywords:
                raise HawqError(
                    f"measure() takes no {name!r}; it takes {', '.join(keywords)}.{nearest(name, keywords)}"
                )
        beside = {k: v for k, v in overrides.items() if k in cls.__dataclass_fields__}
        beside |= {k: as_list(beside[k], k) for k in ("include", "exclude") if k in beside}
        fields = {k: v for k, v in overrides.items() if k not in beside}
        return cls(replace(config or MeasureConfig(), **fields), **beside)  # type: ignore[arg-type]

    @property
    def batch_size_fn(self) -> BatchSizeFn:
        """Number of samples in a batch."""
        return self.config.samples

    def text(self) -> str:
        """What the traces depend on, for the fingerprint; the order and form are those of release 0.1.0."""
        c = self.config
        words = [c.estimator, c.rtol, c.max_probes, c.distribution, c.rotate, c.sampling, c.l1_curvature]
        words.append(getattr(self.stop, "key", ""))
        if c.precision != "float32":
            words.append(c.precision)
        if self.rounding is not None:
            words.append(self.rounding.key)
        return " ".join(map(str, words))
