"""What is written down of a run: flat names -> numbers, strings and arrays.

A name is ``section.field[member]``, as in ``sensitivity.trace[net.fc.weight]``. Members of one field are of one kind:
where machines differ they are compared against the largest of them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.golden import api
from tests.golden.api import attribute

Record = dict[str, Any]
WHOLE = 64  # elements up to which an array is kept as it is
FIRST = 64  # elements kept of a longer one
SENSITIVE = ("trace", "stderr", "stderr_data", "numel", "mean_trace")
SITE = ("bits", "code", "scale", "zero_point", "trace", "stderr", "stderr_data", "mean_trace", "omega", "perturbation",
        "stability")  # fmt: skip
# of costs: the file's, whose layout may change, and those of the whole model, which 0.1.0 did not have
NOT_KEPT = ("file_bytes", "model_bytes", "float_model_bytes", "model_comp", "quantized_share", "kept_bytes")
LEFT_OUT = ("seconds", "lifted", "stays_float")  # of settings: clocks, sentences


def array(values: Any) -> dict[str, Any]:
    """An array in plain JSON types: all of it, or its hash with a few numbers that tell how far another one is."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()
    a = np.asarray(values)
    a = np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("<"))
    entry: dict[str, Any] = {"dtype": a.dtype.str, "shape": list(a.shape)}
    first = a.reshape(-1)[: FIRST if a.size > WHOLE else None]
    entry["first"] = base64.b64encode(first.tobytes()).decode()
    if a.size > WHOLE:
        wide = a.astype(np.float64).reshape(-1)
        entry["sha256"] = hashlib.sha256(a.tobytes()).hexdigest()
        entry |= {
            "sum": float(wide.sum()),
            "norm": float(np.sqrt(np.square(wide).sum())),
            "largest": float(np.abs(wide).max()),
        }
    return entry


def values_of(entry: Mapping[str, Any]) -> np.ndarray:
    """The elements that an entry keeps."""
    return np.frombuffer(base64.b64decode(entry["first"]), dtype=np.dtype(entry["dtype"]))


def plain(value: Any) -> Any:
    """JSON types; tensors and lists of numbers become arrays."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return array(value) if value.ndim else value.item()
    if isinstance(value, Sequence) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
        return array(np.asarray(value, dtype=np.float64 if any(isinstance(v, float) for v in value) else np.int64))
    return str(value)


def put(record: Record, name: str, value: Any) -> None:
    """Write one thing down, mappings member by member."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            record[f"{name}[{key}]"] = plain(inner)
    else:
        record[name] = plain(value)


def of_sensitivity(record: Record, sensitivity: Any, section: str = "sensitivity", rows: bool = True) -> None:
    """Traces with their errors, the rows that they summarise, and settings."""
    for r in sensitivity:
        for field in SENSITIVE:
            record[f"{section}.{field}[{r.name}]"] = plain(getattr(r, field))
    if rows:
        for field in ("rows", "sizes", "row_weights", "row_unit"):
            put(record, f"{section}.{field}", getattr(sensitivity, field))
    _settings(record, f"{section}.setting", sensitivity.settings)


def of_plan(record: Record, plan: Any, section: str = "plan", weighed: bool = True) -> None:
    """Bits, grids, Omega of every site and option; costs but those of :data:`NOT_KEPT`."""
    for s in plan.sites:
        for field in SITE:
            record[f"{section}.{field}[{s.name}]"] = plain(attribute(s, field))
        if weighed:
            of_options(record, s.name, api.options_of_site(s), f"{section}.option")
    costs = {k: float(v) for k, v in api.settings(plan.costs).items() if k not in NOT_KEPT}
    put(record, f"{section}.cost", costs)
    record[f"{section}.omega_of_all"] = float(plan.omega)
    record[f"{section}.selector"], record[f"{section}.budget"] = plan.selector, str(plan.budget)
    record[f"{section}.quantizer"] = plan.quantizer
    _settings(record, f"{section}.setting", plan.settings)


def of_options(record: Record, site: str, options: Sequence[Any], name: str = "options") -> None:
    """Every width and code that was weighed for a site."""
    for o in options:
        for field in ("omega", "perturbation", "scale", "zero_point"):
            record[f"{name}_{field}[{site} {attribute(o, 'bits')} {attribute(o, 'code')}]"] = plain(attribute(o, field))


def of_frontier(record: Record, frontier: Any, section: str = "frontier") -> None:
    """Costs and Omega of every plan on it."""
    record[f"{section}.cost"] = array(np.asarray(frontier.cost, dtype=np.float64))
    record[f"{section}.omega"] = array(np.asarray(frontier.omega, dtype=np.float64))


def of_state(record: Record, model: nn.Module, section: str = "weights") -> None:
    """Parameters and buffers, those of quantizers under their old names."""
    digest = hashlib.sha256()
    for key, value in api.state(model):
        record[f"{section}.{_kind(key)}[{key}]"] = array(value)
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    record[f"{section}.sha256"] = digest.hexdigest()


def of_packed(record: Record, model: nn.Module, x: torch.Tensor, section: str = "packed") -> None:
    """What came out of a packed file: codes, steps, quantized weights, everything that stayed float, and outputs."""
    for name, layer in api.quantized(model).items():
        weights, reads = layer.weight_quantizer, layer.input_quantizer
        if api.bits(weights):
            record[f"{section}.bits[{name}.weight]"] = api.bits(weights)
            record[f"{section}.codes[{name}]"] = array(api.codes(layer))
            record[f"{section}.scale[{name}.weight]"] = array(weights.scale)
            record[f"{section}.weight[{name}]"] = array(api.quantized_weight(layer))
        if api.bits(reads):
            record[f"{section}.bits[{name}.input]"] = api.bits(reads)
            record[f"{section}.input_scale[{name}]"] = array(reads.scale)
            record[f"{section}.input_zero[{name}]"] = float(reads.zero_point)
    layers = {f"{n}.weight" for n in api.quantized(model)}
    for key, value in api.state(model):
        if "_quantizer." not in key and key not in layers:
            record[f"{section}.rest[{key}]"] = array(value)
    record[f"{section}.logits"] = array(outputs(model, x))


def of_metrics(record: Record, metrics: Mapping[str, Any], section: str = "metrics") -> None:
    """Numbers that the Trainer reports."""
    for key in sorted(metrics):
        record[f"{section}.{key}"] = float(metrics[key])


@torch.no_grad()
def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Outputs in evaluation mode."""
    mode = model.training
    out = model.eval()(x)
    model.train(mode)
    return out


def _kind(key: str) -> str:
    return "quantizer" if "_quantizer." in key else "buffer" if "running_" in key or "num_batches" in key else "value"


def _settings(record: Record, name: str, settings: Mapping[str, Any]) -> None:
    for key, value in api.settings(settings).items():
        if any(part in key for part in LEFT_OUT):
            continue
        if isinstance(value, Mapping):
            put(record, f"{name}_{key}", value)
        else:
            record[f"{name}[{key}]"] = plain(value)
