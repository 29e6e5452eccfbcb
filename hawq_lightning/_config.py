"""Every setting of the method, its one default, and its check: what to quantize, how to measure, how to choose.

Callback, functions and shell take these objects, so that they measure and choose alike. They are checked when made:
here what takes no knowledge of a package, and by :func:`config_check` what does (names, options, budgets).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from hawq_lightning._batches import batch_images
from hawq_lightning._errors import HawqError, choice
from hawq_lightning._patterns import Patterns, as_list
from hawq_lightning._plan import ACTIVATION_BITS, WEIGHT_BITS
from hawq_lightning._registry import check_registered
from hawq_lightning._types import Batch, BatchSizeFn, Budget, LossFn

CodeFormat = Literal["auto", "affine", "midrise"]
Deploy = Literal["exact", "integer"]
Kernel = Literal["torch", "triton"]
Sampling = Literal["auto", "all", "curvature"]
L1Curvature = Literal["fisher", "zero"]
Precision = Literal["float32", "bf16"]
StopWhen = Literal["rtol", "stable_plan"]
ForecastMode = Literal["fast", "accurate"]
Distribution = Literal["rademacher", "gaussian"]

Config = TypeVar("Config", "QuantizerConfig", "MeasureConfig", "SelectConfig")
_CHECKS: dict[str, list[Callable[[Any], None]]] = {}


def config_check(config_class: type[Config]) -> Callable[[Callable[[Config], None]], Callable[[Config], None]]:
    """Decorator of a package's function that is called with every config of a class as it is made, and may refuse it.

    Configs stand before all packages and import none: what takes a package's knowledge comes to them by this.
    """

    def add(check: Callable[[Config], None]) -> Callable[[Config], None]:
        _CHECKS.setdefault(config_class.__name__, []).append(check)
        return check

    return add


def _check(config: object) -> None:
    for check in _CHECKS.get(type(config).__name__, ()):
        check(config)


def with_shorthands(config: Config, **fields: object) -> Config:
    """A config with fields that were given beside it, by a callback's own keywords.

    Args:
        config: as made by the user, or with defaults.
        fields: field -> value.

    Raises:
        HawqError: the config sets one of them, to something else than its default.
    """
    default = type(config)()
    for name in fields:
        if getattr(config, name) != getattr(default, name):
            kind = type(config).__name__
            raise HawqError(f"{name} is given twice, by itself and in {kind}({name}={getattr(config, name)!r}).")
    return replace(config, **fields) if fields else config  # type: ignore[arg-type]


@dataclass(frozen=True)
class QuantizerConfig:
    """What gets quantizers, of which kind, and which bit-widths there are to choose from.

    Raises:
        HawqError: a value out of range, or an unknown quantizer or option; the nearest valid choice is named.
    """

    name: str = "uniform"
    """Registered name, see :func:`hawq_lightning.quantization.quantizer_names`."""
    weight_bits: int | Sequence[int] = (2, 4, 8)
    """Widths that weights may take, 1 to 8."""
    activation_bits: int | Sequence[int] | None = 8
    """Widths that activations may take, 2 to 8; ``None`` leaves activations float."""
    input_bits: int | None = 8
    """Width of what the network itself reads; ``None``: as other activations."""
    code_format: CodeFormat = "auto"
    """Codes of weights of 2 bits and more: ``affine`` has zero on its grid, ``midrise`` has levels at odd halves."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the quantizer's classes, such as ``{"ranges": "percentile"}``."""
    include: Patterns = None
    """Glob on layer names, layer type, or ``f(name, module) -> bool``; several mean any of them. ``None``: all."""
    exclude: Patterns = None
    """The same forms as ``include``, over which it wins."""
    attention: bool = False
    """Queries, keys, probabilities and values of attention are activation sites as well: what its products read."""
    deploy: Deploy = "exact"
    """``integer``: results that integer kernels keep as codes have grids of 8 bits, and biases are INT32."""
    kernel: Kernel = "torch"
    """What fake-quantizes in training: ``triton`` is one fused kernel a pass on an NVIDIA GPU; never measured yet."""

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, "weight")
        if self.activation_bits is not None:
            check_bits(self.activation_bits, "activation")
        if self.input_bits is not None:
            check_bits(self.input_bits, "input")
        if self.attention and self.activation_bits is None:
            raise HawqError("attention=True quantizes what attention reads; give activation_bits, such as 8.")
        choice("deploy", self.deploy, get_args(Deploy))
        choice("kernel", self.kernel, get_args(Kernel))
        if self.deploy == "integer" and self.activation_bits is None:
            raise HawqError('deploy="integer" needs activations on grids; give activation_bits, such as 8.')
        choice("code_format", self.code_format, get_args(CodeFormat))
        for name in ("include", "exclude"):
            value = getattr(self, name)
            patterns = as_list(value, f"QuantizerConfig({name}=...)")
            if isinstance(value, Iterable) and not isinstance(value, (str, type, list, tuple)):
                object.__setattr__(self, name, tuple(patterns))  # a generator gives them once
        for name in ("weight_bits", "activation_bits"):  # lists, as YAML has them, become what the default is
            value = getattr(self, name)
            if isinstance(value, Iterable):
                object.__setattr__(self, name, tuple(value))
        _check(self)

    @property
    def integer_grids(self) -> Literal["none", "shared", "own"]:
        """Of :func:`hawq_lightning.sites`: a result lies on the grid of layers that read it where that has 8 bits."""
        if self.deploy != "integer" or self.activation_bits is None:
            return "none"
        whole_bytes = check_bits(self.activation_bits, "activation") == (8,) and self.input_bits in (8, None)
        return "shared" if whole_bytes else "own"


