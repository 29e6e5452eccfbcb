"""The packed file of an armed network: bit-packed codes, scales, and everything else exactly as it is.

The codes are those that training saw, BatchNorm unfolded, so the reloaded network gives the same logits bit for bit.
``file_bytes`` of a plan is ``packed_overhead + sum(ceil(numel * bits / 8) + 4 * channels)``, to the byte; a codebook
takes ``4 * channels * bits`` more. Activations on a learned basis take 16 bytes a site, whatever their bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import ACTIVATION_BITS, WEIGHT_BITS, Plan, PlanSite
from hawq_lightning._site_table import Site
from hawq_lightning.export import _container as container
from hawq_lightning.export._bits import pack, packed_bytes, unpack
from hawq_lightning.export._extras import most_extras, read_bases, read_extras
from hawq_lightning.export._index import TORCH_TYPES, Index
from hawq_lightning.export._inventory import check_same, index_of, owning, plain, renaming, rest_of
from hawq_lightning.layers import FakeQuantLayer, find_kind
from hawq_lightning.quantization import (
    MIDRISE_ZERO,
    QuantizedLayer,
    Quantizer,
    QuantizerSpec,
    quantizer_named,
    to_fake_quantized,
)
from hawq_lightning.quantization.methods import MOST_BITS, ActivationLQ, WeightLQ

KINDS = ("affine", "midrise", "codebook")  # stored as 0, 1 and 2


@dataclass(frozen=True)
class PackedFile:
    """What a packed file holds, read and checked.

    Attributes:
        plan: sites with bits, code kinds and activation grids; no traces and no costs.
        codes: weight site -> int32 codes in the weight's shape.
        scales: weight site -> float32 step a channel.
        zeros: weight site -> the code of 0, where that is not 0.
        bases: weight site -> ``[channels, bits]``, of codebooks; activation site -> ``[bits]``, where it is learned.
        rest: first state-dict key -> tensor, stored exactly.
        index: names, shapes, types.
    """

    plan: Plan
    codes: Mapping[str, torch.Tensor]
    scales: Mapping[str, torch.Tensor]
    rest: Mapping[str, torch.Tensor]
    index: Index
    zeros: Mapping[str, float] = field(default_factory=dict)
    bases: Mapping[str, torch.Tensor] = field(default_factory=dict)


def packed_overhead(
    model: nn.Module, sites: Iterable[Site | PlanSite], quantizer: str | QuantizerSpec = "uniform"
) -> int:
    """Bytes of the packed file that no choice of bits changes: header and rest, without codes and scales of weights.

    Args:
        model: float or with twins.
        sites: the sites that the plan will have: a ``SiteTable``, ``plan.sites``, or any part of them.
        quantizer: that the plan will have.

    Raises:
        HawqError: the model holds something that the file cannot.
    """
    index = index_of(model, tuple(sites))
    most = sum(w.numel for w in index.weights)
    spec = quantizer_named(quantizer)
    weights, learned = spec.weight_quantizer(1), isinstance(spec.activation_quantizer(), ActivationLQ)
    extras = most_extras(index, "codebook" in weights.code_formats(8), weights.zero_points, learned)
    fixed = (b for b in index.blobs(0, extras) if b[0] not in ("codes", "scales", "basis"))
    return container.header_bound(index, most, extras) + sum(n * TORCH_TYPES[dtype].itemsize for _, dtype, n in fixed)


def save_packed(model: nn.Module, plan: Plan, path: str | Path) -> int:
    """Write the packed file of a model that ``plan`` is armed on.

    Args:
        model: with twins, armed; it stays as it is.
        plan: the plan that it carries.
        path: of the file, usually ``model.safetensors``; replaced atomically.

    Returns:
        The file's size in bytes.

    Raises:
        HawqError: the model is float, carries another plan, holds something that cannot be stored, or the path cannot
            be written.
    """
    index = index_of(model, plan.sites)
    layers = _layers(model)
    check_armed(layers, plan)
    codes, scales, bits, kinds, zeros, bases = [], [], [], [], [], []
    offset = False
    for site in index.weights:
        layer = layers[site.layers[0]]
        quantizer = layer.weight_quantizer
        if not torch.isfinite(layer.weight).all():
            raise HawqError(f"The weight of {site.layers[0]!r} holds NaN or Inf; it cannot be packed.")
        numbers = quantizer.codes(layer.weight)
        pack_low_bit_weights = torch.float32 if layer.weight.dtype == torch.float64 else layer.weight.dtype
        levels = quantizer.dequantize(numbers).to(pack_low_bit_weights)
        if not torch.equal(levels, quantizer.eval_weight(layer.weight).to(pack_low_bit_weights)):
            raise HawqError(
                f"The weight of {site.layers[0]!r} is not on the grid of its quantizer {quantizer.name!r}; packed, the "
                "network would be another one."
            )
        codes.append(torch.from_numpy(pack(numbers, quantizer.bits)))
        if quantizer.code == "codebook":
            bases.append(quantizer.basis[:, : quantizer.bits].detach().cpu().reshape(-1))  # type: ignore[index]
        zero = round(float(quantizer.zero_point)) if quantizer.code == "affine" else 0
        zeros.append(float(zero))
        offset = offset or quantizer.zero_points or bool(zero)
        scales.append(quantizer.scale.detach().float().cpu().reshape(-1))
        bits.append(quantizer.bits)
        kinds.append(KINDS.index(quantizer.code))
    blobs = {
        "codes": torch.cat(codes),
        "scales": torch.cat(scales),
        "bits": torch.tensor(bits, dtype=torch.uint8),
        "kinds": torch.tensor(kinds, dtype=torch.uint8),
    }
    blobs |= {"basis": torch.cat(bases)} if bases else {}
    blobs |= {"zeros": torch.tensor(zeros)} if offset else {}
    learned = False
    if index.activations:
        reads = [layers[s.layers[0]].input_quantizer for s in index.activations]
        blobs |= {
            "act_bits": torch.tensor([q.bits for q in reads], dtype=torch.uint8),
            "act_scales": torch.tensor([float(q.scale) for q in reads]),
            "act_zeros": torch.tensor([float(q.zero_point) for q in reads]),
        }
        if learned := any(isinstance(q, ActivationLQ) for q in reads):
            rows = [q.basis.detach().cpu() if isinstance(q, ActivationLQ) else torch.zeros(MOST_BITS) for q in reads]
            blobs |= {"act_basis": torch.cat(rows)}
    groups = {keys: tensor.detach().cpu().contiguous() for keys, tensor in rest_of(model, owning(model, index.weights))}
    for dtype in {t.dtype for t in index.rest}:
        parts = [groups[t.keys].reshape(-1) for t in index.rest if t.dtype == dtype]
        blobs[f"rest_{dtype}"] = torch.cat(parts)
    most = most_extras(index, bool(bases), offset, learned)
    return container.write(path, index, blobs, sum(w.numel for w in index.weights), most)


def read_packed(path: str | Path) -> PackedFile:
    """Read and check a packed file without a model.

    Raises:
        HawqError: no such file, not a packed file, an unknown version, corrupt or cut short.
    """
    index, blobs = container.read(path)

    def bad(what: str) -> HawqError:
        return HawqError(f"The packed file {path} is corrupt: {what}.")

    bits, kinds = blobs["bits"].tolist(), blobs["kinds"].tolist()
    for site, b, kind in zip(index.weights, bits, kinds):
        if b not in WEIGHT_BITS or kind >= len(KINDS):
            raise bad(f"{site.name!r} has {b} bits of kind {kind}")
    wanted = sum(packed_bytes(w.numel, b) for w, b in zip(index.weights, bits))
    if wanted != blobs["codes"].numel():
        raise bad(f"{blobs['codes'].numel()} bytes of codes where its bits need {wanted}")
    if not bool((torch.isfinite(blobs["scales"]) & (blobs["scales"] > 0)).all()):
        raise bad("a scale is not positive and finite")
    zeros, bases = read_extras(index, blobs, bits, [KINDS[k] for k in kinds], bad)
    data, at, channel = blobs["codes"].numpy(), 0, 0
    codes, scales, sites = {}, {}, []
    for site, b, kind in zip(index.weights, bits, kinds):
        size = packed_bytes(site.numel, b)
        codes[site.name] = unpack(data[at : at + size], b, site.numel).reshape(site.shape)
        scales[site.name] = blobs["scales"][channel : channel + site.channels].clone()
        at, channel = at + size, channel + site.channels
        sites.append(PlanSite(site.name, "weight", site.layers, site.shape, site.numel, b, KINDS[kind]))
    for i, (read, basis) in enumerate(zip(index.activations, read_bases(index, blobs, bad))):
        b, scale, zero = (blobs[f"act_{name}"][i].item() for name in ("bits", "scales", "zeros"))
        if b not in ACTIVATION_BITS or not 0 < scale < float("inf") or zero not in range(1 << int(b)):
            raise bad(f"{read.name!r} has {b} bits, scale {scale}, zero point {zero}")
        bases |= {read.name: basis[: int(b)]} if bool(basis.any()) else {}
        sites.append(
            PlanSite(read.name, "activation", read.layers, read.shape, read.extra, int(b), "affine", scale, int(zero))
        )
    rest, used = {}, dict.fromkeys({t.dtype for t in index.rest}, 0)
    for tensor in index.rest:
        begin = used[tensor.dtype]
        used[tensor.dtype] = begin + tensor.numel
        rest[tensor.keys[0]] = blobs[f"rest_{tensor.dtype}"][begin : begin + tensor.numel].reshape(tensor.shape)
    plan = Plan(tuple(sites), selector="packed file", quantizer="lq_nets" if bases else "uniform")
    return PackedFile(plan, codes, scales, rest, index, zeros, bases)


def load_packed(path: str | Path, model: nn.Module) -> nn.Module:
    """Quantize a freshly built model from a packed file; it then gives the saved model's logits, bit for bit.

    Args:
        path: written by :func:`save_packed`.
        model: of the same architecture, float or with twins, on any device; changed in place. Training or evaluation
            mode stays. A wrapper around the saved model, or the part that it wrapped, will do too.

    Returns:
        ``model``, armed.

    Raises:
        HawqError: the file is no packed file, damaged, or made for another model (names the sites that differ); the
            model is then as it was.
    """
    file = read_packed(path)
    modules = {plain(n): m for n, m in model.named_modules(remove_duplicate=False)}
    rename = renaming(file.index.weights[0].layers[0], [n for n, m in modules.items() if find_kind(m) is not None])
    owned = {id(modules[rename(n)]) for w in file.index.weights for n in w.layers if rename(n) in modules}
    targets = {rename.inside(keys): tensor for keys, tensor in rest_of(model, owned) if rename.inside(keys)}
    stored = {rename.keys(t.keys): t for t in file.index.rest if rename.keys(t.keys)}
    check_same(file.index, modules, targets, stored, rename)
    with torch.no_grad():
        for module in list(model.modules()):
            if isinstance(module, Quantizer):
                module.disable()
        books = {rename(n) for s in file.plan.sites if s.name in file.bases for n in s.layers}
        for site in file.plan.sites:
            for name in site.layers:
                # the codes as they are: nothing of what learned them is left
                book = rename(name) in books
                layer = to_fake_quantized(modules[rename(name)], "lq_nets" if book else "uniform")
                if site.kind == "activation":
                    layer.input_quantizer.enable(site.bits, site.scale or 1.0, site.zero_point or 0)
                    if isinstance(layer.input_quantizer, ActivationLQ):
                        layer.input_quantizer.arm_basis(file.bases.get(site.name, torch.zeros(1)))
                    continue
                zero = MIDRISE_ZERO if site.code == "midrise" else file.zeros.get(site.name, 0.0)
                if isinstance(layer.weight_quantizer, WeightLQ):
                    layer.weight_quantizer.arm_basis(site.bits, file.bases[site.name])
                else:
                    layer.weight_quantizer.enable(site.bits, file.scales[site.name], zero)
                device = layer.weight_quantizer.scale.device
                layer.weight.copy_(layer.weight_quantizer.dequantize(file.codes[site.name].to(device)))
        # after the weights: one that something else reads as well (a tied embedding) comes back exactly
        for keys, tensor in stored.items():
            targets[keys].copy_(file.rest[tensor.keys[0]])
        for site in file.plan.weights:
            _untie(site, file, [modules[rename(name)] for name in site.layers])
    return model


def _untie(site: PlanSite, file: PackedFile, layers: Iterable[nn.Module]) -> None:
    """Where a tied float weight does not round to the codes (DoReFa squashes first), the layers get their own."""
    for layer in layers:
        assert isinstance(layer, FakeQuantLayer)
        quantizer = layer.weight_quantizer
        levels = quantizer.dequantize(file.codes[site.name].to(quantizer.width.device)).to(layer.weight.dtype)
        if not torch.equal(quantizer.eval_weight(layer.weight), levels):
            layer.weight = nn.Parameter(levels, requires_grad=layer.weight.requires_grad)


def _layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    found = model.named_modules(remove_duplicate=False)
    return {plain(n): m for n, m in found if isinstance(m, FakeQuantLayer)}


def check_armed(layers: Mapping[str, QuantizedLayer], plan: Plan) -> None:
    """Raise HawqError, naming the site, unless these twins carry exactly ``plan``."""
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
                raise HawqError(f"The quantizer of {site.name!r} was never armed: call quantize(model, plan) first.")
            code = layers[name].weight_quantizer.code if site.kind == "weight" else site.code
            if quantizer.bits != site.bits or code != site.code:
                raise HawqError(
                    f"The model carries another plan: {site.name!r} has {quantizer.bits} bits ({code}), "
                    f"the plan says {site.bits} ({site.code})."
                )
            if site.kind == "activation" and site.code != "affine":
                raise HawqError(f"Site {site.name!r}: code kind {site.code!r} cannot be packed.")
    for name, layer in layers.items():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer.bits and id(quantizer) not in planned:
                raise HawqError(
                    f"The model carries another plan: {name!r} has an armed quantizer that the plan has not."
                )
