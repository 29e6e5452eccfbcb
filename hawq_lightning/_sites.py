"""Which weights and activations get a quantizer, and what stays float and why.

A *weight site* is one parameter and its reads: layers that share it are one site. An *activation site* is a connected
component of layer calls and the tensors that they read: layers reading one tensor share it, and a head applied to five
feature levels is one site with five tensors. The components come from a real forward pass, so any Python control flow
works.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

import torch
from torch import nn

from hawq_lightning._attention_calls import AttentionCalls, attention_operands
from hawq_lightning._batches import batch_images, default_forward, fresh_copy
from hawq_lightning._errors import HawqError, nearest, some
from hawq_lightning._float_rest import float_tensors
from hawq_lightning._integer_calls import IntegerCalls
from hawq_lightning._loss_graph import Trained
from hawq_lightning._patterns import Patterns, as_list, matches, named_modules
from hawq_lightning._reads import Key, Read
from hawq_lightning._site_calls import BY_FUNCTION_ONLY, SiteCalls
from hawq_lightning._site_table import FloatPart, Layer, Site, SiteTable
from hawq_lightning._tensor_sizes import size_of
from hawq_lightning._types import Batch, Outputs
from hawq_lightning._values import refuse_lazy
from hawq_lightning.layers import (
    ATTENTION,
    RECURRENT,
    HeldQuantizers,
    WeightReader,
    find_kind,
    kind_of,
    layer_type,
    quantizers_by_attribute,
    readers_of,
    type_names,
    why_float,
    writes_to_weights,
)

WRITTEN_TO = "its forward writes to its weight; torch.nn.utils.parametrize limits one that can be quantized"
NOT_INITIALISED = "not initialised yet"
READ_BY_FUNCTION = "a function reads its weight as well, past any quantizer"
MOST_PASSES = 64  # further batches that are tried while there are layers that none has used
Attention = bool | Literal["prepared"]
IntegerGrids = Literal["none", "shared", "own"]
"""Whether what integer kernels keep as codes are sites, on the grids of layers that read it or on its own."""
_Node = str | Key  # of the graph of layers and tensors


def site_name(layer: str, part: str) -> str:
    """``<layer>.weight`` or ``<layer>.input``; of a model that is itself a layer just the part."""
    return f"{layer}.{part}" if layer else part


def quantizable_layers(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None
) -> tuple[dict[str, WeightReader], list[FloatPart]]:
    """Layers that can get quantizers, by name, and the modules with parameters that cannot, with the reason.

    Args:
        model: any module; fake-quant layers count as the layers that they stand in for.
        include: glob on the layer's name, module type, or ``f(name, module) -> bool``; several mean any of them.
        exclude: the same forms; wins over ``include``.

    Raises:
        HawqError: a pattern that matches no layer.
    """
    include, exclude = as_list(include, "include"), as_list(exclude, "exclude")
    layers: dict[str, WeightReader] = {}
    floats: list[FloatPart] = []
    candidates: dict[str, WeightReader] = {}
    held: set[nn.Module] = set()  # parts of a layer: quantizers, and children whose weights it reads past their call
    for name, module in named_modules(model):
        if isinstance(module, HeldQuantizers):
            held |= set(module.modules())
        if module in held:
            continue
        parameters = [p for n, p in module.named_parameters(recurse=False)]
        if find_kind(module) is not None:
            readers = readers_of(name, module)
            candidates |= readers
            held |= {reader.holder[0] for reader in readers.values()} - {module}
            floats += _beside_weights(name, module, readers.values())
            if isinstance(made := module._modules.get("parametrizations"), nn.Module):
                held |= set(made.modules())  # what the weight is computed from
            held |= {m for q in quantizers_by_attribute(module).values() for m in q.modules()}
        elif parameters:
            floats.append(_float_part(name, type(module).__name__, why_float(module), parameters))
    for patterns in (include, exclude):
        for pattern in patterns:
            if not any(matches(pattern, n, x.module) for n, x in candidates.items()) and not (
                attention_operands(model, pattern)
            ):
                text = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
                hint = nearest(text, [*candidates, *{type(x.module).__name__ for x in candidates.values()}])
                raise HawqError(f"The pattern {text!r} matches no quantizable layer.{hint}")
    for name, reader in candidates.items():
        module = reader.module
        included = not include or any(matches(p, name, module) for p in include)
        excluded = any(matches(p, name, module) for p in exclude)
        if isinstance(reader.weight, nn.UninitializedParameter):
            reason = NOT_INITIALISED if included and not excluded else "excluded"
            floats.append(FloatPart(name, reader.type_name, reason, 0, 0))
        elif not reader.weight.is_floating_point():
            floats.append(_left_out(name, reader, f"its weight is {str(reader.weight.dtype).removeprefix('torch.')}"))
        elif included and not excluded:
            layers[name] = reader
        else:
            floats.append(_left_out(name, reader, "excluded" if excluded else "not included"))
    return layers, floats


def check_layers(model: nn.Module, layers: Mapping[str, WeightReader], floats: Sequence[FloatPart]) -> None:
    """Refuse a model with nothing to quantize, or with weights that cannot be looked at yet.

    Args:
        model: any module.
        layers: from :func:`quantizable_layers`.
        floats: the same.

    Raises:
        HawqError: there is no layer, all are left out, or lazy ones have not run.
    """
    kind = type(model).__name__
    refuse_lazy(model, [f.name for f in floats if f.reason == NOT_INITIALISED])
    if not layers and (left := [f.name for f in floats if f.reason == "excluded"]):
        raise HawqError(f"include and exclude leave {kind} no quantizable layer; left out are {some(left)}.")
    if not layers:
        raise HawqError(f"{kind} has no quantizable layer; looked for {', '.join(type_names())}.")


def find_sites(
    model: nn.Module,
    run: Callable[[], object] | None,
    images: int = 1,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    later: Iterable[tuple[Callable[[], object], int]] = (),
    trained: Trained | None = None,
    attention: Attention = False,
    integer: IntegerGrids = "none",
) -> SiteTable:
    """Find all sites of ``model`` by one real forward pass ``run()`` over ``images`` images.

    A layer is part of the network if the loss's gradient comes by a call of it; a frozen one, if a trained layer reads
    what it makes, or if a module runs it together with trained ones. Layers that ``include`` names are, if they run.

    Args:
        model: any module.
        run: gives the loss, or what the model returns; ``None``: only weights are looked at.
        images: of the pass.
        include: patterns.
        exclude: patterns.
        later: further passes with their numbers of images, for layers that the first does not use.
        trained: the parameters that training moves; those that want gradients when not given.
        attention: queries, keys, probabilities and values of attention are sites as well; ``prepared``: of modules that
            have quantizers for them.
        integer: results that integer kernels keep as codes are sites as well: ``shared`` with the layers that read
            them, where those have 8 bits alone, or ``own``.

    Raises:
        HawqError: no quantizable layer, a pattern without a match, or a pass that calls none of the layers.
    """
    include, exclude = as_list(include, "include"), as_list(exclude, "exclude")
    layers, floats = quantizable_layers(model, include, exclude)
    if not layers or run is not None:
        check_layers(model, layers, floats)
    if run is None:
        table = _assemble(layers, dict.fromkeys(layers, 0), [], {}, floats, traced=False)
        return replace(table, float_tensors=float_tensors(model, layers.values(), floats))
    named = dict(named_modules(model))
    calls = SiteCalls(model, layers, quantizable_layers(model)[0], trained, bool(include))
    if attention:
        operands = attention_operands(model, include, exclude, prepared=attention == "prepared")
        modules = {x.name.rpartition(":")[0]: x.module for x in operands.values()}
        calls.attention = AttentionCalls(modules, operands)
    if integer != "none":
        calls.integer = IntegerCalls(model, layers)
    calls.run(run, images, named)
    for another, count in islice(later, MOST_PASSES):
        if not calls.left.keys() - calls.read_by_function:
            break
        calls.run(another, count, named)
    if not calls.found:
        raise HawqError("The forward pass called none of the quantizable layers: " + ", ".join(list(layers)[:4]) + ".")
    for name in [n for n in layers if n in calls.left]:
        reason = calls.left[name]
        if name in calls.read_by_function:
            reason = BY_FUNCTION_ONLY
        floats.append(_left_out(name, layers.pop(name), reason))
    for name in [n for n in calls.every_layer if n in calls.read_by_function and n in layers]:
        floats.append(_left_out(name, layers.pop(name), READ_BY_FUNCTION))
    written = [n for n, reader in layers.items() if writes_to_weights(reader.module)]
    for name in written:
        floats.append(_left_out(name, layers.pop(name), WRITTEN_TO))
    if not layers and written:
        raise HawqError(f"Nothing can be quantized: {some(written)} stays float, since {WRITTEN_TO}.")
    if not layers:
        raise HawqError("Nothing can be quantized: a function reads the weight of every layer that is called.")
    floats = [replace(f, macs=calls.macs_of(f.name)) for f in floats]
    ordered = {name: layers[name] for name in calls.macs if name in layers}
    reads = [r for r in calls.reads if r.layer in layers]
    reads += calls.attention.reads(_of_network(calls.attention.found, calls.every_layer, ordered))
    table = _assemble(ordered, {n: calls.macs[n] for n in ordered}, reads, calls.norms, floats, traced=True)
    products = calls.attention.products(table.reads)
    left = calls.other_macs - sum(p.macs for p in products)
    floats = [*table.floats, *_functional(left, floats)]
    table = replace(table, products=products, floats=tuple(floats))
    if calls.integer is not None:
        table = _with_results(table, calls.integer, calls.norms, shared=integer == "shared")
    rest = float_tensors(model, ordered.values(), floats)
    return replace(table, last=calls.depths.last(ordered), float_tensors=rest)


def sites(
    model: nn.Module,
    example_batch: Batch = None,
    *,
    forward: Callable[[nn.Module, Batch], Outputs] = default_forward,
    include: Patterns = None,
    exclude: Patterns = None,
    attention: bool = False,
    integer: IntegerGrids = "none",
) -> SiteTable:
    """Every site of a model, and what is *not* quantized, with shares of bytes and MACs.

    Args:
        model: any ``nn.Module``; it is left as it was.
        example_batch: one batch, inputs first; without it only the weights are known.
        forward: how to run the model on the batch.
        include: glob on layer names, layer type, or ``f(name, module) -> bool``; a list means any of them.
        exclude: the same forms; wins over ``include``.
        attention: queries, keys, probabilities and values of attention are sites as well.
        integer: results that integer kernels keep as codes are sites as well, and biases INT32, as of
            ``QuantizerConfig(deploy="integer")``: ``shared`` with the layers that read them, for activations of 8 bits
            alone, or ``own`` for others.

    Raises:
        HawqError: no quantizable layer, or a pattern that matches none.
    """
    if example_batch is None:
        return find_sites(model, None, 1, include, exclude)
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        return find_sites(
            model, lambda: forward(model, fresh_copy(example_batch)), batch_images(example_batch), include, exclude,
            attention=attention, integer=integer,
        )  # fmt: skip
    finally:
        for module, mode in modes.items():
            module.training = mode


def _of_network(modules: Iterable[str], every: Iterable[str], layers: Iterable[str]) -> set[str]:
    """Modules of attention that belong to the network, as their layers do, or those of the module around."""
    every, layers, out = [*every], {*layers}, set()
    for module in modules:
        around = module
        while not (near := [n for n in every if n == around or n.startswith(f"{around}." if around else "")]):
            around = around.rpartition(".")[0]
        if not layers.isdisjoint(near):
            out.add(module)
    return out


def _beside_weights(name: str, module: nn.Module, readers: Iterable[WeightReader]) -> list[FloatPart]:
    """Matrices of a module of any class that its forward reads beside its weights: an adapter's, biases of experts."""
    weights = {reader.parameter for reader in readers}
    rest = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim > 1 and n not in weights}
    if not rest or not kind_of(module).by_contents:
        return []
    reason = f"beside its weights: {', '.join(rest)}"
    return [_float_part(name, layer_type(module).__name__, reason, rest.values())]


