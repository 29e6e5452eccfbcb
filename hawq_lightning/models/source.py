"""Networks that come from another library: importing it, and its downloads or a file of one's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from hawq_lightning.errors import HawqError
from hawq_lightning.models.weights import load_weights

N = TypeVar("N", bound=nn.Module)


def require(module: str, extra: str) -> Any:
    """Import an optional dependency.

    Raises:
        HawqError: it is not installed; the message names the extra that brings it.
    """
    try:
        found: ModuleType = importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise HawqError(
            f"{package} cannot be imported ({error}); it comes with: pip install 'hawq-lightning[{extra}]'."
        ) from error
    return found


def build(
    name: str,
    make: Callable[[bool], N],
    *,
    pretrained: bool,
    weights: str | Path | None,
    source: str | None,
    head: str | None = None,
    rename: Callable[[str], str | None] | None = None,
) -> N:
    """Make a network with random, downloaded or given weights.

    Args:
        name: what the user calls the model.
        make: ``make(download) -> network``.
        pretrained: let the library that the model is from download its weights.
        weights: a state dict on disk instead.
        source: whose download it is; None where nobody publishes weights for this variant.
        head: as in :func:`~hawq_lightning.models.weights.load_weights`.
        rename: likewise.

    Raises:
        HawqError: both were asked for, nobody publishes such weights, the download failed, or the file does not fit.
    """
    if pretrained and weights is not None:
        raise HawqError(f"{name}: give either pretrained=true or weights={weights}, not both.")
    if not pretrained:
        net = make(False)
        return net if weights is None else load_weights(net, weights, head=head, rename=rename)
    if source is None:
        raise HawqError(f"{name}: nobody publishes weights for this variant; use weights=/path/to/state_dict.pt.")
    try:
        return make(True)
    except (OSError, RuntimeError) as error:  # no network, a full disk, a file that fails its hash
        raise HawqError(
            f"{name}: the download of its weights by {source} failed ({type(error).__name__}: {error}); "
            "fetch them elsewhere and use weights=/path/to/state_dict.pt."
        ) from error
