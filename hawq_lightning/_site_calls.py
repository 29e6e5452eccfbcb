"""Which layer calls of real forward passes belong to the network: told by the graph behind the loss, never by names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from hawq_lightning._attention_calls import AttentionCalls
from hawq_lightning._batchnorm import norms_behind
from hawq_lightning._depth import LayerDepths
from hawq_lightning._function_reads import FunctionReads
from hawq_lightning._fused import fused_transformers_off
from hawq_lightning._integer_calls import IntegerCalls
from hawq_lightning._loss_graph import Trained, graph_alone, graph_behind, nodes_of, tensors_of, trainable, walk
from hawq_lightning._product_counter import ProductCounter
from hawq_lightning._reads import Read, version_of
from hawq_lightning._recomputed import reentrant_checkpoints_replaced
from hawq_lightning.layers import WeightReader

NOT_CALLED = "not called in the forward pass"
BY_FUNCTION_ONLY = "a function reads its weight; the layer itself is not called"
WITHOUT_GRADIENTS = "run without gradients, as teachers are"
OTHER_LOSS = "trained by a later loss than the first that the step sends back; MeasureConfig(loss_fn=...) can name one"
NO_GRADIENT = "no gradient of the loss comes by it, as with teachers whose outputs are detached"
FROZEN = "frozen, and nothing trained follows it, as with teachers and perceptual losses"


@dataclass(frozen=True)
class _Call:
    layer: str
    read: torch.Tensor  # kept, so that its id stays its own while the pass runs
    version: int
    sources: list[Node]  # where the tensor stands in the graph
    nodes: list[Node]  # where the product does
    with_gradients: bool
    macs: int
    inside: tuple[int, ...]  # numbers of the module calls around it


@dataclass(frozen=True)
class _Output:
    """A tensor of two axes or more that the call of a module with children gave."""

    number: int
    nodes: list[Node]


@dataclass
class SiteCalls:
    """What passes over one or several batches tell of layers.

    Attributes:
        model: that runs.
        layers: those that may be sites.
        every_layer: these, and those that are left out by patterns.
        trained: parameters that training moves; ``None``: those that want gradients.
        requested: the user has named the layers: whichever is called is one of the network.
        reads: of the layers that belong to the network.
        macs: layer -> multiply-accumulates of one image.
        other_macs: of one image, outside of these.
        norms: layer -> BatchNorm behind it.
        depths: of the layers.
        left: layer that was not found to be of the network -> why.
        read_by_function: layers whose weight a function reads.
        attention: modules whose attention is looked at, by name.
        integer: looks at what integer kernels keep as codes; ``None``: nobody asks.
    """

    model: nn.Module
    layers: Mapping[str, WeightReader]
    every_layer: Mapping[str, WeightReader]
    trained: Trained | None = None
    requested: bool = False
    reads: list[Read] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    other_macs: int = 0
    norms: dict[str, str] = field(default_factory=dict)
    depths: LayerDepths = field(default_factory=LayerDepths)
    left: dict[str, str] = field(default_factory=dict)
    read_by_function: set[str] = field(default_factory=set)
    attention: AttentionCalls = field(default_factory=AttentionCalls)
    integer: IntegerCalls | None = None
    _passes: int = 0
    _all_macs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left = dict.fromkeys(self.layers, NOT_CALLED)
        ids = trainable(self.model)
        if self.trained is not None and not self.trained.ids.isdisjoint(ids):
            ids &= self.trained.ids
        self._trained = ids
        self._own = {n: self._trained & {id(p) for p in x.module.parameters()} for n, x in self.every_layer.items()}

    @property
    def found(self) -> set[str]:
        """Layers of the network."""
        return self.layers.keys() - self.left.keys()

    def run(self, run: Callable[[], object], images: int, named: Mapping[str, nn.Module]) -> None:
        """Look at one pass.

        Args:
            run: gives the loss, or what the model returns.
            images: of the batch.
            named: every module by name.
        """
        calls, outputs, result, counter = graph_alone(lambda: self._record(run, named))
        self._passes += 1
        graph = graph_behind(result)
        self.attention.pass_ended(graph, self._passes, images)
        mine = [c for c in calls if c.layer in self.layers]
        chosen = self._of_network(graph, mine, outputs)
        before = self.found
        for name, of_layer in _by_layer(chosen).items():
            if name in self.left:
                del self.left[name]
                self.macs[name] = sum(c.macs for c in of_layer) // images
        if self.integer is not None:
            self.integer.pass_ended(dict.fromkeys(self.found), self.norms, images)
        for name in {c.layer for c in mine} & self.left.keys():
            self.left[name] = self._why(graph, [c for c in mine if c.layer == name])
        for name in {c.layer for c in calls} - self.macs.keys() - self._all_macs.keys():
            self._all_macs[name] = sum(c.macs for c in calls if c.layer == name) // images
        if self._passes == 1:
            rest, known = counter.macs - sum(c.macs for c in calls), sum(c.macs for c in calls)
            self.other_macs = rest // images if rest > known * 1e-6 else 0
        if self._passes == 1 or self.found != before:
            self.reads += [
                Read(c.layer, (self._passes, id(c.read), c.version), tuple(c.read.shape), images)
                for c in chosen
                if not _is_identity(c.read)
            ]

    def macs_of(self, layer: str) -> int:
        """Multiply-accumulates of one image in any layer that is called."""
        return self.macs.get(layer, self._all_macs.get(layer, 0))

    def _record(
        self, run: Callable[[], object], named: Mapping[str, nn.Module]
    ) -> tuple[list[_Call], list[_Output], object, ProductCounter]:
        calls: list[_Call] = []
        given: dict[str, torch.Tensor] = {}  # what a layer was called with, which it may lay out anew for its product
        inside: list[int] = []
        outputs: list[_Output] = []
        results: list[object] = []

        def record_calls_of(name: str, reader: WeightReader) -> list[RemovableHandle]:
            def read(x: torch.Tensor) -> torch.Tensor:
                given[name] = x
                return x

            def record(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
                macs, x = reader.macs(x, output), given.pop(name, x)
                product = _in_graph(output)
                if reader.kind.by_contents:
                    counter.follow(name, product)
                self.depths.passed(name, x, product)
                nodes = nodes_of(product)
                calls.append(
                    _Call(name, x, version_of(x), nodes_of(x), nodes, torch.is_grad_enabled(), macs, tuple(inside))
                )
                return None if product is output else product

            return [reader.on_read(read), reader.on_call(record)]

        def runs() -> object:
            results.append(run())
            return results[-1]

        counter, functions = ProductCounter(), FunctionReads(self.model, self.every_layer)
        handles = [handle for n, reader in self.every_layer.items() for handle in record_calls_of(n, reader)]
        handles += self._enclosing(inside, outputs)
        handles += self.attention.watch()
        handles += [] if self.integer is None else self.integer.watch()
        modules = {n: reader.module for n, reader in self.layers.items()}
        try:
            with (
                torch.enable_grad(), counter, self.depths,
                reentrant_checkpoints_replaced(), fused_transformers_off(), functions,
            ):  # fmt: skip
                norms = norms_behind(self.model, named, modules, runs)
        finally:
            for handle in handles:
                handle.remove()
        calls = [_with_macs(c, counter, calls) if self.every_layer[c.layer].kind.by_contents else c for c in calls]
        self.norms = {**norms, **self.norms}
        self.read_by_function |= {*functions.layers(any(c.with_gradients for c in calls if c.layer in self.layers))}
        return calls, outputs, results[-1], counter

    def _enclosing(self, inside: list[int], outputs: list[_Output]) -> list[RemovableHandle]:
        """Note which module calls are under way, and what they give, where that matters: for frozen layers."""
        if not self._trained or all(self._own.values()):
            return []
        numbers = iter(range(1 << 62))

        def enter(*_: object) -> None:
            inside.append(next(numbers))

        def leave(module: nn.Module, args: object, output: object) -> None:
            number = inside.pop()
            for tensor in tensors_of(output):
                if tensor.ndim > 1 and (nodes := nodes_of(tensor)):  # else it is a loss
                    outputs.append(_Output(number, nodes))

        handles: list[RemovableHandle] = []
        for module in self.model.modules():
            if next(module.children(), None) is not None and not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, always_call=True))
        return handles

    def _of_network(self, graph: set[Node], calls: Sequence[_Call], outputs: Sequence[_Output]) -> list[_Call]:
        """The calls by which layers are part of the network, in order."""
        reached = [c for c in calls if self._reached(graph, c)]
        if not reached:  # no graph tells anything: whatever ran with gradients, or else whatever ran
            return [c for c in calls if c.with_gradients] or list(calls)
        moved = [c for c in reached if self._own[c.layer]]
        frozen = _Frozen(moved, outputs) if moved else None
        names: dict[str, list[_Call]] = {}
        for name, of_layer in _by_layer(calls).items():
            live = [c for c in of_layer if self._reached(graph, c)]
            if self.requested:
                live = live or of_layer
            elif not live and self.trained is not None and self.trained.other_losses and self._own[name]:
                live = [c for c in of_layer if c.with_gradients]
            elif live and frozen is not None and not self._own[name] and not frozen.needed(of_layer, live):
                live = []
            names[name] = live
        chosen = {id(c) for live in names.values() for c in live} or {id(c) for c in reached}
        return [c for c in calls if id(c) in chosen]

    def _reached(self, graph: set[Node], call: _Call) -> bool:
        return call.with_gradients and not graph.isdisjoint(call.nodes)

    def _why(self, graph: set[Node], calls: Sequence[_Call]) -> str:
        if not any(c.with_gradients for c in calls):
            others = self.trained is not None and self.trained.other_losses
            return OTHER_LOSS if others and self._own[calls[0].layer] else WITHOUT_GRADIENTS
        return FROZEN if any(self._reached(graph, c) for c in calls) else NO_GRADIENT


class _Frozen:
    """Which frozen layers a trained network needs.

    Those whose outputs a trained layer reads, as a frozen backbone's; and those that make an output together with
    trained layers, in the call of one module: a frozen head, or the base of adapters. A teacher makes an output of its
    own, and a perceptual loss is run by the step, or on targets as well.
    """

    def __init__(self, trained: Sequence[_Call], outputs: Sequence[_Output]) -> None:
        self._before = set(walk(n for c in trained for n in c.sources))
        nodes_of_trained = {n for c in trained for n in c.nodes}
        together = {number for c in trained for number in c.inside}
        self._joint: set[Node] = set()
        alone: set[Node] = set()
        # outer calls end last, and what is behind them holds what is behind inner ones
        for output in reversed(outputs):
            if output.number in together and not any(n in self._joint or n in alone for n in output.nodes):
                nodes = set(walk(output.nodes))
                (alone if nodes.isdisjoint(nodes_of_trained) else self._joint).update(nodes)

    def needed(self, calls: Sequence[_Call], live: Sequence[_Call]) -> bool:
        """Whether the network needs a frozen layer with these calls, of which some are on the way to the loss."""
        if any(not self._before.isdisjoint(c.nodes) for c in live):
            return True
        return all(not self._joint.isdisjoint(c.nodes) for c in calls if c.with_gradients)


def _with_macs(call: _Call, counter: ProductCounter, calls: Sequence[_Call]) -> _Call:
    """With its share of the products that a forward makes with the weight after it was read."""
    return replace(call, macs=counter.macs_of(call.layer) // sum(c.layer == call.layer for c in calls))


def _by_layer(calls: Iterable[_Call]) -> dict[str, list[_Call]]:
    out: dict[str, list[_Call]] = {}
    for call in calls:
        out.setdefault(call.layer, []).append(call)
    return out


def _is_identity(x: torch.Tensor) -> bool:
    """Whether a layer reads the identity matrix, as DoRA does to get its weight: that is no activation."""
    if x.layout != torch.strided:
        return False
    square = x.ndim == 2 and x.shape[0] == x.shape[1] > 1 and x.is_floating_point() and not x.is_meta
    return square and torch.equal(x, torch.eye(len(x), dtype=x.dtype, device=x.device))


def _in_graph(output: torch.Tensor) -> torch.Tensor:
    """The output of a frozen layer, as the beginning of a graph."""
    wanted = output.is_floating_point() or output.is_complex()
    if output.requires_grad or not torch.is_grad_enabled() or not wanted or output.is_inference():
        return output
    return output.detach().requires_grad_(True).clone()
