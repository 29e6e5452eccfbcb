"""The one place of the golden record that knows how hawq_lightning spells things, before and after its refactoring.

Runs and facts are written in the words of release 0.1.0 (flat keywords, ``options``, ``width``). This module finds out
which API is installed and translates. Only names that packages export are looked up first; module files are tried
after them, so that the old layout works, too.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hawq_lightning

NEW = hasattr(hawq_lightning, "MeasureConfig")
FACES = ("", "callbacks", "quantization", "sensitivity", "selection", "export", "models", "tasks", "data")

# keyword of 0.1.0 -> what a field of a config, or an argument of a callback, may be called instead
ALIASES = {
    "start": ("start_epoch",),
    "quantizer": ("name", "method"),
    "quantizer_options": ("options", "keywords"),
    "distill": ("weight",),
    "distill_temperature": ("temperature",),
    "freeze_batchnorm": ("batchnorm",),
    "freeze_ranges": ("ranges",),
    "order": ("by",),
    "order_until": ("until",),
    "post_training": ("methods",),
}
COMPANIONS = {
    "Distillation": ("distill", "distill_temperature"),
    "FreezeSchedule": ("freeze_batchnorm", "freeze_ranges"),
    "BlockwiseOrder": ("order", "order_until"),
    "PostTraining": ("post_training",),
}
# last part of a state-dict key: new -> old
BUFFERS = {"num_bits": "width"}
# a settings key, a cost, a field: new -> old
SETTINGS: dict[str, str] = {}


def find(name: str, *places: str) -> Any:
    """The object called ``name``, from a package face or, failing that, from one of ``places`` below the package."""
    for place in (*FACES, *places):
        try:
            module = importlib.import_module(f"hawq_lightning.{place}".rstrip("."))
        except ModuleNotFoundError:
            continue
        found = getattr(module, name, None)
        if found is not None and not inspect.ismodule(found):
            return found
    raise LookupError(f"tests/golden/api.py finds no {name!r} in hawq_lightning's {', '.join(filter(None, FACES))}")


def attribute(thing: Any, *names: str) -> Any:
    """The first of several attributes that is there."""
    for name in names:
        if hasattr(thing, name):
            return getattr(thing, name)
    raise LookupError(f"tests/golden/api.py: {type(thing).__name__} has none of {', '.join(names)}")


# ---------------------------------------------------------------------------------------------------- callbacks


def hawq(**flat: Any) -> tuple[Any, list[Any]]:
    """The callback HAWQ and the list that goes to the Trainer, from the flat keywords of release 0.1.0."""
    if not NEW:
        callback = find("HAWQ")(**flat)
        return callback, [callback]
    flat = dict(flat)
    companions = []
    for kind, keywords in COMPANIONS.items():
        given = {k: flat.pop(k) for k in keywords if k in flat}
        if given.get(keywords[0]) or (kind == "FreezeSchedule" and given):
            companions.append(_call(find(kind), given, optional={"start": flat.get("start", 0)}))
    callback = _configured(find("HAWQ"), flat)
    return callback, [callback, *companions]


def _configured(kind: Any, flat: Mapping[str, Any]) -> Any:
    """Call a class that takes ``quantizer``, ``measure`` and ``select`` configs with flat keywords."""
    direct = set(inspect.signature(kind).parameters) - {"self", "quantizer", "measure", "select"}
    parts: dict[str, dict[str, Any]] = {"quantizer": {}, "measure": {}, "select": {}}
    fields = {p: _fields(f"{p.capitalize()}Config") for p in parts}
    arguments = {}
    for key, value in flat.items():
        if (spelled := _spelled(key, direct)) is not None:
            arguments[spelled] = value
            continue
        part = next((p for p in parts if _spelled(key, fields[p]) is not None), None)
        if part is None and key == "constraints":
            for inner, number in value.items():
                parts["select"][inner] = number
            continue
        if part is None:
            raise LookupError(f"tests/golden/api.py does not know where {key!r} went in the new API")
        parts[part][_spelled(key, fields[part])] = value  # type: ignore[index]
    for part, settings in parts.items():
        if settings:
            arguments[part] = find(f"{part.capitalize()}Config")(**settings)
    return kind(**arguments)


def _fields(config: str) -> set[str]:
    return {f.name for f in dataclasses.fields(find(config))}


def _spelled(key: str, known: Iterable[str]) -> str | None:
    names = (key, *ALIASES.get(key, ()))
    return next((n for n in names if n in set(known)), None)


def _call(kind: Any, given: Mapping[str, Any], optional: Mapping[str, Any]) -> Any:
    known = set(inspect.signature(kind).parameters)
    arguments = {_spelled(k, known) or k: v for k, v in given.items()}
    arguments |= {spelled: v for k, v in optional.items() if (spelled := _spelled(k, known)) is not None}
    return kind(**{k: v for k, v in arguments.items() if v is not None})


# --------------------------------------------------------------------------------------------------- plain verbs


def measure(model: nn.Module, batches: Iterable[Any], loss_fn: Any, **keywords: Any) -> Any:
    """``hawq_lightning.measure``; settings whose defaults may change have to be given."""
    for needed in ("max_probes", "l1", "rtol", "draw", "estimator", "seed"):
        if needed not in keywords:
            raise TypeError(f"a golden run must give {needed}=, so that a new default does not move its numbers")
    return hawq_lightning.measure(model, batches, loss_fn, progress=False, **keywords)


def options(model: nn.Module, batches: Iterable[Any], sensitivity: Any, sites: Any, loss_fn: Any, **flat: Any) -> Any:
    """What was weighed for every site."""
    if not NEW:
        return find("options")(model, batches, sensitivity, sites, loss_fn, **flat)
    known = _fields("QuantizerConfig")
    config = find("QuantizerConfig")(**{_spelled(k, known) or k: v for k, v in flat.items()})
    return find("candidates")(model, batches, sensitivity, sites, loss_fn, config=config)


def problem(sites: Any, weighed: Any, sensitivity: Any, **constraints: Any) -> Any:
    """The selection problem."""
    return find("Problem")(sites, weighed, sensitivity, **constraints)


def sites(model: nn.Module, example: Any) -> Any:
    """The table of sites."""
    return hawq_lightning.sites(model, example)


def quantize(model: nn.Module, plan: Any) -> nn.Module:
    """Put a plan into a model."""
    return find("quantize")(model, plan)


def unquantize(model: nn.Module) -> nn.Module:
    """Float layers again."""
    return find("unquantize" if NEW else "uninstall")(model)


def top_eigenvalues(model: nn.Module, batches: Iterable[Any], loss_fn: Any, **keywords: Any) -> dict[str, float]:
    """Site -> largest eigenvalue."""
    return find("top_eigenvalues")(model, batches, loss_fn, **keywords)


# ------------------------------------------------------------------------------------------------------- numbers


def options_by_site(weighed: Any) -> dict[str, Sequence[Any]]:
    """Site -> options, from what :func:`options` returned or a callback holds."""
    for name in ("by_site", "options"):
        if not isinstance(weighed, Mapping) and isinstance(getattr(weighed, name, None), Mapping):
            weighed = getattr(weighed, name)
    return {name: tuple(weighed[name]) for name in weighed}


def options_of(callback: Any) -> dict[str, Sequence[Any]]:
    """Likewise, from a callback that has chosen."""
    return options_by_site(attribute(callback, "options", "candidates"))


def options_of_site(planned: Any) -> Sequence[Any]:
    """What a plan says was weighed for a site."""
    return attribute(planned, "options", "candidates")


def quantized(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that carry quantizers, by name; the file does not matter to it, so nothing is imported."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "weight_quantizer") and hasattr(m, "input_quantizer")}


def quantized_weight(layer: nn.Module) -> torch.Tensor:
    """The weight that evaluation sees."""
    mode, quantizer = layer.training, layer.weight_quantizer
    quantizer.eval()
    try:
        with torch.no_grad():
            return quantizer(layer.weight).detach()
    finally:
        quantizer.train(mode)


def codes(layer: nn.Module) -> torch.Tensor:
    """Integer codes of a layer's weight."""
    return layer.weight_quantizer.codes(layer.weight)