@dataclass(frozen=True)
class MeasureConfig:
    """How Hessian traces are measured (paper sections 2.1, 2.2 and 3.1).

    Raises:
        HawqError: a value out of range or an unknown name; the nearest valid choice is named.
    """

    estimator: str = "auto"
    """Registered name: ``auto``, ``ggn``, ``hessian``, ``hutchinson`` or ``exact``."""
    images: int = 512
    """How many samples of the train data the callback measures on."""
    rtol: float = 0.05
    """Standard error to reach, as a share of each trace."""
    max_probes: int = 64
    """Random vectors a batch at the most."""
    distribution: Distribution = "rademacher"
    """Of Hutchinson's vectors."""
    rotate: bool = True
    """Rotate the signs onto the softmax factor's singular vectors: unbiased, less noise."""
    sampling: Sampling = "auto"
    """Samples that a step sends back: ``all``, drawn in proportion to ``curvature``, or what pays: ``auto``."""
    l1_curvature: L1Curvature = "fisher"
    """What L1 losses count as, which have no curvature: ``fisher`` of a Laplace distribution, or ``zero``."""
    precision: Precision = "float32"
    """Of the passes that measure; ``bf16`` is used only where a probe agrees with float32 within 5%."""
    stop_when: StopWhen = "rtol"
    """``stable_plan``: also as soon as the plan no longer changes."""
    loss_per_site: bool = False
    """Also measure what every site and width costs alone, KL and loss, on held-out data: sites x widths passes."""
    quadratic_forms: bool = False
    """Also measure Q, the quadratic form of the real rounding error, of every site and width, in the same passes."""
    forecast: ForecastMode | None = None
    """Also forecast what every plan will cost: ``fast`` (one point of the path) or ``accurate`` (three)."""
    loss_fn: LossFn | None = None
    """``loss_fn(module, batch) -> scalar`` in the place of ``training_step``."""
    batch_dim: int = 0
    """Axis of the inputs that goes by samples; 1 for (time, batch)."""
    batch_size_fn: BatchSizeFn | None = None
    """``batch_size_fn(batch) -> samples in it``, for batches of classes of your own."""
    seed: int = 0
    """Of all random draws."""
    cache: str | Path | None = None
    """Folder of measurements that runs share: the same weights, data and settings are measured once."""

    def __post_init__(self) -> None:
        check_registered("estimator", self.estimator)
        whole("images", self.images, 1)
        whole("max_probes", self.max_probes, 1)
        whole("batch_dim", self.batch_dim, 0)
        if isinstance(self.rtol, bool) or not isinstance(self.rtol, Real) or not 0 < self.rtol < math.inf:
            raise HawqError(f"rtol is {self.rtol!r}; it is a share of each trace such as 0.05.")
        choice("distribution", self.distribution, get_args(Distribution))
        choice("sampling", self.sampling, get_args(Sampling))
        choice("l1_curvature", self.l1_curvature, get_args(L1Curvature))
        choice("precision", self.precision, get_args(Precision))
        choice("stop_when", self.stop_when, get_args(StopWhen))
        if self.forecast is not None:
            choice("forecast", self.forecast, get_args(ForecastMode))
        _check(self)

    def samples(self, batch: Batch) -> int:
        """Number of samples in a batch.

        Raises:
            HawqError: it cannot be told, or ``batch_size_fn`` returned no whole number above zero.
        """
        if self.batch_size_fn is None:
            return batch_images(batch, dim=self.batch_dim)
        number = self.batch_size_fn(batch)
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise HawqError(f"batch_size_fn returned {number!r}; it returns the number of samples in a batch.")
        return int(number)


