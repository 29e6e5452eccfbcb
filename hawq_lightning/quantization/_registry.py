"""Quantizers by name. A user's own is a class in the user's own file, under ``@register_quantizer("name")``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TypeVar

from hawq_lightning._config import QuantizerConfig, config_check
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._registry import Registry
from hawq_lightning._types import Options
from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer

Weight = TypeVar("Weight", bound=type[WeightQuantizer])


@dataclass(frozen=True)
class QuantizerSpec:
    """A registered quantizer with its options.

    Attributes:
        name: as registered.
        weight: class of the weight quantizers.
        activation: class of the activation quantizers.
        freezes_norms: the callback HAWQ freezes BatchNorm's statistics while the method trains.
        options: keywords of the two classes.
    """

    name: str
    weight: type[WeightQuantizer]
    activation: type[ActivationQuantizer]
    freezes_norms: bool = False
    options: Mapping[str, object] = field(default_factory=dict)

    def weight_quantizer(self, channels: int, axis: int = 0) -> WeightQuantizer:
        """A new weight quantizer, off.

        Raises:
            HawqError: an option out of range.
        """
        quantizer = self.weight(channels, axis, **self._options(self.weight))
        quantizer.named(self.name)
        return quantizer

    def activation_quantizer(self) -> ActivationQuantizer:
        """A new activation quantizer, off.

        Raises:
            HawqError: an option out of range.
        """
        return self.activation(**self._options(self.activation))

    def _options(self, of: type) -> Options:
        possible = option_names(of)
        return {k: v for k, v in self.options.items() if k in possible}


QUANTIZERS: Registry[QuantizerSpec] = Registry("quantizer")


def register_quantizer(
    name: str, *, activation: type[ActivationQuantizer] = ActivationQuantizer, freezes_norms: bool = False
) -> Callable[[Weight], Weight]:
    """Class decorator: make a weight quantizer known by name, together with the activation quantizer beside it.

    Args:
        name: lower-case letters, digits and underscores; goes into plans and checkpoints.
        activation: class of the activation quantizers.
        freezes_norms: the callback HAWQ freezes BatchNorm's statistics while it trains.

    Raises:
        HawqError: another quantizer has this name.
    """

    def add(weight: Weight) -> Weight:
        QUANTIZERS.add(name, QuantizerSpec(name, weight, activation, freezes_norms), source=weight)
        return weight

    return add


def quantizer_names() -> tuple[str, ...]:
    """Every registered name."""
    return QUANTIZERS.names


def quantizer_named(name: str | QuantizerSpec, options: Mapping[str, object] | None = None) -> QuantizerSpec:
    """A quantizer by name, its options checked.

    Args:
        name: as registered.
        options: keywords of its classes, such as ``{"ranges": "percentile"}``.

    Raises:
        HawqError: no such quantizer or option (names the nearest), or an option out of range.
    """
    if isinstance(name, QuantizerSpec):
        return quantizer_named(name.name, {**name.options, **options}) if options else name
    spec = QUANTIZERS[name]
    possible = option_names(spec.weight) | option_names(spec.activation)
    for key in options or {}:
        if key not in possible:
            raise HawqError(
                f"Quantizer {name!r} has no option {key!r}; it has {', '.join(sorted(possible)) or 'none'}."
                f"{nearest(str(key), possible)}"
            )
    spec = QuantizerSpec(spec.name, spec.weight, spec.activation, spec.freezes_norms, dict(options or {}))
    spec.weight_quantizer(1), spec.activation_quantizer()  # values are checked before anything is measured
    return spec


@config_check(QuantizerConfig)
def check_quantizer(config: QuantizerConfig) -> None:
    """Refuse an unknown quantizer, and options that it does not have or that are out of range.

    Raises:
        HawqError: as :func:`quantizer_named`.
    """
    quantizer_of(config)


def quantizer_of(config: QuantizerConfig) -> QuantizerSpec:
    """The quantizer that a config names, with its options."""
    return quantizer_named(config.name, config.options)


def option_names(of: type) -> set[str]:
    """Keyword-only arguments of a quantizer's class."""
    return {p.name for p in inspect.signature(of).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}


_OF_A_RUN = (".hawq_lightning.json", ".hydra", "metrics.json", "unfinished.json")


def import_quantizers(files: Iterable[str]) -> None:
    """Import the user's modules, whose quantizers register themselves.

    Args:
        files: module names, or paths of ``.py`` files.

    Raises:
        HawqError: one cannot be found or imported.
    """
    for name in [files] if isinstance(files, str) else files:
        module, path = name, None
        if name.endswith(".py"):
            path = Path(name).resolve()
            if not path.is_file():
                raise HawqError(f"No file {name} to import quantizers from.")
            module = path.stem
            if any((path.parent / n).exists() for n in _OF_A_RUN):  # its other files are not to be found by name
                _import_alone(path, name)
                continue
            if str(path.parent) not in sys.path:  # where processes that are started later look too
                sys.path.insert(0, str(path.parent))
        try:
            where = getattr(importlib.import_module(module), "__file__", None) or "built in"
            if path is not None and Path(where).resolve() != path:
                raise HawqError(f"{name} is hidden by another module {module!r}, {where}; rename the file.")
        except HawqError:
            raise
        except Exception as error:
            raise HawqError(f"Cannot import quantizers from {name}: {type(error).__name__}: {error}.") from error


def _import_alone(path: Path, name: str) -> None:
    """Import a file whose folder must not be on the path."""
    loaded = sys.modules.get(path.stem)
    if loaded is not None:
        if Path(getattr(loaded, "__file__", None) or "").resolve() != path:
            raise HawqError(f"{name} is hidden by another module {path.stem!r}; rename the file.")
        return
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise HawqError(f"Cannot import quantizers from {name}: {type(error).__name__}: {error}.") from error


register_quantizer("uniform")(WeightQuantizer)
