"""Which weights and activations get a quantizer, and what stays float and why.

A *weight site* is one weight tensor (layers that share it are one site). An *activation site* is a connected component
of layer calls and the tensors that they read: layers reading one tensor share it, and a head applied to five feature
levels is one site with five tensors. The components come from a real forward pass, so any Python control flow works.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hawq_lightning._batches import batch_images, default_forward
from hawq_lightning._batchnorm import norms_behind
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._site_table import FloatPart, Layer, Site, SiteTable

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module")  # parts of names that torch.compile and FSDP add
QUANTIZABLE: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)

Pattern = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Sequence[Pattern] | None


def layer_type(module: nn.Module) -> type[nn.Module]:
    """The module's type; for a fake-quant twin the type that it stands in for."""
    return getattr(type(module), "float_type", type(module))


def channel_axis(module: nn.Module) -> int:
    """The axis of the weight that gets one scale an index: the output channels."""
    return 1 if issubclass(layer_type(module), nn.modules.conv._ConvTransposeNd) else 0


def site_name(layer: str, part: str) -> str:
    """``<layer>.weight`` or ``<layer>.input``; of a model that is itself a layer just the part."""
    return f"{layer}.{part}" if layer else part


def version_of(x: torch.Tensor) -> int:
    """How often a tensor was changed in place; tensors made in inference mode do not count."""
    return 0 if x.is_inference() else x._version


def quantizable_layers(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None
) -> tuple[dict[str, Any], list[FloatPart]]:
    """Layers that can get quantizers, by name, and the parametrized modules that cannot, with the reason.

    Args:
        model: any module; fake-quant twins count as the layers that they stand in for.
        include: glob on the layer's name, module type, or ``f(name, module) -> bool``; several mean any of them.
        exclude: likewise; wins over ``include``.

    Raises:
        HawqError: a pattern that matches no layer.
    """
    found: dict[str, Any] = {}
    floats: list[FloatPart] = []
    candidates: dict[str, Any] = {}
    for name, module in _named_modules(model):
        own = [p for n, p in module.named_parameters(recurse=False)]
        if layer_type(module) in QUANTIZABLE:
            candidates[name] = module
        elif own and not name.endswith("_quantizer"):
            size = sum(p.numel() * p.element_size() for p in own if not isinstance(p, nn.UninitializedParameter))
            floats.append(FloatPart(name, type(module).__name__, _why_float(module), size, 0))
    for patterns in (include, exclude):
        for pattern in _as_list(patterns):
            if not any(_matches(pattern, n, m) for n, m in candidates.items()):
                shown = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
                hint = nearest(shown, [*candidates, *{type(m).__name__ for m in candidates.values()}])
                raise HawqError(f"The pattern {shown!r} matches no quantizable layer.{hint}")
    for name, module in candidates.items():
        weight = module.weight
        wanted = not _as_list(include) or any(_matches(p, name, module) for p in _as_list(include))
        dropped = any(_matches(p, name, module) for p in _as_list(exclude))
        if isinstance(weight, nn.UninitializedParameter):
            floats.append(FloatPart(name, layer_type(module).__name__, "not initialised yet", 0, 0))
        elif wanted and not dropped:
            found[name] = module
        else:
            floats.append(_left_out(name, module, "excluded" if dropped else "not included"))
    return found, floats


