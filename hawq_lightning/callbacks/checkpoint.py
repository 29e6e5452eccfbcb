"""``load_from_checkpoint`` for quantized modules, without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from hawq_lightning.quantization import install

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
    """

    def load(self: Module, state_dict: Mapping[str, Any], *args: Any, **kw: Any) -> Any:
        names = {key.removesuffix(_MARK) for key in state_dict if key.endswith(_MARK)}
        if names:
            install(self, include=lambda name, module: name in names)
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
