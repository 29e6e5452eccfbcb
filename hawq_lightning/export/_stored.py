"""The sites of a quantized model as files hold them: codes of weights, and what each quantizer stores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan, PlanSite
from hawq_lightning._site_table import Site
from hawq_lightning.export._contents import StoredSite
from hawq_lightning.export._enabled import check_enabled, quantized_reads_by_name
from hawq_lightning.export._inventory import weight_of
from hawq_lightning.export._safetensors import DTYPES
from hawq_lightning.layers import WeightReader
from hawq_lightning.quantization import QuantizedOperand, QuantizedWeight, Storage


def stored_sites(model: nn.Module, plan: Plan) -> Iterator[StoredSite]:
    """The sites of a plan as files hold them: codes of weights, and what each quantizer stores.

    Args:
        model: with fake-quant layers, enabled; it stays as it is.
        plan: the plan that it carries.

    Raises:
        HawqError: the model is float, carries another plan, or a weight is not finite or not on its quantizer's grid.
    """
    layers = quantized_reads_by_name(model)
    check_enabled(layers, plan)
    weights = {n: x for n, x in layers.items() if isinstance(x, QuantizedWeight)}
    for site in plan.sites:
        weight_of(site, weights)
        name = site.layers[0]
        yield _stored_weight(site, weights[name]) if site.kind == "weight" else _stored_activation(site, layers[name])


def _stored_weight(site: PlanSite, layer: QuantizedWeight) -> StoredSite:
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
    return stored_site(site, quantizer.bits, quantizer.code, quantizer.storage(), quantizer.name, layer, codes)


def _stored_activation(site: PlanSite, layer: QuantizedWeight | QuantizedOperand) -> StoredSite:
    quantizer = layer.input_quantizer
    return stored_site(site, quantizer.bits, site.code, quantizer.storage(), layer.spec.name)


def stored_site(
    site: Site | PlanSite, bits: int, code: str, storage: Storage, quantizer: str,
    layer: WeightReader | None = None, codes: torch.Tensor | None = None,
) -> StoredSite:  # fmt: skip
    """A site with its storage.

    Args:
        site: of a table or a plan.
        bits: of its quantizer.
        code: code format.
        storage: of its quantizer.
        quantizer: registered name of the one that wrote the storage.
        layer: of a weight: the first that reads it.
        codes: of a weight.
    """
    planned = PlanSite(site.name, site.kind, tuple(site.layers), tuple(site.shape), site.numel, bits, code)
    quantizer = "uniform" if storage.plain else quantizer
    if layer is None:
        return StoredSite(planned, storage, quantizer)
    return StoredSite(planned, storage, quantizer, codes, layer.channel_axis, DTYPES[layer.weight.dtype])