def find_sites(
    model: nn.Module,
    run: Callable[[], Any] | None,
    images: int = 1,
    include: Patterns = None,
    exclude: Patterns = None,
) -> SiteTable:
    """Find all sites of ``model`` by one real forward pass ``run()`` over ``images`` images (no gradients).

    Raises:
        HawqError: no quantizable layer, a pattern without a match, or a pass that calls none of the layers.
    """
    layers, floats = quantizable_layers(model, include, exclude)
    if not layers:
        kinds = ", ".join(t.__name__ for t in QUANTIZABLE)
        raise HawqError(f"{type(model).__name__} has no quantizable layer; looked for {kinds}.")
    if run is None:
        return _assemble(layers, dict.fromkeys(layers, 0), [], {}, floats, 1, traced=False)
    reads: list[tuple[str, torch.Tensor, tuple[int, int]]] = []
    silent: list[tuple[str, torch.Tensor, tuple[int, int]]] = []  # where the model itself switched gradients off
    macs: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            macs[name] = macs.get(name, 0) + _macs(module, x, output)
            if name in layers:
                # the tensor is kept, so that its id stays its own; an in-place change makes it another one
                (reads if torch.is_grad_enabled() else silent).append((name, x, (id(x), version_of(x))))

        return record

    every, _ = quantizable_layers(model)
    handles = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in every.items()]
    counter = FlopCounterMode(display=False)
    needs = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in needs:
            p.requires_grad_(False)  # no graph is built, and yet the model's own no_grad shows
        with torch.enable_grad(), counter:
            norms = norms_behind(model, dict(_named_modules(model)), layers, run)
    finally:
        for p in needs:
            p.requires_grad_(True)
        for handle in handles:
            handle.remove()
    reads = reads or silent
    if not reads:
        raise HawqError("The forward pass called none of the quantizable layers: " + ", ".join(list(layers)[:4]) + ".")
    read = {name for name, *_ in reads}
    for name in [n for n in layers if n not in read]:
        reason = "run without gradients, as teachers are" if name in macs else "not called in the forward pass"
        floats.append(_left_out(name, layers.pop(name), reason))
    floats = [replace(f, macs=macs[f.name] // images) if f.name in macs else f for f in floats]
    floats += _functional(counter, macs, layers, floats, images)
    ordered = {name: layers[name] for name in macs if name in layers}
    return _assemble(ordered, {n: macs[n] // images for n in ordered}, reads, norms, floats, images, traced=True)


def sites(
    model: nn.Module,
    example_batch: Any = None,
    *,
    forward: Callable[[nn.Module, Any], Any] = default_forward,
    include: Patterns = None,
    exclude: Patterns = None,
) -> SiteTable:
    """Every site of a model, and what is *not* quantized, with shares of bytes and MACs.

    Args:
        model: any ``nn.Module``; it is left as it was.
        example_batch: one batch, inputs first; without it only the weights are known.
        forward: how to run the model on the batch.
        include: glob on layer names, layer type, or ``f(name, module) -> bool``; a list means any of them.
        exclude: likewise; wins over ``include``.

    Raises:
        HawqError: no quantizable layer, or a pattern that matches none.
    """
    if example_batch is None:
        return find_sites(model, None, 1, include, exclude)
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        return find_sites(model, lambda: forward(model, example_batch), batch_images(example_batch), include, exclude)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _named_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    # a compiled or sharded wrapper is the same module under a longer name
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part not in WRAPPERS), module


def _as_list(patterns: Patterns) -> list[Pattern]:
    if patterns is None:
        return []
    return list(patterns) if isinstance(patterns, Sequence) and not isinstance(patterns, str) else [patterns]


def _matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern) or pattern == layer_type(module).__name__
    if isinstance(pattern, type):
        return issubclass(layer_type(module), pattern)
    return bool(pattern(name, module))


def _why_float(module: nn.Module) -> str:
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized"
    if isinstance(module, QUANTIZABLE):
        base = next(t for t in type(module).__mro__ if t in QUANTIZABLE)
        return f"a subclass of {base.__name__} with a forward of its own"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "a look-up, not a product"
    if isinstance(module, nn.MultiheadAttention):
        return "functional attention"
    return "not a convolution or linear layer"


def _left_out(name: str, module: nn.Module, reason: str) -> FloatPart:
    size = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
    return FloatPart(name, layer_type(module).__name__, reason, size, 0)


def _macs(module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> int:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    positions = x if issubclass(layer_type(module), nn.modules.conv._ConvTransposeNd) else output
    return positions.numel() * weight[0].numel()


def _functional(
    counter: FlopCounterMode,
    macs: Mapping[str, int],
    layers: Mapping[str, nn.Module],
    floats: Sequence[FloatPart],
    images: int,
) -> list[FloatPart]:
    """Products outside the sites (attention, recurrent nets, functional calls), one entry in all."""
    rest = counter.get_total_flops() // 2 - sum(macs.values())
    if rest <= sum(macs.values()) * 1e-6:
        return []
    names = ", ".join(f.name or f.type for f in floats if f.reason in ("functional attention", "recurrent"))
    return [
        FloatPart(
            names or "(functional)", "operations", "products outside convolution and linear layers", 0, rest // images
        )
    ]


def _assemble(
    layers: Mapping[str, Any],
    macs: Mapping[str, int],
    reads: Sequence[tuple[str, torch.Tensor, tuple[int, int]]],
    norms: Mapping[str, str],
    floats: Sequence[FloatPart],
    images: int,
    traced: bool,
) -> SiteTable:
    owners: dict[int, list[str]] = {}
    for name, module in layers.items():
        owners.setdefault(id(module.weight), []).append(name)
    weight_of = {name: site_name(names[0], "weight") for names in owners.values() for name in names}
    out = []
    for names in owners.values():
        module = layers[names[0]]
        shape = tuple(module.weight.shape)
        out.append(
            Site(
                site_name(names[0], "weight"),
                "weight",
                tuple(names),
                shape,
                _product(shape),
                shape[channel_axis(module)],
            )
        )
    activation_of: dict[str, str] = {}
    for readers, tensors in _components(reads):
        name = site_name(readers[0], "input")
        per_image = sum(t.numel() for t in tensors) // images
        shape = tuple(tensors[0].shape[1:])
        out.append(Site(name, "activation", tuple(readers), shape, per_image))
        activation_of |= dict.fromkeys(readers, name)
    table = tuple(
        Layer(n, layer_type(m).__name__, weight_of[n], activation_of.get(n), macs[n], norms.get(n))
        for n, m in layers.items()
    )
    return SiteTable(tuple(out), table, tuple(floats), traced)


def _components(
    reads: Sequence[tuple[str, torch.Tensor, tuple[int, int]]],
) -> list[tuple[list[str], list[torch.Tensor]]]:
    parent: dict[Any, Any] = {}

    def root(x: Any) -> Any:
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for name, _, key in reads:
        parent[root(name)] = root(key)
    groups: dict[Any, tuple[list[str], dict[tuple[int, int], torch.Tensor]]] = {}
    for name, tensor, key in reads:
        readers, tensors = groups.setdefault(root(name), ([], {}))
        if name not in readers:
            readers.append(name)
        tensors[key] = tensor
    return [(readers, list(tensors.values())) for readers, tensors in groups.values()]


def _product(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
