"""ONNX files as such: what is written about a network beside its graph, and the check before it is written."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._io import write_bytes
from hawq_lightning._version import __version__
from hawq_lightning.export._deployed import Deployed, first_line
from hawq_lightning.export.onnx._session import FORM, INTEGER


def describe(proto: Any, deployed: Deployed, form: str) -> None:
    """Write the plan, what was folded, and the form into the file's metadata."""
    proto.producer_name, proto.producer_version = "hawq_lightning", __version__
    plan = deployed.plan
    about = {
        FORM: form,
        "hawq_lightning.bits": plan.bits,
        "hawq_lightning.code": {s.name: s.code for s in plan.weights},
        "hawq_lightning.budget": plan.budget,
        "hawq_lightning.selector": plan.selector,
        "hawq_lightning.fingerprint": plan.fingerprint,
        "hawq_lightning.folded": {k: list(v) for k, v in deployed.folding.folded.items()},
        "hawq_lightning.not_folded": dict(deployed.folding.kept),
    } | ({"hawq_lightning.still_float": dict(deployed.still_float)} if form == INTEGER else {})
    for key, value in about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)


def strip(proto: Any) -> None:
    """Drop source lines, class names and paths of this machine, which the exporter writes beside every node."""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    for part in (proto.graph.node, proto.graph.initializer, proto.graph.input, proto.graph.output):
        for item in part:
            if hasattr(item, "metadata_props"):
                del item.metadata_props[:]
            item.doc_string = ""
    del proto.graph.value_info[:]
    del proto.functions[:]
    proto.graph.name = "main"


DATA = ".data"
"""What follows a file's name in that of its weights, where one file does not hold both."""
_SMALL = 1024  # bytes of a tensor that stays in the graph
_GRAPH = 1 << 26  # bytes that are left for the graph


def write(proto: Any, path: Path) -> None:
    """Write a graph that onnx's checker accepts; weights that make it larger than 2 GiB go into ``<name>.data``.

    Raises:
        HawqError: it is refused.
    """
    onnx = require("onnx")
    if too_large(proto):
        _write_two(proto, path)
        return
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise HawqError(f"onnx's checker refuses the exported model: {first_line(error)}") from error
    write_bytes(path, proto.SerializeToString())
    path.with_name(path.name + DATA).unlink(missing_ok=True)  # of an older, larger network


def has_data(path: Path) -> bool:
    """Whether a file's weights lie beside it."""
    return path.with_name(path.name + DATA).is_file()


def content(path: Path) -> bytes:
    """Of an ONNX file, and of the weights beside it."""
    return path.read_bytes() + (path.with_name(path.name + DATA).read_bytes() if has_data(path) else b"")


def too_large(proto: Any) -> bool:
    """Whether one file cannot hold a graph with its weights: beyond 2 GiB no ONNX model can even tell its size."""
    weights = sum(len(t.raw_data) or t.ByteSize() for t in proto.graph.initializer)
    return weights >= int(require("onnx").checker.MAXIMUM_PROTOBUF) - _GRAPH


def _write_two(proto: Any, path: Path) -> None:
    """Weights first, then the graph, each at once."""
    onnx = require("onnx")
    name = path.name + DATA
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        with (Path(folder) / name).open("wb") as file:
            for tensor in proto.graph.initializer:
                if len(tensor.raw_data) < _SMALL:
                    continue
                place = {"location": name, "offset": file.tell(), "length": len(tensor.raw_data)}
                file.write(tensor.raw_data)
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, value in place.items():
                    entry = tensor.external_data.add()
                    entry.key, entry.value = key, str(value)
        graph = Path(folder) / path.name
        graph.write_bytes(proto.SerializeToString())
        try:
            onnx.checker.check_model(str(graph), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise HawqError(f"onnx's checker refuses the exported model: {first_line(error)}") from error
        os.replace(Path(folder) / name, path.with_name(name))
        os.replace(graph, path)
