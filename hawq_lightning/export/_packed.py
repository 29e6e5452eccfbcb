"""The packed file of a quantized network: bit-packed codes, and everything else exactly as it is.

The codes are those that training saw, BatchNorm unfolded, so the reloaded network gives the same logits bit for bit. It
is an ordinary safetensors file, see :mod:`hawq_lightning.export._contents`. ``file_bytes`` of a plan is
``packed_overhead`` and for every weight site ``ceil(numel * bits / 8)`` and the ``storage_bytes`` of its code format,
to the byte: the header is filled up to the length that the longest plan would need.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from hawq_lightning._code_formats import CODE_FORMATS
from hawq_lightning._errors import HawqError
from hawq_lightning._plan import ACTIVATION_BITS, WEIGHT_BITS, Plan, PlanSite
from hawq_lightning._site_table import Site
from hawq_lightning._types import JsonObject, Model
from hawq_lightning._values import check_has_values
from hawq_lightning.export import _packed_v3, _safetensors
from hawq_lightning.export._bits import pack, packed_bytes
from hawq_lightning.export._contents import (
    CODES,
    FORMAT,
    VERSION,
    PackedFile,
    StoredSite,
    contents,
    metadata_of,
    site_entry,
)
from hawq_lightning.export._inventory import check_same, plain, renaming, rest_of, rest_to_store, weight_of
from hawq_lightning.export._safetensors import DTYPES, TORCH_TYPES, Spec, spec_of
from hawq_lightning.layers import FakeQuantLayer, channel_axis, find_kind
from hawq_lightning.quantization import (
    MIDRISE_ZERO,
    QuantizedLayer,
    Quantizer,
    QuantizerSpec,
    Storage,
    quantizer_named,
    to_fake_quantized,
)

Value = TypeVar("Value", torch.Tensor, Spec)
_LONGEST = 1.2345678901234567e-05  # no positive float32 takes more digits


def packed_overhead(
    model: nn.Module, sites: Iterable[Site | PlanSite], quantizer: str | QuantizerSpec = "uniform"
) -> int:
    """Bytes of the packed file that no choice of bits changes: all but the codes of weights and their scales or bases.

    Args:
        model: float or with fake-quant layers.
        sites: the sites that the plan will have: a ``SiteTable``, ``plan.sites``, or any part of them.
        quantizer: that the plan will have.

    Raises:
        HawqError: the model holds something that the file cannot.
    """
    sites, spec = tuple(sites), quantizer_named(quantizer)
    modules = {plain(n): m for n, m in model.named_modules(remove_duplicate=False)}
    specs, metadata = _largest(model, sites, spec)
    size = _safetensors.header_bytes(specs, metadata) + sum(s.nbytes for s in specs.values())
    for site in sites:
        if (layer := weight_of(model, site, modules)) is not None:
            widest = list(_forms(spec, site, layer))[-1].site
            storage_bytes = CODE_FORMATS[widest.code].storage_bytes
            size -= packed_bytes(site.numel, widest.bits) + storage_bytes(site.shape[channel_axis(layer)], widest.bits)
    return size


def _largest(
    model: nn.Module, sites: tuple[Site | PlanSite, ...], quantizer: QuantizerSpec
) -> tuple[dict[str, Spec], dict[str, str]]:
    """Tensors and metadata that take at least the bytes of those of any plan over these sites."""
    modules = {plain(n): m for n, m in model.named_modules(remove_duplicate=False)}
    entries: dict[str, JsonObject] = {}
    tensors: dict[str, Spec] = {}
    for site in sites:
        layer = weight_of(model, site, modules)
        forms = list(_forms(quantizer, site, layer))
        entries[site.name] = max((site_entry(form) for form in forms), key=lambda entry: len(json.dumps(entry)))
        for form in forms:
            for name, tensor in form.storage.tensors.items():
                key, new = f"{site.name}.{name}", spec_of(tensor)
                tensors[key] = max(new, tensors.get(key, new), key=lambda s: s.nbytes)
        if layer is not None:
            tensors[f"{site.name}.{CODES}"] = Spec("U8", (packed_bytes(site.numel, forms[-1].site.bits),))
    rest = {keys: spec_of(t) for keys, t in rest_to_store(model, sites).items()}
    return _ordered(tensors, rest), metadata_of(entries, rest)


def save_packed(model: nn.Module, plan: Plan, path: str | Path) -> int:
    """Write the packed file of a model that is quantized by ``plan``.

    Args:
        model: with fake-quant layers, enabled; it stays as it is.
        plan: the plan that it carries.
        path: of the file, usually ``model.safetensors``; replaced atomically.

    Returns:
        The file's size in bytes.

    Raises:
        HawqError: the model is float, carries another plan, holds something that cannot be stored, or the path cannot
            be written.
    """
    entries: dict[str, JsonObject] = {}
    tensors: dict[str, torch.Tensor] = {}
    for stored in stored_sites(model, plan):
        name = stored.site.name
        entries[name] = site_entry(stored)
        tensors |= {f"{name}.{part}": t for part, t in stored.storage.tensors.items()}
        if stored.codes is not None:
            tensors[f"{name}.{CODES}"] = torch.from_numpy(pack(stored.codes, stored.site.bits))
    rest = {keys: t.detach().cpu().contiguous() for keys, t in rest_to_store(model, plan.sites).items()}
    metadata = metadata_of(entries, rest)
    layer = quantized_by_name(model)[plan.sites[0].layers[0]]
    spec = quantizer_named(layer.weight_quantizer.name, layer.quantizer_options)
    header_bytes = _safetensors.header_bytes(*_largest(model, plan.sites, spec))
    return _safetensors.write(path, _ordered(tensors, rest), metadata, header_bytes)


def stored_sites(model: nn.Module, plan: Plan) -> Iterator[StoredSite]:
    """The sites of a plan as files hold them: codes of weights, and what each quantizer stores.

    Args:
        model: with fake-quant layers, enabled; it stays as it is.
        plan: the plan that it carries.

    Raises:
        HawqError: the model is float, carries another plan, or a weight is not finite or not on its quantizer's grid.
    """
    layers = quantized_by_name(model)
    check_enabled(layers, plan)
    modules: Mapping[str, nn.Module] = {plain(n): m for n, m in model.named_modules(remove_duplicate=False)}
    for site in plan.sites:
        weight_of(model, site, modules)
        yield _stored_weight(site, layers) if site.kind == "weight" else _stored_activation(site, layers)


def read_packed(path: str | Path) -> PackedFile:
    """Read and check a packed file of any version, without a model.

    Raises:
        HawqError: no such file, not a packed file, an unknown version, corrupt or cut short, or of a quantizer of the
            user's own whose file was not imported.
    """
    metadata = _safetensors.read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise HawqError(f"{path} is not a packed file of hawq_lightning (its format is {metadata.get('format')!r}).")
    known = (*_packed_v3.VERSIONS, VERSION)
    if (version := metadata.get("version")) not in known:
        raise HawqError(f"{path} has version {version!r}; this release reads {', '.join(known)}.")
    parts = _safetensors.read(path) if version == VERSION else None
    try:
        file = _packed_v3.read(path) if parts is None else contents(*parts)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, error) from error
    for stored in file.sites:
        quantizer_named(stored.quantizer)
    sites = []
    for stored in file.sites:
        try:
            sites.append(stored.checked())
        except HawqError as error:
            raise _corrupt(path, f"of {stored.site.name!r} {error}") from error
    return PackedFile(tuple(sites), file.rest)


def load_packed(path: str | Path, model: Model) -> Model:
    """Quantize a freshly built model from a packed file; it then gives the saved model's logits, bit for bit.

    Args:
        path: written by :func:`save_packed`.
        model: of the same architecture, float or with fake-quant layers, on any device; changed in place. Training or
            evaluation mode stays. A wrapper around the saved model, or the part that it wrapped, will do too.

    Returns:
        ``model``, quantized.

    Raises:
        HawqError: the file is no packed file, damaged, or made for another model (names the sites that differ); the
            model is then as it was.
    """
    file = read_packed(path)
    check_has_values(model, "load_packed")
    modules = {plain(n): m for n, m in model.named_modules(remove_duplicate=False)}
    first = file.weights[0].site.layers[0]
    rename = renaming(first, [n for n, m in modules.items() if find_kind(m) is not None])
    owned = {id(modules[rename(n)]) for s in file.weights for n in s.site.layers if rename(n) in modules}
    targets = {rename.inside(keys): tensor for keys, tensor in rest_of(model, owned) if rename.inside(keys)}
    rest = {rename.keys(keys): tensor for keys, tensor in file.rest.items() if rename.keys(keys)}
    check_same(file, modules, targets, rest, rename)
    readers = {rename(n): s.quantizer for s in file.sites if not s.storage.plain for n in s.site.layers}
    with torch.no_grad():
        for module in list(model.modules()):
            if isinstance(module, Quantizer):
                module.disable()
        for stored in file.sites:
            site = stored.site
            for name in map(rename, site.layers):
                # the codes as they are: nothing of what learned them is left
                layer = to_fake_quantized(modules[name], readers.get(name, "uniform"))
                if stored.codes is None:
                    layer.input_quantizer.from_storage(site.bits, site.code, stored.storage)
                else:
                    layer.weight_quantizer.from_storage(site.bits, site.code, stored.storage)
                    layer.weight.copy_(_weight(layer, stored.codes))
        # after the weights: one that something else reads as well (a tied embedding) comes back exactly
        for keys, tensor in rest.items():
            targets[keys].copy_(tensor)
        for stored in file.weights:
            for name in map(rename, stored.site.layers):
                _untie(modules[name], stored)
    return model


def _weight(layer: QuantizedLayer, codes: torch.Tensor) -> torch.Tensor:
    return layer.weight_quantizer.dequantize(codes.to(layer.weight_quantizer.num_bits.device))


def _untie(layer: nn.Module, stored: StoredSite) -> None:
    """Where a tied float weight does not round to the codes (DoReFa squashes first), the layer gets its own."""
    assert isinstance(layer, FakeQuantLayer) and stored.codes is not None
    levels = _weight(layer, stored.codes).to(layer.weight.dtype)
    if not torch.equal(layer.weight_quantizer.eval_weight(layer.weight), levels):
        layer.weight = nn.Parameter(levels, requires_grad=layer.weight.requires_grad)


def _stored_weight(site: PlanSite, layers: Mapping[str, QuantizedLayer]) -> StoredSite:
    layer = layers[site.layers[0]]
    quantizer, weight = layer.weight_quantizer, layer.weight
    if not torch.isfinite(weight).all():
        raise HawqError(f"The weight of {site.layers[0]!r} holds NaN or Inf; it cannot be packed.")
    codes = quantizer.codes(weight)
    narrow = torch.float32 if weight.dtype == torch.float64 else weight.dtype
    if not torch.equal(quantizer.dequantize(codes).to(narrow), quantizer.eval_weight(weight).to(narrow)):
        raise HawqError(
            f"The weight of {site.layers[0]!r} is not on the grid of its quantizer {quantizer.name!r}; packed, the "
            "network would be another one."
        )
    storage, reader = quantizer.storage(), layer.weight_quantizer.name
    return _stored(site, quantizer.bits, quantizer.code, storage, reader, layer, codes)


def _stored_activation(site: PlanSite, layers: Mapping[str, QuantizedLayer]) -> StoredSite:
    layer = layers[site.layers[0]]
    quantizer = layer.input_quantizer
    return _stored(site, quantizer.bits, site.code, quantizer.storage(), layer.weight_quantizer.name)


def _stored(
    site: Site | PlanSite, bits: int, code: str, storage: Storage, reader: str,
    layer: nn.Module | None = None, codes: torch.Tensor | None = None,
) -> StoredSite:  # fmt: skip
    planned = PlanSite(site.name, site.kind, tuple(site.layers), tuple(site.shape), site.numel, bits, code)
    reader = "uniform" if storage.plain else reader
    if layer is None:
        return StoredSite(planned, storage, reader)
    dtype = layer.weight.dtype
    assert isinstance(dtype, torch.dtype)
    return StoredSite(planned, storage, reader, codes, channel_axis(layer), DTYPES[dtype])


def _forms(spec: QuantizerSpec, site: Site | PlanSite, layer: nn.Module | None) -> Iterator[StoredSite]:
    """How a site may be stored: at every width in every code format; numbers as long as they can be."""
    if layer is None:
        reads = spec.activation_quantizer()
        for bits in ACTIVATION_BITS:
            reads.enable(bits, 1.0, (1 << bits) - 1)
            yield _stored(site, bits, "affine", _longest(reads.storage()), spec.name)
        return
    axis = channel_axis(layer)
    quantizer = spec.weight_quantizer(int(site.shape[axis]), axis)
    for bits in WEIGHT_BITS:
        for code in quantizer.code_formats(bits):
            quantizer.enable(bits, 1.0, MIDRISE_ZERO if code == "midrise" else 0.0)
            yield _stored(site, bits, code, _longest(quantizer.storage()), spec.name, layer)


def _longest(storage: Storage) -> Storage:
    facts = {k: _LONGEST if isinstance(v, float) else v for k, v in storage.facts.items()}
    return Storage(storage.tensors, facts, storage.plain)


def _ordered(tensors: Mapping[str, Value], rest: Mapping[tuple[str, ...], Value]) -> dict[str, Value]:
    """All tensors of a file: wide types first, and codes last, whose sizes the bits change.

    Raises:
        HawqError: two have one name.
    """
    named: dict[str, Value] = {keys[0]: value for keys, value in rest.items()}
    if twice := sorted(set(named) & set(tensors)):
        raise HawqError(f"The model's state holds {twice[0]!r}, which is what a site's tensor is called in the file.")

    def key(item: tuple[str, Value]) -> tuple[int, bool, bool, str]:
        name, value = item
        spec = value if isinstance(value, Spec) else spec_of(value)
        return -TORCH_TYPES[spec.dtype].itemsize, name in tensors, name.endswith(f".{CODES}"), name

    named.update(tensors)
    return dict(sorted(named.items(), key=key))


def quantized_by_name(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The fake-quant layers under all their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {plain(n): m for n, m in modules if isinstance(m, FakeQuantLayer)}


def _corrupt(path: str | Path, error: object) -> HawqError:
    return HawqError(f"The packed file {path} is corrupt: {error}.")


def check_enabled(layers: Mapping[str, QuantizedLayer], plan: Plan) -> None:
    """Raise HawqError, naming the site, unless these layers carry exactly ``plan``."""
    planned: set[int] = set()
    for site in plan.reconciled().sites:
        for name in site.layers:
            if name not in layers:
                raise HawqError(f"The model is not quantized at {name!r}: call quantize(model, plan) first.")
            quantizer = layers[name].weight_quantizer if site.kind == "weight" else layers[name].input_quantizer
            planned.add(id(quantizer))
            quantizer.refresh()
            reads = layers[site.layers[0]].input_quantizer
            if site.kind == "activation" and float(quantizer.scale) != float(reads.scale):
                raise HawqError(
                    f"The layers of {site.name!r} read one tensor by different grids, {site.layers[0]!r} and {name!r}; "
                    "call hawq_lightning.quantization.tie_scales(model, plan) before training goes on."
                )
            if quantizer.bits == 0:
                raise HawqError(f"The quantizer of {site.name!r} was never enabled: call quantize(model, plan) first.")
            code = layers[name].weight_quantizer.code if site.kind == "weight" else site.code
            if quantizer.bits != site.bits or code != site.code:
                raise HawqError(
                    f"The model carries another plan: {site.name!r} has {quantizer.bits} bits ({code}), "
                    f"the plan says {site.bits} ({site.code})."
                )
            if site.kind == "activation" and site.code != "affine":
                raise HawqError(f"Site {site.name!r}: code format {site.code!r} cannot be packed.")
    for name, layer in layers.items():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer.bits and id(quantizer) not in planned:
                raise HawqError(
                    f"The model carries another plan: {name!r} has an enabled quantizer that the plan has not."
                )
