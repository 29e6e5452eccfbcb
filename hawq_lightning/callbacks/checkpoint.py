"""``load_from_checkpoint`` for quantized modules, without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from hawq_lightning.quantization import install
from hawq_lightning.quantization.quantizers import named_in

Module = TypeVar("Module", bound=LightningModule)
_MARK = ".weight_quantizer.width"


def load_from_checkpoint(module_class: type[Module], path: str | Path, **kwargs: Any) -> Module:
    """As ``module_class.load_from_checkpoint(path, **kwargs)``, with the quantized layers that the checkpoint holds.

    Args:
        module_class: the LightningModule's class.
        path: of a checkpoint; a float one is loaded as usual.
        kwargs: passed on.

    Returns:
        the module, armed as it was saved.

    Raises:
        HawqError: a quantizer of the user's own whose file was not imported.
    """

    def load(self: Module, state_dict: Mapping[str, Any], *args: Any, **kw: Any) -> Any:
        twins: dict[str, set[str]] = {}  # quantizer -> layers
        for key in state_dict:
            if key.endswith(_MARK):
                prefix = key.removesuffix("width")
                own = named_in(k.removeprefix(prefix) for k in state_dict if k.startswith(prefix))
                twins.setdefault(own, set()).add(key.removesuffix(_MARK))
        for quantizer, names in twins.items():
            install(self, include=lambda name, module, names=names: name in names, quantizer=quantizer)  # type: ignore[misc]
        return original(self, state_dict, *args, **kw)

    original = module_class.load_state_dict
    own = "load_state_dict" in module_class.__dict__
    module_class.load_state_dict = load  # type: ignore[assignment, method-assign]
    try:
        return module_class.load_from_checkpoint(path, **kwargs)
    finally:
        if own:
            module_class.load_state_dict = original  # type: ignore[method-assign]
        else:
            del module_class.load_state_dict
