"""How long a packed file is, before any value of it is known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from hawq_lightning._code_formats import CODE_FORMATS
from hawq_lightning._plan import ACTIVATION_BITS, WEIGHT_BITS, PlanSite
from hawq_lightning._site_table import Site
from hawq_lightning._types import JsonObject
from hawq_lightning.export import _safetensors
from hawq_lightning.export._bits import packed_bytes
from hawq_lightning.export._contents import CODES, StoredSite, metadata_of, ordered, site_entry
from hawq_lightning.export._inventory import readers_by_name, rest_to_store, weight_of
from hawq_lightning.export._safetensors import Spec, spec_of
from hawq_lightning.export._stored import stored_site
from hawq_lightning.layers import WeightReader
from hawq_lightning.quantization import MIDRISE_ZERO, QuantizerSpec, Storage, quantizer_named

_LONGEST = 1.2345678901234567e-05  # no positive float32 takes more digits


def packed_overhead(
    model: nn.Module,
    sites: Iterable[Site | PlanSite],
    quantizer: str | QuantizerSpec = "uniform",
    biases: Mapping[str, str] | None = None,
) -> int:
    """Bytes of the packed file that no choice of bits changes: all but the codes of weights and their scales or bases.

    Args:
        model: float or with fake-quant layers.
        sites: the sites that the plan will have: a ``SiteTable``, ``plan.sites``, or any part of them.
        quantizer: that the plan will have.
        biases: of the table or the plan: layers whose biases are INT32.

    Raises:
        HawqError: the model holds something that the file cannot.
    """
    sites, spec = tuple(sites), quantizer_named(quantizer)
    readers = readers_by_name(model)
    specs, metadata = largest(model, sites, spec, biases or {})
    size = _safetensors.header_bytes(specs, metadata) + sum(s.nbytes for s in specs.values())
    for site in sites:
        if (layer := weight_of(site, readers)) is not None:
            widest = list(_forms(spec, site, layer))[-1].site
            form = CODE_FORMATS[widest.code]
            size -= packed_bytes(site.numel, widest.bits) + form.kept_bytes(site.numel)
            size -= form.storage_bytes(site.shape[layer.channel_axis], widest.bits)
    return size


def largest(
    model: nn.Module, sites: tuple[Site | PlanSite, ...], quantizer: QuantizerSpec, biases: Mapping[str, str]
) -> tuple[dict[str, Spec], dict[str, str]]:
    """Tensors and metadata that take at least the bytes of those of any plan over these sites."""
    readers = readers_by_name(model)
    entries: dict[str, JsonObject] = {}
    tensors: dict[str, Spec] = {}
    for site in sites:
        layer = weight_of(site, readers)
        forms = list(_forms(quantizer, site, layer))
        entries[site.name] = max((site_entry(form) for form in forms), key=lambda entry: len(json.dumps(entry)))
        for form in forms:
            for name, tensor in form.storage.tensors.items():
                key, new = f"{site.name}.{name}", spec_of(tensor)
                tensors[key] = max(new, tensors.get(key, new), key=lambda s: s.nbytes)
        if layer is not None:
            tensors[f"{site.name}.{CODES}"] = Spec("U8", (packed_bytes(site.numel, forms[-1].site.bits),))
    rest = {keys: spec_of(t) for keys, t in rest_to_store(model, sites, tensors_alone=True).items()}
    return ordered(tensors, rest), metadata_of(entries, rest, biases)


def _forms(spec: QuantizerSpec, site: Site | PlanSite, layer: WeightReader | None) -> Iterator[StoredSite]:
    """How a site may be stored: at every width in every code format; numbers as long as they can be."""
    if layer is None:
        reads = spec.activation_quantizer()
        for bits in ACTIVATION_BITS:
            reads.enable(bits, 1.0, (1 << bits) - 1)
            yield stored_site(site, bits, reads.code, _longest(reads.storage()), spec.name)
        return
    axis = layer.channel_axis
    quantizer = spec.weight_quantizer(int(site.shape[axis]), axis)
    quantizer.shaped(tuple(site.shape))
    for bits in WEIGHT_BITS:
        for code in quantizer.code_formats(bits):
            quantizer.enable(bits, 1.0, MIDRISE_ZERO if code == "midrise" else 0.0)
            yield stored_site(site, bits, code, _longest(quantizer.storage()), spec.name, layer)


def _longest(storage: Storage) -> Storage:
    facts = {k: _LONGEST if isinstance(v, float) else v for k, v in storage.facts.items()}
    return Storage(storage.tensors, facts, storage.plain)
