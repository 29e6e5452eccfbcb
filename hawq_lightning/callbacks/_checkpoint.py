"""``load_from_checkpoint`` for quantized modules, without a Trainer."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._patterns import WRAPPERS
from hawq_lightning._sites import quantizable_layers
from hawq_lightning._types import Options, StateDict
from hawq_lightning.quantization import (
    prepare,
    prepare_attention_of,
    prepare_results_of,
    quantizer_named,
    trained_quantizers,
)

Module = TypeVar("Module", bound=LightningModule)
_SWAPPING = threading.RLock()


def load_from_checkpoint(module_class: type[Module], path: str | Path, **kwargs: Any) -> Module:
    """As ``module_class.load_from_checkpoint(path, **kwargs)``, with the quantized layers that the checkpoint holds.

    Args:
        module_class: the LightningModule's class.
        path: of a checkpoint; a float one is loaded as usual.
        kwargs: passed on.

    Returns:
        the module, with the quantizers enabled that were so when it was saved.

    Raises:
        HawqError: a quantizer of the user's own whose file was not imported, layers that the module lacks, or a folder
            of shards.
    """
    if Path(path).is_dir():
        raise HawqError(
            f"The checkpoint {path} is a folder of shards; make one file of it: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    thread = threading.get_ident()

    def with_fake_quant_layers(self: Module, checkpoint: StateDict) -> None:
        original(self, checkpoint)  # it may build layers
        if threading.get_ident() != thread:
            return
        strict = kwargs.get("strict")
        strict = self.strict_loading if strict is None else strict
        _prepare_layers(self, checkpoint["state_dict"], checkpoint.get("callbacks", {}), strict)

    # Lightning makes the module and fills it in one class method; this hook is all that it calls in between. An
    # instance's own hook would come too late, and a subclass would be seen: by __init_subclass__, by registries, by
    # LightningCLI. So the class's is another one for that long, which other threads do not notice.
    with _SWAPPING:
        original = module_class.on_load_checkpoint
        overridden = "on_load_checkpoint" in module_class.__dict__
        module_class.on_load_checkpoint = with_fake_quant_layers  # type: ignore[assignment, method-assign]
        try:
            return module_class.load_from_checkpoint(path, **kwargs)
        finally:
            if overridden:
                module_class.on_load_checkpoint = original  # type: ignore[method-assign]
            else:
                del module_class.on_load_checkpoint


def _prepare_layers(
    module: LightningModule, state_dict: Mapping[str, object], callbacks: StateDict, strict: bool
) -> None:
    """Make fake-quant layers of those that a state dict has quantizers of."""
    names_of: dict[str, set[str]] = {}  # quantizer -> modules
    for name, quantizer in trained_quantizers(state_dict).items():
        names_of.setdefault(quantizer, set()).add(".".join(p for p in name.split(".") if p not in WRAPPERS))
    quantizable = {id(reader.module): reader.module for reader in quantizable_layers(module)[0].values()}
    # a submodule under several names is in the state dict under each of them
    modules = {
        ".".join(p for p in n.split(".") if p not in WRAPPERS): quantizable[id(m)]
        for n, m in module.named_modules(remove_duplicate=False)
        if id(m) in quantizable
    }
    for quantizer, names in names_of.items():
        if strict and (missing := sorted(names - set(modules))):
            hint = nearest(missing[0], modules)
            raise HawqError(
                f"The checkpoint has a quantized layer {missing[0]!r}, which {type(module).__name__} lacks.{hint}"
            )
        spec = quantizer_named(quantizer, _options(callbacks, quantizer))
        if chosen := {id(modules[n]) for n in names if n in modules}:
            prepare(module, include=lambda name, layer, chosen=chosen: id(layer) in chosen, quantizer=spec)
    prepare_attention_of(module, state_dict)
    prepare_results_of(module, state_dict)


def _options(callbacks: StateDict, quantizer: str) -> Options:
    """A quantizer's options, which stand in the plan that a callback of ours saved beside the state dict."""
    plans = [s["plan"] for s in callbacks.values() if isinstance(s, dict) and isinstance(s.get("plan"), dict)]
    return next((p.get("quantizer_options") or {} for p in plans if p.get("quantizer") == quantizer), {})
