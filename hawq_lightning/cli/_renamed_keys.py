"""Keys of release 0.1.0 on a command line: one sentence with the key that took the place of each."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hawq_lightning._errors import HawqError

_GROUPS = {"selector": "select", "sensitivity": "measure"}
_KEYS = {
    "selector.name": "select.selector",
    "sensitivity.draw": "measure.sampling",
    "sensitivity.stop": "measure.stop_when",
    "quantizer.codes": "quantizer.code_format",
    "quantizer.imports": "imports",
    "hawq.codes": "quantizer.code_format",
    "hawq.quantizer_options": "quantizer.options",
    "hawq.selector": "select.selector",
    "hawq.l1": "measure.l1_curvature",
    "hawq.draw": "measure.sampling",
    "hawq.stop": "measure.stop_when",
    "hawq.check_loss": "measure.loss_per_site",
    "hawq.selection_seed": "select.seed",
    "hawq.start": "hawq.start_epoch",
    **{f"hawq.{k}": f"quantizer.{k}" for k in ("weight_bits", "activation_bits", "input_bits", "include", "exclude")},
    **{f"hawq.{k}": f"measure.{k}" for k in ("estimator", "images", "rtol", "max_probes", "precision")},
    **{f"hawq.{k}": f"measure.{k}" for k in ("loss_fn", "seed", "cache")},
    **{f"hawq.{k}": f"select.{k}" for k in ("budget", "constraints", "bits", "latency")},
    "fine_tuning.freeze_batchnorm": "fine_tuning=freeze fine_tuning.freeze.batchnorm",
    "fine_tuning.freeze_ranges": "fine_tuning=freeze fine_tuning.freeze.ranges",
    "fine_tuning.distill": "fine_tuning=distillation fine_tuning.distillation.weight",
    "fine_tuning.distill_temperature": "fine_tuning=distillation fine_tuning.distillation.temperature",
    "fine_tuning.order": "fine_tuning=blockwise fine_tuning.blockwise.by",
    "fine_tuning.order_until": "fine_tuning=blockwise fine_tuning.blockwise.until",
}
_OVERRIDE = re.compile(r"^(?P<mark>\+{0,2}|~)/?(?P<key>[\w./]+)(?P<value>=.*)?$", re.DOTALL)


def check_renamed(argv: Sequence[str]) -> None:
    """Refuse keys that have another name now.

    Args:
        argv: arguments of the command line, without the program's name.

    Raises:
        HawqError: the first such key, with the whole override as it is written now.
    """
    for argument in argv:
        match = _OVERRIDE.match(argument)
        new = None if match is None else new_name(match["key"])
        if match is not None and new is not None:
            raise HawqError(f"{match['key']} is {new.split()[-1]} now: {match['mark']}{new}{match['value'] or ''}")


def new_name(key: str) -> str | None:
    """What to write now in the place of an old key, or ``None`` if nothing has changed."""
    if key in _KEYS:
        return _KEYS[key]
    group, dot, field = key.partition(".")
    if group not in _GROUPS:
        return None
    return f"{_GROUPS[group]}{dot}{field}"
