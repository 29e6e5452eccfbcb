"""Where the graph of a pass begins while no parameter wants gradients: at what layers read, or at what they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from hawq_lightning.layers import WeightReader, as_reader
from hawq_lightning.sensitivity._input_hooks import InputHooks


@contextmanager
def graph_started(layers: Mapping[str, WeightReader]) -> Iterator[None]:
    """Inside, whatever follows from a layer has a graph.

    Args:
        layers: name -> reader. Those that read no activation (tables, weights that a forward computes with) start the
            graph at their product: a network may have no others.
    """
    reads = {n: n for n, layer in layers.items() if as_reader(layer).read.reads_activation}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            if name not in reads:
                hooks.callback(as_reader(layer).on_call(_product).remove)
        hooks.enter_context(InputHooks(layers, reads, _read))
        yield


def start_of_graph(x: torch.Tensor) -> torch.Tensor:
    """A copy of a constant in a graph of its own; a view of a leaf could not be changed in place."""
    return x.detach().requires_grad_(True).clone()


def _read(site: str, x: torch.Tensor) -> torch.Tensor:
    return x if x.requires_grad else x.detach().requires_grad_(True)


def _product(read: torch.Tensor, product: torch.Tensor) -> torch.Tensor | None:
    return start_of_graph(product) if torch.is_grad_enabled() and not product.requires_grad else None
