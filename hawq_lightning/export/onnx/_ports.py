"""Integers at the edges of an integer-only file, and a session that takes and gives floats all the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hawq_lightning._types import JsonObject

INPUTS, OUTPUTS = "hawq_lightning.inputs", "hawq_lightning.outputs"
"""Metadata of the file: JSON lists of ports."""


@dataclass(frozen=True)
class Port:
    """Integers at the edge of a program, and what they stand for: ``(integer - zero) * scale``.

    Attributes:
        name: of the program's tensor.
        of: the network's input or output.
        scale: a float32 number.
        zero: code of 0.
        low: least integer.
        high: greatest integer.
        dtype: ``"uint8"`` or ``"int32"``.
    """

    name: str
    of: str
    scale: float
    zero: int
    low: int
    high: int
    dtype: str = "uint8"

    def codes(self, values: np.ndarray) -> np.ndarray:
        """UINT8 codes of float32 values, as QuantizeLinear rounds them."""
        found = np.rint(values.astype(np.float32) / np.float32(self.scale)) + self.zero
        return np.asarray(np.clip(found, self.low, self.high), np.uint8)

    def values(self, integers: np.ndarray) -> np.ndarray:
        """Float32 values of integers."""
        return np.asarray((integers.astype(np.float64) - self.zero) * self.scale, np.float32)

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Edge:
    """What onnxruntime says of an input or output."""

    name: str
    shape: Sequence[int | str]


class PortSession:
    """An onnxruntime session of an integer-only file, with the network's own float inputs and outputs.

    Args:
        run: the session, of codes.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        about = run.get_modelmeta().custom_metadata_map
        self.inputs, self.outputs = ([Port(**p) for p in json.loads(about[key])] for key in (INPUTS, OUTPUTS))

    @staticmethod
    def wants(run: Any) -> bool:
        """Whether a session is of such a file."""
        return INPUTS in run.get_modelmeta().custom_metadata_map

    def get_inputs(self) -> list[_Edge]:
        """The network's inputs."""
        shapes = {i.name: i.shape for i in self._run.get_inputs()}
        return list({p.of: _Edge(p.of, shapes[p.name]) for p in self.inputs}.values())

    def get_outputs(self) -> list[_Edge]:
        """The network's outputs."""
        return [_Edge(o.name, o.shape) for o in self._run.get_outputs()]

    def run(self, names: Iterable[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Float32 outputs of float32 inputs; in between there are integers."""
        wanted = [o.name for o in self.get_outputs()] if names is None else list(names)
        found = self._run.run(wanted, {p.name: p.codes(feed[p.of]) for p in self.inputs})
        ports = {p.of: p for p in self.outputs}
        return [ports[name].values(integers) for name, integers in zip(wanted, found)]
