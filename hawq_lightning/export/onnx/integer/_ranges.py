"""Ranges of tensors of a graph over example batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.export.onnx._session import session

_ROWS = 32  # images at a time


def ranges(
    proto: Any, tensors: Sequence[str], batches: Iterable[tuple[torch.Tensor, ...]]
) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each tensor while the model, with its grids, runs in float kernels.

    Args:
        proto: an ONNX model.
        tensors: float ones.
        batches: the model's inputs.

    Raises:
        HawqError: there are no batches, or onnxruntime cannot run the model.
    """
    if not tensors:
        return {}
    onnx = require("onnx")
    shown = onnx.ModelProto.FromString(proto.SerializeToString())
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.helper.make_tensor_value_info(t, onnx.TensorProto.FLOAT, None) for t in tensors)
    run = session(shown.SerializeToString(), integers=False)
    names = [i.name for i in run.get_inputs()]
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    for batch in batches:
        for start in range(0, len(batch[0]), _ROWS):
            feed = {n: x[start : start + _ROWS].detach().cpu().numpy() for n, x in zip(names, batch)}
            found = run.run(None, feed)
            low = np.minimum(low, [y.min(initial=np.inf) for y in found])
            high = np.maximum(high, [y.max(initial=-np.inf) for y in found])
    if not (low <= high).all():
        raise HawqError("There are no batches to calibrate the integer file's grids on.")
    return {t: (float(a), float(b)) for t, a, b in zip(tensors, low, high)}
