"""onnxruntime sessions, and which kernels a file is meant for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.export.onnx._openvino import OpenVinoSession
from hawq_lightning.export.onnx._ports import PortSession

FORM = "hawq_lightning.form"
EXACT, ROUNDED, INTEGER, INTEGER_ONLY = "exact", "rounded", "integer", "integer_only"
FLOAT_KERNELS = "session.disable_quant_qdq"
"""The entry of a session's configuration, ``"1"``, that keeps quantized layers in float kernels."""


def session(path: str | Path | bytes, threads: int | None = None, optimize: bool = True, integers: bool = True) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        path: of a file, or its contents.
        threads: that it may use; ``None``: as many as torch does.
        optimize: by onnxruntime's default optimizations.
        integers: use integer kernels where the graph has their form. Files written with ``exact=True`` have it nowhere
            throughout: there onnxruntime only moves codes from one layout to another, and float kernels take half of
            the time.

    Raises:
        HawqError: the extra is missing, or onnxruntime refuses the file.
    """
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not integers:
        options.add_session_config_entry(FLOAT_KERNELS, "1")
    try:
        held = path if isinstance(path, bytes) else str(path)
        return ort.InferenceSession(held, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        shown = "the model" if isinstance(path, bytes) else path
        raise HawqError(f"onnxruntime {ort.__version__} cannot run {shown}: {str(error).splitlines()[0]}") from error


def integer_kernels(path: str | Path) -> bool:
    """Whether a file should run with integer kernels: all but those written with ``exact=True``.

    Raises:
        HawqError: the extra is missing, or this is no ONNX file.
    """
    onnx = require("onnx")
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise HawqError(f"onnxruntime cannot run {path}: it is no ONNX file.") from error
    return not any(p.key == FORM and p.value == EXACT for p in proto.metadata_props)


RUNTIMES = ("onnxruntime", "openvino")


def open_session(runtime: str, path: str | Path | bytes, threads: int | None = None, integers: bool = True) -> Any:
    """A session of a runtime, by its package's name; see :func:`session`. One of an integer-only file takes floats too.

    Raises:
        HawqError: no such runtime, its extra is missing, or it refuses the file.
    """
    check_runtime(runtime)
    if runtime == "openvino":
        return OpenVinoSession(path, threads)
    run = session(path, threads, integers=integers)
    return PortSession(run) if PortSession.wants(run) else run


def check_runtime(runtime: str) -> None:
    """Refuse what is no runtime, or is not installed.

    Raises:
        HawqError: it is not.
    """
    if runtime not in RUNTIMES:
        raise HawqError(f"There is no runtime {runtime!r}; there are {' and '.join(RUNTIMES)}.")
    require(runtime)
