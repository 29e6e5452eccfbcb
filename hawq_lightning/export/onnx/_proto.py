"""ONNX files as such: what is written about a network beside its graph, and the check before it is written."""

from __future__ import annotations

import json
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


def write(proto: Any, path: Path) -> None:
    """Write a graph that onnx's checker accepts.

    Raises:
        HawqError: it is refused, or too large for one file.
    """
    onnx = require("onnx")
    if proto.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise HawqError(f"The network takes {proto.ByteSize():,} bytes; an ONNX file holds less than 2 GiB.")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise HawqError(f"onnx's checker refuses the exported model: {first_line(error)}") from error
    write_bytes(path, proto.SerializeToString())