def _left_out(name: str, reader: WeightReader, reason: str) -> FloatPart:
    return _float_part(name, reader.type_name, reason, reader.module.parameters(recurse=False))


def _float_part(name: str, type_name: str, reason: str, parameters: Iterable[torch.Tensor]) -> FloatPart:
    size = size_of(parameters)
    return FloatPart(name, type_name, reason, size.bytes, 0, size.float32_bytes, size.elements)


def _functional(macs: int, floats: Sequence[FloatPart]) -> list[FloatPart]:
    """Products outside the sites (attention, recurrent nets, functional calls), one entry in all."""
    if not macs:
        return []
    names = ", ".join(f.name or f.type for f in floats if f.reason in (ATTENTION, RECURRENT))
    return [FloatPart(names or "(functional)", "operations", "products outside convolution and linear layers", 0, macs)]


def _assemble(
    layers: Mapping[str, WeightReader],
    macs: Mapping[str, int],
    reads: Sequence[Read],
    norms: Mapping[str, str],
    floats: Sequence[FloatPart],
    traced: bool,
) -> SiteTable:
    readers: dict[int, list[WeightReader]] = {}
    for reader in layers.values():
        readers.setdefault(reader.key, []).append(reader)
    weight_of = {x.name: sharing[0].site for sharing in readers.values() for x in sharing}
    table: list[Site] = []
    for first, *others in readers.values():
        shape = tuple(first.weight.shape)
        names = (first.name, *(x.name for x in others))
        table.append(Site(first.site, "weight", names, shape, _product(shape), shape[first.channel_axis]))
    activation_of: dict[str, str] = {}
    for names_of_readers, tensors in _components(
        [r for r in reads if r.layer not in layers or layers[r.layer].read.reads_activation]
    ):
        name = site_name(names_of_readers[0], "input")
        tensors = [t for t in tensors if t.key[0] == tensors[0].key[0]]  # of one pass
        per_image = max(1, sum(t.numel for t in tensors) // tensors[0].images)  # few of many tokens, for an expert
        table.append(Site(name, "activation", tuple(names_of_readers), tensors[0].shape[1:], per_image))
        activation_of |= dict.fromkeys(names_of_readers, name)
    listed = tuple(
        Layer(n, x.type_name, weight_of[n], activation_of.get(n), macs[n], norms.get(n)) for n, x in layers.items()
    )
    return SiteTable(tuple(table), listed, tuple(floats), traced)


def _with_results(table: SiteTable, found: IntegerCalls, norms: Mapping[str, str], shared: bool) -> SiteTable:
    """With the results that lie on grids, and the layers with INT32 biases."""
    listed, reads, own = {s.name: s for s in table.sites}, table.reads, []
    layers = {x.name for x in table.layers}
    for place in found.places:
        sites = {reads[n] for n in place.layers if n in reads}
        if shared and len(sites) == 1:
            site = listed[sites.pop()]
            listed[site.name] = replace(site, layers=(*site.layers, *place.results))
        else:
            names = tuple(place.results)
            own.append(Site(names[0], "activation", names, place.shape, place.numel))
    rounded = {n: norms.get(n, "") for n in found.rounded if n in layers}
    users = Counter(rounded.values())
    rounded = {
        n: norm
        for n, norm in rounded.items()
        if (users[norm] == 1 if norm else getattr(found.layers[n].module, "bias", None) is not None)
    }
    return replace(table, sites=(*listed.values(), *own), biases=rounded)


def _components(reads: Sequence[Read]) -> list[tuple[list[str], list[Read]]]:
    """Layers that read the same tensors, with one read of each tensor."""
    parent: dict[_Node, _Node] = {}

    def root(x: _Node) -> _Node:
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for read in reads:
        parent[root(read.layer)] = root(read.key)
    groups: dict[_Node, tuple[list[str], dict[Key, Read]]] = {}
    for read in reads:
        readers, tensors = groups.setdefault(root(read.layer), ([], {}))
        if read.layer not in readers:
            readers.append(read.layer)
        tensors.setdefault(read.key, read)
    return [(readers, list(tensors.values())) for readers, tensors in groups.values()]


def _product(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