def bits(quantizer: nn.Module) -> int:
    """Code width; 0: off."""
    return int(attribute(quantizer, "bits", "num_bits"))


def state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A state dict under the names of 0.1.0, sorted; without the empty buffers that only carry a quantizer's name."""
    renamed = {}
    for key, value in model.state_dict().items():
        head, _, last = key.rpartition(".")
        if not head.endswith("_quantizer"):
            renamed[key] = value
        elif not last.startswith("quantizer_"):
            renamed[f"{head}.{BUFFERS.get(last, last)}"] = value
    yield from sorted(renamed.items())


def setting(name: str) -> str:
    """The old name of a setting or a cost."""
    return SETTINGS.get(name, name)


def packed(model: nn.Module, plan: Any, path: Path, fresh: nn.Module) -> nn.Module:
    """``fresh`` after a round trip of ``model`` through a packed file."""
    hawq_lightning.save_packed(model, plan, path)
    return hawq_lightning.load_packed(path, fresh)


def export_onnx(model: nn.Module, plan: Any, example: torch.Tensor, path: Path) -> None:
    """An ONNX file of an armed model, with BatchNorm folded."""
    if not NEW:
        find("to_onnx")(model, plan, example, path)
        return
    try:
        find("to_onnx")(model, plan, example, path)
    except LookupError:
        find("export")(model, plan, path, example_input=example, format="onnx")


def is_finite(value: Any) -> bool:
    """Whether a number of a record is one."""
    return isinstance(value, (int, float)) and math.isfinite(value)


# ------------------------------------------------------------------------------------- an application's own parts


def retinanet(**keywords: Any) -> nn.Module:
    """The small detector."""
    return find("retinanet_resnet18", "models.retinanet", "models._retinanet")(**keywords)


def detection_task(net: nn.Module, **keywords: Any) -> Any:
    """Its LightningModule."""
    return find("DetectionTask", "tasks.detection", "tasks._detection")(net, **keywords)


def tiny_coco(root: Path, **keywords: Any) -> Any:
    """Its drawn data."""
    return find("TinyCoco", "data.tiny", "data._tiny")(root, **keywords)


def resnet20() -> nn.Module:
    """The CIFAR-10 network."""
    return find("resnet20", "models.resnet20", "models._resnet20")()
