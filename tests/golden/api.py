"""The one place of the golden record that knows how hawq_lightning spells things, before and after its refactoring.

Runs and facts are written in the words of release 0.1.0 (flat keywords, ``options``, ``width``). This module finds out
which API is installed and translates. Only names that packages export are looked up first; module files are tried
after them, so that the old layout works, too.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hawq_lightning

FACES = ("", "callbacks", "quantization", "sensitivity", "selection", "export", "models", "tasks", "data")

# keyword of 0.1.0 -> the config that has it now ("": the callback itself), and what it may be called there
KEYWORDS: dict[str, tuple[str, ...]] = {
    "weight_bits": ("quantizer", "weight_bits"),
    "activation_bits": ("quantizer", "activation_bits"),
    "input_bits": ("quantizer", "input_bits"),
    "codes": ("quantizer", "code_format", "codes"),
    "include": ("quantizer", "include"),
    "exclude": ("quantizer", "exclude"),
    "quantizer": ("quantizer", "name"),
    "quantizer_options": ("quantizer", "options"),
    "estimator": ("measure", "estimator"),
    "images": ("measure", "images"),
    "rtol": ("measure", "rtol"),
    "max_probes": ("measure", "max_probes"),
    "distribution": ("measure", "distribution"),
    "rotate": ("measure", "rotate"),
    "draw": ("measure", "sampling", "draw"),
    "l1": ("measure", "l1_curvature", "l1"),
    "precision": ("measure", "precision"),
    "stop": ("measure", "stop_when", "stop"),
    "check_loss": ("measure", "loss_per_site", "check_loss"),
    "loss_fn": ("measure", "loss_fn"),
    "seed": ("measure", "seed"),
    "cache": ("measure", "cache"),
    "budget": ("select", "budget"),
    "selector": ("select", "selector"),
    "constraints": ("select", "constraints"),
    "bits": ("select", "bits"),
    "latency": ("select", "latency"),
    "selection_seed": ("select", "seed"),
    "start": ("", "start_epoch", "start"),
    "plan": ("", "plan"),
    "sensitivity": ("", "sensitivity"),
    "dirpath": ("", "dirpath"),
    "progress": ("", "progress"),
}
VALUES = {"stop_when": {"error": "rtol", "plan": "stable_plan"}}
CONFIGS = {"quantizer": "QuantizerConfig", "measure": "MeasureConfig", "select": "SelectConfig"}
# callback of its own -> keywords of 0.1.0 with the names of its arguments; the first one switches it on
COMPANIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "Distillation": {"distill": ("weight",), "distill_temperature": ("temperature",)},
    "FreezeSchedule": {"freeze_batchnorm": ("batchnorm",), "freeze_ranges": ("ranges",)},
    "BlockwiseOrder": {"order": ("by", "order"), "order_until": ("until",)},
    "PostTraining": {"post_training": ("methods",)},
}
# new -> old: last part of a state-dict key; a setting or a cost; what a setting says
BUFFERS = {"num_bits": "width"}
SETTINGS = {"sampling": "draw", "l1_curvature": "l1"}
SAID = {"stopped": {"rtol": "error", "stable_plan": "enough"}}
# old -> new: attributes
ATTRIBUTES = {
    "code": ("code_format",), "options": ("candidates",), "bits": ("num_bits",), "loss_check": ("loss_per_site",),
}  # fmt: skip


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


def attribute(thing: Any, name: str) -> Any:
    """An attribute by its old name."""
    for known in (name, *ATTRIBUTES.get(name, ())):
        if hasattr(thing, known):
            return getattr(thing, known)
    raise LookupError(f"tests/golden/api.py: {type(thing).__name__} has no {name!r} by any name that it knows")


def result(callback: Any, name: str) -> Any:
    """What a callback holds after ``fit``; ``None`` where it holds nothing, which raises now and was None in 0.1.0."""
    try:
        return getattr(callback, name)
    except hawq_lightning.HawqError:
        return None


# ---------------------------------------------------------------------------------------------------- callbacks


def hawq(**flat: Any) -> tuple[Any, list[Any]]:
    """The callback HAWQ and the list that goes to the Trainer, from the flat keywords of release 0.1.0."""
    kind = find("HAWQ")
    if "measure" not in inspect.signature(kind).parameters:
        callback = kind(**flat)
        return callback, [callback]
    companions = []
    for name, keywords in COMPANIONS.items():
        given = {k: flat.pop(k) for k in keywords if k in flat}
        if any(v not in (None, False, 0.0) or k.startswith("freeze") for k, v in given.items()):
            companions.append(_companion(find(name), {keywords[k]: v for k, v in given.items()}, flat.get("start", 0)))
    arguments, parts = _sorted(flat, set(inspect.signature(kind).parameters))
    callback = kind(
        **arguments, **{part: find(CONFIGS[part], "_config")(**settings) for part, settings in parts.items()}
    )
    return callback, [callback, *companions]


def _sorted(flat: Mapping[str, Any], direct: set[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Flat keywords as the callback's own arguments, and those of each config."""
    arguments: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, *names = KEYWORDS[key]
        known = _fields(part) if part else direct
        spelled = next((n for n in names if n in known), None)
        if spelled is not None:
            (parts.setdefault(part, {}) if part else arguments)[spelled] = _said(spelled, value)
        elif key == "constraints":
            parts.setdefault(part, {}).update(value or {})
        else:
            raise LookupError(
                f"tests/golden/api.py does not know what became of {key!r} in {CONFIGS.get(part, 'HAWQ')}"
            )
    return arguments, parts


