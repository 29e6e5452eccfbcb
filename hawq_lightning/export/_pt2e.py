"""A program of ``quantized_decomposed`` operators, as of PT2E: ExecuTorch and LiteRT lower it to int8 kernels.

Every tensor between two products, sums and pools lies on a grid. Where the plan has one it is the plan's, and whatever
else reads that tensor, such as a shortcut, reads the grid too; elsewhere it spans the range seen on some
batches. Grids are int8, 128 below the plan's unsigned codes. Each reader has a dequantize node of its own, since
XNNPACK's partitioner does not share them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning._types import Batch
from hawq_lightning.export._deployed import Inputs, deploy, first_line
from hawq_lightning.export._integer_ranges import HIGH, LOW, Grid, Ranges
from hawq_lightning.export._positive import positive_scales

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed
_WEIGHTED = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)
_ARITHMETIC = (
    aten.add.Tensor, aten.mean.dim, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.cat.default,
)  # fmt: skip
_ACTIVATIONS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default)
_MOVES = (
    aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int,
    aten.max_pool2d.default, aten.squeeze.dim, aten.unsqueeze.default,
)  # fmt: skip
_NOTHING = (aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.alias.default)
_IN_PLACE = {aten.relu_.default: aten.relu.default, aten.add_.Tensor: aten.add.Tensor}


@dataclass(frozen=True)
class IntegerProgram:
    """A network with integers between its layers.

    Attributes:
        program: for one image, float in and out.
        input: grid of what it reads.
        output: grid of what it gives.
        planned: tensors on a grid of the plan.
        calibrated: tensors on a grid over the range of the batches.
        clamped: layer -> weights' codes that a negative scale had turned to 128 and that are 127 now.
    """

    program: torch.export.ExportedProgram
    input: Grid
    output: Grid
    planned: int
    calibrated: int
    clamped: dict[str, int]


def to_pt2e(
    model: nn.Module, plan: Plan | None, example_input: Inputs, batches: Iterable[Batch] | None = None, *,
    float_weights: bool = False,
) -> IntegerProgram:  # fmt: skip
    """Write a quantized model as a program of ``quantized_decomposed`` operators; the model stays as it is.

    Args:
        model: with quantizers enabled, one float input and one output.
        plan: the plan that it carries; ``None`` reads it from the quantizers.
        example_input: float images ``[N, C, H, W]``.
        batches: tensors, or batches with the images first, for the ranges that the plan lacks; ``None``: the example.
        float_weights: hold weights as floats that are quantized in the graph, as LiteRT wants them.

    Raises:
        HawqError: an operator without such a form, grids of other than 8 bits, weights of more, no batches, or as for
            :func:`hawq_lightning.export.to_program`.
    """
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the operators
    deployed = deploy(model, plan, example_input)
    if len(deployed.inputs) != 1:
        raise HawqError("A program of integers has one input; this network has several.")
    one = deployed.inputs[0][:1]
    try:
        with torch.no_grad():
            graph = torch.export.export(deployed.model, (one,), strict=False).run_decompositions({}).module()
    except Exception as error:
        raise HawqError(f"torch.export cannot follow this model: {first_line(error)}") from error
    _refuse(graph)
    ranges = Ranges(graph)
    ranges.see(batches if batches is not None else [deployed.inputs[0]])
    rewrite = _Rewrite(graph, ranges, float_weights)
    program = torch.export.export(rewrite.run(), (one,), strict=False)
    return IntegerProgram(
        program, rewrite.input, rewrite.output, len(rewrite.planned), len(rewrite.calibrated), rewrite.clamped
    )


def _refuse(graph: fx.GraphModule) -> None:
    """Say what has no form before anything is measured."""
    known = {*_WEIGHTED, *_ARITHMETIC, *_ACTIVATIONS, *_MOVES, *_NOTHING, *_IN_PLACE, aten.slice.Tensor,
             aten.pad.default, aten.constant_pad_nd.default, torch.ops.hawq_lightning.snap.default,
             torch.ops.hawq_lightning.dequantize.default}  # fmt: skip
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target not in known and "_guards" not in str(node.target):
            raise HawqError(f"The operation {node.target} has no integer form here; the ONNX file leaves it float.")
        if node.target is torch.ops.hawq_lightning.snap.default and node.args[3] != HIGH - LOW:
            bits = int(node.args[3]).bit_length()
            raise HawqError(f"A program of integers has activations of 8 bits; this plan has one of {bits}.")


class _Rewrite:
    """Builds the graph anew, node by node: each float tensor becomes an int8 node with its grid."""

    def __init__(self, source: fx.GraphModule, ranges: Ranges, float_weights: bool) -> None:
        self.source, self.ranges = source, ranges
        self.float_weights = float_weights
        self.graph, self.root = fx.Graph(), nn.Module()
        self.codes: dict[fx.Node, tuple[fx.Node, Grid]] = {}
        self.planned: set[str] = set()
        self.calibrated: set[str] = set()
        self.clamped: dict[str, int] = {}
        self.input = self.output = Grid(1.0, 0)

    def run(self) -> fx.GraphModule:
        """The network of ``quantized_decomposed`` operators."""
        for node in self.source.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "output":
                (result,) = torch.utils._pytree.tree_leaves(node.args)
                self.graph.output(self._read(result))
                self.output = self._grid(result)
            elif node.op == "call_function" and node not in self.codes:
                self._call(node)
        return fx.GraphModule(self.root, self.graph)

    def _placeholder(self, node: fx.Node) -> None:
        images, self.input = self.graph.placeholder("images"), self._planned(node) or self._missing(node)
        self.codes[node] = (self._quantize(images, self.input), self.input)

    def _missing(self, node: fx.Node) -> Grid:
        raise HawqError(f"No layer of the plan quantizes {node.name!r}; a program of integers needs a grid there.")

    def _call(self, node: Any) -> None:
        snap, dequantize = torch.ops.hawq_lightning.snap.default, torch.ops.hawq_lightning.dequantize.default
        if node.target is dequantize or not any(isinstance(a, fx.Node) for a in node.args):
            return
        source = node.args[0]
        if node.target is snap:
            codes, grid = self.codes[source]
            wanted = _grid_of(node)
            self.codes[node] = (codes, grid) if grid == wanted else (self._quantize(self._read(source), wanted), wanted)
        elif node.target in _NOTHING:
            self.codes[node] = self.codes[source]
        elif (shortcut := self._widened(node)) is not None:
            self.codes[node] = shortcut
        elif node.target in (aten.slice.Tensor, aten.pad.default, aten.constant_pad_nd.default):
            return  # a part of a shortcut; whatever reads it otherwise complains
        elif node.target in _MOVES:
            self._finish(node, self._same(node), self._grid(source))
        elif node.target in _WEIGHTED:
            x, weight, *rest = node.args
            self._finish(node, self.graph.call_function(node.target, (
                self._read(x), self._weight(weight), *(self._constant(r) for r in rest)
            )))  # fmt: skip
        elif node.target is aten.mean.dim and not (len(node.args) > 2 and node.args[2]):
            self.codes[node] = self._pooled(node)
        else:
            self._finish(node, self._same(node))

    def _pooled(self, node: Any) -> tuple[fx.Node, Grid]:
        """A mean that drops its axes: XNNPACK takes one that keeps them, and a view."""
        grid = self._planned(node) or self._calibrated(node)
        mean = self.graph.call_function(aten.mean.dim, (self._read(node.args[0]), node.args[1], True))
        read = self.graph.call_function(
            decomposed.dequantize_per_tensor.default, (self._quantize(mean, grid), *grid.arguments)
        )
        flat = self.graph.call_function(aten.view.default, (read, list(node.meta["val"].shape)))
        return self._quantize(flat, grid), grid

    def _same(self, node: Any) -> fx.Node:
        return self.graph.call_function(
            node.target,
            fx.node.map_arg(node.args, self._read),
            fx.node.map_arg(node.kwargs, self._read),
        )

    def _finish(self, node: fx.Node, made: fx.Node, grid: Grid | None = None) -> None:
        """Quantize a result, after the ReLU behind it where that is its only reader."""
        last, chain = node, [node]
        if grid is None:
            while len(last.users) == 1 and (reader := next(iter(last.users))).target in _ACTIVATIONS:
                made = self.graph.call_function(reader.target, (made, *reader.args[1:]))
                last = reader
                chain.append(last)
            grid = self._planned(last) or self._calibrated(last)
        entry = (self._quantize(made, grid), grid)
        self.codes |= dict.fromkeys(chain, entry)

    def _planned(self, node: fx.Node) -> Grid | None:
        """The grid of the first layer that reads a tensor, also behind what only moves its values."""
        for user in node.users:
            if user.target is torch.ops.hawq_lightning.snap.default:
                self.planned.add(node.name)
                return _grid_of(user)
            if user.target in _MOVES + _NOTHING and (grid := self._planned(user)) is not None:
                self.planned.discard(user.name)
                self.planned.add(node.name)
                return grid
        return None

    def _calibrated(self, node: fx.Node) -> Grid:
        self.calibrated.add(node.name)
        return self.ranges.grid(node)

    def _grid(self, node: Any) -> Grid:
        return self.codes[node][1]

    def _quantize(self, x: fx.Node, grid: Grid) -> fx.Node:
        return self.graph.call_function(decomposed.quantize_per_tensor.default, (x, *grid.arguments))

    def _read(self, node: Any) -> fx.Node:
        """A dequantize node for one reader."""
        if node not in self.codes:
            raise HawqError(f"The operation {node.target} has no integer form here; the ONNX file leaves it float.")
        codes, grid = self.codes[node]
        return self.graph.call_function(decomposed.dequantize_per_tensor.default, (codes, *grid.arguments))

    def _constant(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        tensor = torch.utils._pytree.tree_leaves(_attribute(self.source, str(value.target)))[0]
        return self._stored(value.name, tensor)

    def _stored(self, name: str, tensor: torch.Tensor) -> fx.Node:
        name = name.replace(".", "_")
        self.root.register_buffer(name, tensor.detach().clone())
        return self.graph.get_attr(name)

    def _weight(self, node: Any) -> fx.Node:
        if node.target is not torch.ops.hawq_lightning.dequantize.default:
            raise HawqError(f"The weight {node.name!r} is float; a program of integers needs a plan for every layer.")
        codes, scale = (_attribute(self.source, str(a.target)) for a in node.args[:2])
        layer = str(node.args[0].target).rpartition(".")[0].rpartition(".")[0]
        if codes.dtype != torch.int8:
            raise HawqError(f"The codes of {layer!r} need more than eight bits, which a program of int8 has not.")
        axis = node.args[2]
        turned, positive, count = positive_scales(codes.numpy(), scale.numpy(), axis, 8)
        if count:
            self.clamped[layer] = count
        positive[positive == 0] = 1.0  # a dead channel, whose codes are worth nothing
        turned[(scale == 0).numpy().reshape([-1 if i == axis else 1 for i in range(turned.ndim)]).nonzero()[0]] = 0
        return self._dequantized(node.name, torch.from_numpy(turned), torch.from_numpy(positive), axis)

    def _dequantized(self, name: str, codes: torch.Tensor, scale: torch.Tensor, axis: int) -> fx.Node:
        scales = self._stored(f"{name}_scale", scale)
        zeros = self._stored(f"{name}_zero", torch.zeros(len(scale), dtype=torch.int64))
        how = (scales, zeros, axis, -HIGH if bool((codes > LOW).all()) else LOW, HIGH, torch.int8)
        if self.float_weights:
            shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
            floats = self._stored(f"{name}_float", codes.float() * scale.view(shape))
            held = self.graph.call_function(decomposed.quantize_per_channel.default, (floats, *how))
        else:
            held = self._stored(f"{name}_codes", codes)
        return self.graph.call_function(decomposed.dequantize_per_channel.default, (held, *how))

    def _widened(self, node: Any) -> tuple[fx.Node, Grid] | None:
        """A padded strided slice (ResNet's option A) as a convolution of ones: XNNPACK takes no slices."""
        if node.target not in (aten.pad.default, aten.constant_pad_nd.default):
            return None
        padding, source, steps = list(node.args[1]), node.args[0], {2: 1, 3: 1}
        while getattr(source, "target", None) is aten.slice.Tensor:
            given: list[Any] = list(source.args[1:])
            axis, start, stop, step = given + [0, 0, None, 1][len(given) :]
            if axis not in steps or start != 0 or (stop is not None and stop < 1 << 31):
                return None
            steps[axis] *= step
            source = source.args[0]
        if source not in self.codes or len(padding) != 6 or any(padding[:4]):
            return None
        before, after = padding[4:]
        channels = node.meta["val"].shape[1] - before - after
        ones = torch.zeros(channels + before + after, channels, 1, 1, dtype=torch.int8)
        ones[torch.arange(channels) + before, torch.arange(channels)] = 1
        weight = self._dequantized(node.name, ones, torch.ones(len(ones), dtype=torch.float32), 0)
        made = self.graph.call_function(aten.conv2d.default, (self._read(source), weight, None, [steps[2], steps[3]]))
        grid = self._grid(source)
        return self._quantize(made, grid), grid


def _grid_of(snap: Any) -> Grid:
    _, scale, zero, top = snap.args
    return Grid(scale, int(zero) + LOW, LOW + int(top))


def _attribute(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module
