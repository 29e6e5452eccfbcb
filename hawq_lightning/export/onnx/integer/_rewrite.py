"""The passes in their order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hawq_lightning._extra import require
from hawq_lightning.export.onnx.integer._coded import Coded
from hawq_lightning.export.onnx.integer._codes import Codes
from hawq_lightning.export.onnx.integer._graph import Graph
from hawq_lightning.export.onnx.integer._grids import Grid, lift
from hawq_lightning.export.onnx.integer._means import pool_means
from hawq_lightning.export.onnx.integer._operators import weight_of
from hawq_lightning.export.onnx.integer._ranges import ranges
from hawq_lightning.export.onnx.integer._weights import round_biases, transpose_weights


@dataclass(frozen=True)
class Rewritten:
    """What became of a graph.

    Attributes:
        codes: tensors with the codes of weights that have integer kernels.
        grids: how many grids were added to the plan's.
        biases: how many were rounded to INT32.
    """

    codes: frozenset[str]
    grids: int
    biases: int


def to_integers(proto: Any, batches: Iterable[tuple[torch.Tensor, ...]]) -> Rewritten:
    """Rewrite a model with grids for integer kernels, in place.

    Args:
        proto: an ONNX model with float biases whose codes are INT8 or INT16 initializers.
        batches: inputs, for the ranges of tensors that have no grid.

    Raises:
        HawqError: there are no batches, or onnxruntime cannot run the model.
    """
    graph = Graph(proto)
    pool_means(graph)
    transpose_weights(graph)
    graph.store()
    before = require("onnx").ModelProto.FromString(proto.SerializeToString())
    graph = Graph(proto)
    plan, own = lift(graph)
    coded = Coded(graph, plan, own)
    codes = Codes(graph, coded)
    found = ranges(before, _unknown(coded), batches)
    calibrated = {name: Grid.over(*limits) for name, limits in found.items()}
    known = {v.root: v.grid for v in coded.values if v.coded and v.grid is not None}
    layers = dict(coded.layers)
    codes.write({**calibrated, **known})
    biases = round_biases(graph, layers, coded.plan)
    makers = graph.makers()
    products = [n for n in graph.nodes if (id(n), 0) in coded.plan]
    kept = [w.input[0] for n in products if (w := weight_of(graph, makers, n)) is not None]
    sizes = {k: graph.array(k).dtype.itemsize for k in kept}
    graph.store()
    return Rewritten(frozenset(k for k in kept if sizes[k] == 1), len(calibrated), biases)


def _unknown(coded: Coded) -> list[str]:
    """Tensors whose range is needed."""
    found = []
    for values in coded.values:
        if (values.coded and values.grid is None) or (
            not values.coded
            and any(id(n) in coded.joins and (id(n), slot) not in coded.plan for n, slot in values.reads)
        ):
            found.append(values.root)
    return list(dict.fromkeys(found))