def _fields(part: str) -> set[str]:
    return {f.name for f in dataclasses.fields(find(CONFIGS[part], "_config"))}


def _said(name: str, value: Any) -> Any:
    return VALUES[name].get(value, value) if name in VALUES else value


def _companion(kind: Any, given: Mapping[tuple[str, ...], Any], start: int) -> Any:
    known = set(inspect.signature(kind).parameters)
    arguments = {next((n for n in names if n in known), names[0]): v for names, v in given.items()}
    arguments |= {n: start for n in ("start", "start_epoch") if n in known}
    if kind.__name__ == "PostTraining" and arguments.get("methods") is True:
        del arguments["methods"]
    return kind(**arguments)


# --------------------------------------------------------------------------------------------------- plain verbs


def measure(model: nn.Module, batches: Iterable[Any], loss_fn: Any, **keywords: Any) -> Any:
    """``hawq_lightning.measure``; settings whose defaults may change have to be given."""
    for needed in ("max_probes", "l1", "rtol", "draw", "estimator", "seed"):
        if needed not in keywords:
            raise TypeError(f"a golden run must give {needed}=, so that a new default does not move its numbers")
    known = set(inspect.signature(hawq_lightning.measure).parameters)
    if "config" in known:
        known |= _fields("measure")
    spelled = {next((n for n in (k, *KEYWORDS.get(k, ())[1:]) if n in known), k): v for k, v in keywords.items()}
    return hawq_lightning.measure(model, batches, loss_fn, progress=False, **spelled)


def options(model: nn.Module, batches: Iterable[Any], sensitivity: Any, sites: Any, loss_fn: Any, **flat: Any) -> Any:
    """What was weighed for every site."""
    try:
        weigh = find("candidates")
    except LookupError:
        weigh = find("options")
    if "config" not in inspect.signature(weigh).parameters:
        return weigh(model, batches, sensitivity, sites, loss_fn, **flat)
    config = find("QuantizerConfig", "_config")(**_sorted(flat, set())[1]["quantizer"])
    return weigh(model, batches, sensitivity, sites, loss_fn, config=config)


def problem(sites: Any, weighed: Any, sensitivity: Any, **constraints: Any) -> Any:
    """The selection problem."""
    return find("Problem")(sites, weighed, sensitivity, **constraints)


def frontier(problem: Any) -> Any:
    """Every plan that no other beats in Omega and bytes of weights."""
    try:
        return find("plan_frontier")(problem, "weight_bytes")
    except LookupError:
        return problem.frontier("weight_bytes")


def sites(model: nn.Module, example: Any) -> Any:
    """The table of sites."""
    return hawq_lightning.sites(model, example)


def quantize(model: nn.Module, plan: Any) -> nn.Module:
    """Put a plan into a model."""
    return find("quantize")(model, plan)


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
    return options_by_site(attribute(callback, "options"))


def options_of_site(planned: Any) -> Sequence[Any]:
    """What a plan says was weighed for a site."""
    return attribute(planned, "options")


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
    return int(attribute(quantizer, "bits"))


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


def settings(known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings or costs under their old names, saying what they used to."""
    old = {SETTINGS.get(key, key): value for key, value in known.items()}
    return {k: SAID.get(k, {}).get(v, v) if isinstance(v, str) else v for k, v in old.items()}


def packed(model: nn.Module, plan: Any, path: Path, fresh: nn.Module) -> nn.Module:
    """``fresh`` after a round trip of ``model`` through a packed file."""
    hawq_lightning.save_packed(model, plan, path)
    return hawq_lightning.load_packed(path, fresh)


def export_onnx(model: nn.Module, plan: Any, example: torch.Tensor, path: Path) -> None:
    """An ONNX file of a quantized model, with BatchNorm folded."""
    try:
        write = find("to_onnx", "export.onnx")
    except LookupError:
        export = find("export", "export")
        examples = {p: example for p in inspect.signature(export).parameters if p.startswith("example")}
        export(model, plan, path, format="onnx", **examples)
        return
    write(model, plan, example, path)


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