@dataclass(frozen=True)
class SelectConfig:
    """How bit-widths are chosen (paper section 2.3).

    Raises:
        HawqError: a budget that cannot be read, or an unknown selector, score or constraint; the nearest is named.
    """

    budget: Budget | None = "8x"
    """``"8x"``, ``"3.5bit"``, ``"8MB"``, ``{"bops": "50%"}``, ``{"kl": 0.02}``, ``{"agreement": "99%"}``, several."""
    selector: str = "pareto"
    """Registered name: ``pareto`` (exact), ``monotone`` (the paper's set B), ``uniform`` ..."""
    score: str = "omega"
    """Registered name of what selection minimises."""
    constraints: Mapping[str, Any] | None = None
    """Keywords of :class:`hawq_lightning.selection.Problem`: ``ties``, ``fixed``, ``min_bits`` ..."""
    bits: Mapping[str, int] | str | Path | None = None
    """Of ``selector="manual"``: site or glob -> bits, or a file of them."""
    latency: str | Path | None = None
    """CSV of milliseconds a layer and width, as ``hawq-lightning-export`` writes it; for a latency budget."""
    energy: str | Path | None = None
    """CSV of picojoules a MAC and a byte, for an energy budget; ``None``: 45 nm by Horowitz (ISSCC 2014)."""
    trials: int = 100
    """Plans that a search measures: ``haq``, ``optuna``, ``random_search``."""
    seed: int | None = None
    """Of random selectors; ``None``: that of the measurement."""

    def __post_init__(self) -> None:
        whole("trials", self.trials, 1)
        _check(self)


def check_bits(values: int | Iterable[int], kind: str) -> tuple[int, ...]:
    """Bit-widths as an ascending tuple.

    Args:
        values: a width or several.
        kind: ``weight``, ``activation``, or ``input``, which can have one width only.

    Raises:
        HawqError: not whole numbers, or out of range (1 to 8 for weights, 2 to 8 for activations).
    """
    allowed = WEIGHT_BITS if kind == "weight" else ACTIVATION_BITS
    widths = list(values) if isinstance(values, Iterable) else [values]
    if not widths:
        raise HawqError(f"{kind}_bits is empty; give at least one width from {allowed[0]} to {allowed[-1]}.")
    if kind == "input" and len(widths) > 1:
        raise HawqError(f"input_bits is {values!r}; what the network reads has one width, such as {widths[-1]!r}.")
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, Integral) or width not in allowed:
            near = min(allowed, key=lambda b: abs(b - float(width))) if isinstance(width, Real) else allowed[-1]
            raise HawqError(
                f"{kind}_bits has {width!r}; allowed are {allowed[0]} to {allowed[-1]}, the nearest is {near}."
            )
    return tuple(sorted({int(width) for width in widths}))


def whole(what: str, value: object, least: int) -> int:
    """Return ``value`` if it is a whole number of ``least`` or more.

    Raises:
        HawqError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise HawqError(f"{what} is {value!r}; it is a whole number, {least} or more.")
    return value
