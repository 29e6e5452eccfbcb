"""OpenVINO as a second runtime of ONNX files: the same face as an onnxruntime session.

It is asked to compute what integer kernels leave in float32. By default it takes bfloat16 where the CPU has it, which
moves outputs a hundred times more than any kernel does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.export._deployed import first_line


@dataclass(frozen=True)
class Port:
    """An input or output.

    Attributes:
        name: in the file.
        shape: axes; a text where the length is free.
    """

    name: str
    shape: tuple[int | str, ...]


class OpenVinoSession:
    """A file compiled for the CPU.

    Args:
        path: of an ONNX file, or its contents.
        threads: that it may use; ``None``: as many as torch does.

    Raises:
        HawqError: the extra is missing, the file has two-bit weights, or OpenVINO refuses it.
    """

    def __init__(self, path: str | Path | bytes, threads: int | None = None) -> None:
        openvino = require("openvino")
        refuse_two_bits(path)
        shown = "the model" if isinstance(path, bytes) else path
        try:
            core = openvino.Core()
            network = core.read_model(path if isinstance(path, bytes) else str(path))
            self._compiled = core.compile_model(network, "CPU", settings(threads or torch.get_num_threads()))
        except Exception as error:
            raise HawqError(
                f"OpenVINO {openvino.__version__.split('-')[0]} cannot run {shown}: {first_line(error)}"
            ) from error
        self._outputs = [port.get_any_name() for port in self._compiled.outputs]

    def get_inputs(self) -> list[Port]:
        """Names and shapes."""
        return [_port(port) for port in self._compiled.inputs]

    def get_outputs(self) -> list[Port]:
        """Names and shapes."""
        return [_port(port) for port in self._compiled.outputs]

    def run(self, names: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Values of the named outputs, or of all.

        Args:
            names: of outputs; ``None``: all.
            feed: input -> values.
        """
        results = self._compiled(dict(feed))
        return [np.array(results[name]) for name in (self._outputs if names is None else names)]


def settings(threads: int) -> dict[str, Any]:
    """Of a compiled network: float32, so many threads, no second request beside the first."""
    return {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}


def refuse_two_bits(path: str | Path | bytes) -> None:
    """Say so, before OpenVINO says something else, where a file holds INT2.

    Raises:
        HawqError: it does, or this is no ONNX file.
    """
    onnx = require("onnx")
    try:
        proto = onnx.ModelProto.FromString(path if isinstance(path, bytes) else Path(path).read_bytes())
    except Exception as error:
        raise HawqError(f"OpenVINO cannot run {path!r}: it is no ONNX file.") from error
    two_bits = {getattr(onnx.TensorProto, name, None) for name in ("INT2", "UINT2")}
    if held := [t.name for t in proto.graph.initializer if t.data_type in two_bits]:
        raise HawqError(
            f"OpenVINO reads no INT2, in which {len(held)} of the file's weights are stored ({held[0]!r} first); store "
            "them in a type that every runtime reads."
        )


def _port(port: Any) -> Port:
    shape = (str(axis) if axis.is_dynamic else axis.get_length() for axis in port.partial_shape)
    return Port(port.get_any_name(), tuple(shape))
