"""Which activation sites read what the network itself is given."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from hawq_lightning._attention_calls import operands_of
from hawq_lightning._depth import LayerDepths
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import quantizable_layers
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.layers import OperandReader, WeightReader
from hawq_lightning.sensitivity import InputHooks


def network_inputs(model: nn.Module, batch: Batch, loss_fn: LossFn, sites: SiteTable) -> frozenset[str]:
    """Activation sites that read what no parameter has touched.

    Args:
        model: its parameters must not need gradients; afterwards they do not.
        batch: a batch of the user's, as a dataloader gives it.
        loss_fn: runs the model on it.
        sites: of the model.
    """
    layers, _ = quantizable_layers(model)
    readers: dict[str, nn.Module | WeightReader | OperandReader] = {
        **{x.name: layers[x.name] for x in sites.layers},
        **operands_of(model, sites),
    }
    site_of = sites.reads
    inputs: set[str] = set()

    depths = LayerDepths()

    def visit(site: str, x: torch.Tensor) -> torch.Tensor:
        if not x.requires_grad and not depths.depth(x):  # nor behind a layer that ran without gradients
            inputs.add(site)
        return x

    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for p in parameters:
        p.requires_grad_(True)
    handles = [reader.on_call(partial(depths.passed, name)) for name, reader in layers.items()]
    try:
        with InputHooks(readers, site_of, visit), torch.enable_grad(), depths:
            loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for p in parameters:
            p.requires_grad_(False)
    return frozenset(inputs)
