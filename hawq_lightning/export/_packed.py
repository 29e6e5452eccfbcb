"""The packed file of a quantized network: bit-packed codes, and everything else exactly as it is.

The codes are those that training saw, BatchNorm unfolded, so the reloaded network gives the same logits bit for bit. It
is an ordinary safetensors file, see :mod:`hawq_lightning.export._contents`. ``file_bytes`` of a plan is
``packed_overhead`` and for every weight site ``ceil(numel * bits / 8)`` and the ``storage_bytes`` of its code format,
to the byte: the header is filled up to the length that the longest plan would need.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from hawq_lightning._attention_calls import results_named
from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning._types import JsonObject, Model
from hawq_lightning._values import check_has_values
from hawq_lightning.export import _packed_v3, _safetensors
from hawq_lightning.export._bits import pack
from hawq_lightning.export._contents import (
    CODES,
    FORMAT,
    VERSION,
    PackedFile,
    contents,
    metadata_of,
    ordered,
    site_entry,
)
from hawq_lightning.export._enabled import quantized_reads_by_name
from hawq_lightning.export._inventory import (
    check_same,
    operands_by_name,
    owned_by,
    readers_by_name,
    renaming,
    rest_of,
    rest_to_store,
)
from hawq_lightning.export._packed_size import largest
from hawq_lightning.export._stored import stored_sites
from hawq_lightning.layers import bake_parametrizations
from hawq_lightning.quantization import (
    QuantizedWeight,
    Quantizer,
    drop_results,
    plan_with_copies,
    put_attention,
    put_biases,
    put_results,
    quantizer_named,
    to_fake_quantized,
    warn_off_grid,
    with_operand,
    with_quantizers,
    with_result,
)


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
    plan = plan_with_copies(model, plan)
    for stored in stored_sites(model, plan):
        name = stored.site.name
        entries[name] = site_entry(stored)
        tensors |= {f"{name}.{part}": t for part, t in stored.storage.tensors.items()}
        if stored.codes is not None:
            tensors[f"{name}.{CODES}"] = torch.from_numpy(pack(stored.codes, stored.site.bits))
    layers = quantized_reads_by_name(model)
    warn_off_grid({n: x for n, x in layers.items() if isinstance(x, QuantizedWeight)})
    beside = rest_to_store(model, plan.sites)
    if sparse := [keys[0] for keys, t in beside.items() if t.layout != torch.strided]:
        raise HawqError(
            f"{sparse[0]!r} is sparse, which the packed file cannot hold: register it with persistent=False."
        )
    rest = {keys: t.detach().cpu().contiguous() for keys, t in beside.items()}
    metadata = metadata_of(entries, rest, plan.biases)
    spec = layers[plan.sites[0].layers[0]].spec
    header_bytes = _safetensors.header_bytes(*largest(model, plan.sites, spec, plan.biases))
    return _safetensors.write(path, ordered(tensors, rest), metadata, header_bytes)


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
    return PackedFile(tuple(sites), file.rest, file.biases)


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
    return put_packed(read_packed(path), model)


def put_packed(file: PackedFile, model: Model) -> Model:
    """What :func:`load_packed` does, with a file that was read."""
    check_has_values(model, "load_packed")
    readers = readers_by_name(model)
    rename = renaming(file.weights[0].site.layers[0], list(readers))
    renamed = [replace(s.site, layers=tuple(map(rename, s.site.layers))) for s in file.sites]
    targets = {
        rename.inside(keys): tensor
        for keys, tensor in rest_of(model, owned_by(renamed, readers))
        if rename.inside(keys)
    }
    served = {f"{layer.site}_{end}" for layer in readers.values() for end in ("orig", "mask", "u", "v", "g")}
    rest = {
        names: tensor
        for keys, tensor in file.rest.items()
        if (names := rename.keys(keys)) and (names in targets or served.isdisjoint(names))
    }
    named = [n for site in renamed for n in site.layers]
    results = results_named(model, named)
    operands = {**operands_by_name(model), **results}
    check_same(file, {**readers, **operands}, targets, rest, rename)
    layers = {n: with_quantizers(readers[n]) for n in named if n in readers}
    reads = {n: with_result(results[n]) if n in results else with_operand(operands[n]) for n in named if n in operands}
    # one for a module, which may have several weights; the codes as they are: nothing of what learned them is left
    quantizers = {id(layer.module): "uniform" for layer in layers.values()}
    quantizers |= {
        id(layers[n].module): s.quantizer for s, site in zip(file.sites, renamed) if not s.storage.plain
        for n in site.layers if n in layers
    }  # fmt: skip
    with torch.no_grad():
        for module in list(model.modules()):
            if isinstance(module, Quantizer):
                module.disable()
        for layer in layers.values():
            bake_parametrizations(layer.module)  # codes have taken the place of what they were computed from
            to_fake_quantized(layer.module, quantizers[id(layer.module)])
        of_operand = {n: s.quantizer for s, site in zip(file.sites, renamed) for n in site.layers if n in reads}
        drop_results(model)
        of_result = next((of_operand[n] for n in named if n in results), "uniform")
        put_results(model, results.values(), quantizer_named(of_result))
        for name, operand in reads.items():
            if name in results:
                continue
            put_attention(operand.module, quantizer_named(of_operand[name]))
        for stored, site in zip(file.sites, renamed):
            for name in site.layers:
                quantized = reads[name] if name in reads else layers[name]
                quantized.quantizer_of(site.kind).from_storage(site.bits, site.code, stored.storage)
                if stored.codes is not None:
                    layers[name].weight.copy_(_levels(layers[name], stored.codes))
        # after the weights: one that something else reads as well (a tied embedding) comes back exactly
        for keys, tensor in rest.items():
            targets[keys].copy_(tensor)
        for stored, site in zip(file.sites, renamed):
            if stored.codes is not None:
                for name in site.layers:
                    _untie(layers[name], stored.codes)
    put_biases(model, {rename(layer): norm and rename(norm) for layer, norm in file.biases.items()})
    return model


def _levels(layer: QuantizedWeight, codes: torch.Tensor) -> torch.Tensor:
    return layer.weight_quantizer.dequantize(codes.to(layer.weight_quantizer.num_bits.device))


def _untie(layer: QuantizedWeight, codes: torch.Tensor) -> None:
    """Where a tied float weight does not round to the codes (DoReFa squashes first), the layer gets its own."""
    levels = _levels(layer, codes).to(layer.weight.dtype)
    if not torch.equal(layer.weight_quantizer.eval_weight(layer.weight), levels):
        layer.set_weight(nn.Parameter(levels, requires_grad=layer.weight.requires_grad))


def _corrupt(path: str | Path, error: object) -> HawqError:
    return HawqError(f"The packed file {path} is corrupt: {error}.")
