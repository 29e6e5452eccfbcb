"""The packed file of an armed network: bit-packed codes, scales, and everything else exactly as it is.

The codes are those that training saw, BatchNorm unfolded, so the reloaded network gives the same logits bit for bit.
``file_bytes`` of a plan is ``packed_overhead + sum(ceil(numel * bits / 8) + 4 * channels)``, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hawq_lightning.errors import HawqError
from hawq_lightning.export import container
from hawq_lightning.export.bits import pack, packed_bytes, unpack
from hawq_lightning.export.index import TORCH_TYPES, Index
from hawq_lightning.export.inventory import check_same, index_of, owning, plain, renaming, rest_of
from hawq_lightning.plan import ACTIVATION_BITS, WEIGHT_BITS, Plan, PlanSite
from hawq_lightning.quantization.quantizers import MIDRISE_ZERO, Quantizer
from hawq_lightning.quantization.twins import QuantizedLayer, make_twin
from hawq_lightning.site_table import Site
from hawq_lightning.sites import QUANTIZABLE, layer_type

KINDS = ("affine", "midrise")  # stored as 0 and 1


@dataclass(frozen=True)
class PackedFile:
    """What a packed file holds, read and checked.

    Attributes:
        plan: sites with bits, code kinds and activation grids; no traces and no costs.
        codes: weight site -> int32 codes in the weight's shape.
        scales: weight site -> float32 step a channel.
        rest: first state-dict key -> tensor, stored exactly.
        index: names, shapes, types.
    """

    plan: Plan
    codes: Mapping[str, torch.Tensor]
    scales: Mapping[str, torch.Tensor]
    rest: Mapping[str, torch.Tensor]
    index: Index


def packed_overhead(model: nn.Module, sites: Iterable[Site | PlanSite]) -> int:
    """Bytes of the packed file that no choice of bits changes: header and rest, without codes and scales of weights.

    Args:
        model: float or with twins.
        sites: the sites that the plan will have: a ``SiteTable``, ``plan.sites``, or any part of them.

    Raises:
        HawqError: the model holds something that the file cannot.
    """
    index = index_of(model, tuple(sites))
    most = sum(w.numel for w in index.weights)
    blobs = index.blobs(most)
    data = sum(count * TORCH_TYPES[dtype].itemsize for _, dtype, count in blobs)
    return container.header_bound(index, most) + data - most - 4 * sum(w.channels for w in index.weights)


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
    codes, scales, bits, kinds = [], [], [], []
    for site in index.weights:
        layer = layers[site.layers[0]]
        quantizer = layer.weight_quantizer
        if not torch.isfinite(layer.weight).all():
            raise HawqError(f"The weight of {site.layers[0]!r} holds NaN or Inf; it cannot be packed.")
        codes.append(torch.from_numpy(pack(quantizer.codes(layer.weight), quantizer.bits)))
        scales.append(quantizer.scale.detach().float().cpu().reshape(-1))
        bits.append(quantizer.bits)
        kinds.append(KINDS.index(quantizer.code))
    blobs = {
        "codes": torch.cat(codes),
        "scales": torch.cat(scales),
        "bits": torch.tensor(bits, dtype=torch.uint8),
        "kinds": torch.tensor(kinds, dtype=torch.uint8),
    }
    if index.activations:
        reads = [layers[s.layers[0]].input_quantizer for s in index.activations]
        blobs |= {
            "act_bits": torch.tensor([q.bits for q in reads], dtype=torch.uint8),
            "act_scales": torch.tensor([float(q.scale) for q in reads]),
            "act_zeros": torch.tensor([float(q.zero_point) for q in reads]),
        }
    groups = {keys: tensor.detach().cpu().contiguous() for keys, tensor in rest_of(model, owning(model, index.weights))}
    for dtype in {t.dtype for t in index.rest}:
        parts = [groups[t.keys].reshape(-1) for t in index.rest if t.dtype == dtype]
        blobs[f"rest_{dtype}"] = torch.cat(parts)
    return container.write(path, index, blobs, sum(w.numel for w in index.weights))


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
    data, at, channel = blobs["codes"].numpy(), 0, 0
    codes, scales, sites = {}, {}, []
    for site, b, kind in zip(index.weights, bits, kinds):
        size = packed_bytes(site.numel, b)
        codes[site.name] = unpack(data[at : at + size], b, site.numel).reshape(site.shape)
        scales[site.name] = blobs["scales"][channel : channel + site.channels].clone()
        at, channel = at + size, channel + site.channels
        sites.append(PlanSite(site.name, "weight", site.layers, site.shape, site.numel, b, KINDS[kind]))
    for i, read in enumerate(index.activations):
        b, scale, zero = (blobs[f"act_{name}"][i].item() for name in ("bits", "scales", "zeros"))
        if b not in ACTIVATION_BITS or not 0 < scale < float("inf") or zero not in range(1 << int(b)):
            raise bad(f"{read.name!r} has {b} bits, scale {scale}, zero point {zero}")
        sites.append(
            PlanSite(read.name, "activation", read.layers, read.shape, read.extra, int(b), "affine", scale, int(zero))
        )
    rest, used = {}, dict.fromkeys({t.dtype for t in index.rest}, 0)
    for tensor in index.rest:
        begin = used[tensor.dtype]
        used[tensor.dtype] = begin + tensor.numel
        rest[tensor.keys[0]] = blobs[f"rest_{tensor.dtype}"][begin : begin + tensor.numel].reshape(tensor.shape)
    return PackedFile(Plan(tuple(sites), selector="packed file"), codes, scales, rest, index)


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
    rename = renaming(file.index.weights[0].layers[0], [n for n, m in modules.items() if layer_type(m) in QUANTIZABLE])
    owned = {id(modules[rename(n)]) for w in file.index.weights for n in w.layers if rename(n) in modules}
    targets = {rename.inside(keys): tensor for keys, tensor in rest_of(model, owned) if rename.inside(keys)}
    stored = {rename.keys(t.keys): t for t in file.index.rest if rename.keys(t.keys)}
    check_same(file.index, modules, targets, stored, rename)
    with torch.no_grad():
        for module in list(model.modules()):
            if isinstance(module, Quantizer):
                module.disarm()
        for site in file.plan.sites:
            for name in site.layers:
                layer = make_twin(modules[rename(name)], "uniform")  # the codes as they are, nothing learned
                if site.kind == "activation":
                    layer.input_quantizer.arm(site.bits, site.scale or 1.0, site.zero_point or 0)
                    continue
                zero = MIDRISE_ZERO if site.code == "midrise" else 0.0
                layer.weight_quantizer.arm(site.bits, file.scales[site.name], zero)
                device = layer.weight_quantizer.scale.device
                layer.weight.copy_(layer.weight_quantizer.dequantize(file.codes[site.name].to(device)))
        # after the weights: one that something else reads as well (a tied embedding) comes back exactly
        for keys, tensor in stored.items():
            targets[keys].copy_(file.rest[tensor.keys[0]])
    return model


def _layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    found = model.named_modules(remove_duplicate=False)
    return {plain(n): m for n, m in found if isinstance(m, QuantizedLayer)}


def check_armed(layers: Mapping[str, QuantizedLayer], plan: Plan) -> None:
    """Raise HawqError, naming the site, unless these twins carry exactly ``plan``."""
    planned: set[int] = set()
    for site in plan.settled().sites:
        for name in site.layers:
            if name not in layers:
                raise HawqError(f"The model is not quantized at {name!r}: call quantize(model, plan) first.")
            quantizer = layers[name].weight_quantizer if site.kind == "weight" else layers[name].input_quantizer
            planned.add(id(quantizer))
            if quantizer.bits == 0:
                raise HawqError(f"The quantizer of {site.name!r} was never armed: call quantize(model, plan) first.")
            code = layers[name].weight_quantizer.code if site.kind == "weight" else site.code
            if quantizer.bits != site.bits or code != site.code:
                raise HawqError(
                    f"The model carries another plan: {site.name!r} has {quantizer.bits} bits ({code}), "
                    f"the plan says {site.bits} ({site.code})."
                )
            if site.kind == "activation" and site.code not in KINDS:
                raise HawqError(f"Site {site.name!r}: code kind {site.code!r} cannot be packed.")
    for name, layer in layers.items():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer.bits and id(quantizer) not in planned:
                raise HawqError(
                    f"The model carries another plan: {name!r} has an armed quantizer that the plan has not."
                )
