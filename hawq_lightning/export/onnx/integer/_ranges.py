"""Ranges of tensors of a graph over example batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.export.onnx._session import session

_ROWS = 32  # images at a time, where the model takes any number


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
    takes = run.get_inputs()
    fixed = [i.shape[0] if isinstance(i.shape[0], int) else None for i in takes]
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    for batch in batches:
        for part in _parts(batch, fixed):
            found = run.run(None, {i.name: x.detach().cpu().numpy() for i, x in zip(takes, part)})
            low = np.minimum(low, [y.min(initial=np.inf) for y in found])
            high = np.maximum(high, [y.max(initial=-np.inf) for y in found])
    if not (low <= high).all():
        raise HawqError("There are no batches to calibrate the integer file's grids on.")
    return {t: (float(a), float(b)) for t, a, b in zip(tensors, low, high)}


def _parts(batch: tuple[torch.Tensor, ...], fixed: Sequence[int | None]) -> Iterator[tuple[torch.Tensor, ...]]:
    """A batch as the model takes it: some images at a time, or as many rows of each input as that has.

    Args:
        batch: the model's inputs.
        fixed: length of the first axis of every input; ``None``: any.
    """
    steps = [_ROWS if rows is None else rows for rows in fixed]
    whole = [-(-len(x) // k) if rows is None else len(x) // k for x, k, rows in zip(batch, steps, fixed)]
    for i in range(min(whole, default=0)):
        yield tuple(x[i * k : (i + 1) * k] for x, k in zip(batch, steps))
