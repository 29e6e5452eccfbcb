"""Code that asks for exact types takes fake-quant layers for something else: noticed by its loss."""

from __future__ import annotations

import inspect
import math
import re

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.quantization import float_classes
from hawq_lightning.sensitivity import isolated_eval, repeatable

_ASKS = re.compile(r"(\btype\([^()]*\)|\b__class__)\s*(==|!=|is\b|in\b|not in\b|\])")
_AGAIN = 4  # runs that tell a loss that draws from code that asks for types
_NOT_THE_USERS = ("torch.", "lightning.", "hawq_lightning.", "builtins")


def check_exact_types(module: nn.Module, batch: Batch, loss_fn: LossFn) -> None:
    """Warn if the loss of a batch is another one with fake-quant layers, all of them off, than with the float layers.

    A loss that is another one at every call is told as that.

    Args:
        module: left as it was, random states included.
        batch: that it is run on.
        loss_fn: runs the module on it.

    Raises:
        HawqError: the step fails with fake-quant layers only.
    """
    try:
        with float_classes(module):
            before = _loss(module, batch, loss_fn)
    except Exception:  # not by our layers: the measurement meets it, and says it
        return
    try:
        after = _loss(module, batch, loss_fn)
    except Exception as error:
        raise HawqError(
            f"The step fails with fake-quant layers ({type(error).__name__}: {error}), and works with the layers that "
            f"they stand in for{_where(module)}: ask for isinstance(m, torch.nn.Conv2d), which holds for both."
        ) from error
    # the same products in the same order, but for attention, which torch may fuse
    widest = max((torch.finfo(p.dtype).eps for p in module.parameters() if p.is_floating_point()), default=1e-7)

    def differs(other: float) -> bool:
        return not math.isclose(before, other, rel_tol=widest**0.5, abs_tol=widest) and not math.isnan(before)

    if not differs(after):
        return
    with float_classes(module):  # more than once: two draws may come close to one another by chance
        other = next(filter(differs, (_loss(module, batch, loss_fn) for _ in range(_AGAIN))), None)
    if other is not None:
        rank_zero_warn(
            f"HAWQ: a batch has loss {before:.6g}, and {other:.6g} when the same network runs on it again: the loss is "
            "not repeatable, since it draws from random numbers of its own that cannot be put back, or depends on how "
            "often it was called. Draw from the global generators of torch, NumPy or Python, keep the generator as an "
            "attribute of the module, or give MeasureConfig(loss_fn=...) without the draws; else traces are those of "
            "many losses."
        )
    else:
        rank_zero_warn(
            f"HAWQ: a batch has loss {after:.6g} with fake-quant layers that are off, and {before:.6g} with the layers "
            f"that they stand in for: some code asks for exact types{_where(module)}. Ask for "
            "isinstance(m, torch.nn.Conv2d), which holds for both; else traces and training are those of another loss."
        )


def _loss(module: nn.Module, batch: Batch, loss_fn: LossFn) -> float:
    with isolated_eval(module), torch.enable_grad():
        return float(repeatable(module, loss_fn)(module, batch).detach())


def _where(module: nn.Module) -> str:
    """The first line of the module's own classes that looks like it."""
    classes = dict.fromkeys(c for m in module.modules() for c in type(m).__mro__)
    for c in classes:
        if f"{c.__module__}.".startswith(_NOT_THE_USERS):
            continue
        try:
            source = inspect.getsource(c)
        except (OSError, TypeError):  # made in a notebook, or in C
            continue
        for line in source.splitlines():
            if _ASKS.search(line):
                return f" ({c.__name__}: {line.strip()})"
    return ""
