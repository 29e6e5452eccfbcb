"""A forward pass of one batch, ready for probes: site gradients, boundary, output Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._site_table import SiteTable
from hawq_lightning.layers import WeightReader, as_reader
from hawq_lightning.sensitivity._boundary import OutputHessian, Outputs, find_boundary
from hawq_lightning.sensitivity._grad_capture import GradCapture
from hawq_lightning.sensitivity._input_hooks import InputHooks

LossFn = Callable[[nn.Module, Any], torch.Tensor]


@dataclass
class MeasureContext:
    """What stays the same over all batches of a measurement."""

    model: nn.Module
    layers: Mapping[str, WeightReader]
    table: SiteTable
    loss_fn: LossFn
    keep_copies: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    l1: str = "zero"
    precision: str = "float32"

    def loss(self, batch: Any) -> torch.Tensor:
        """The loss of a batch in the precision asked for, checked."""
        if self.precision == "float32":
            return check_loss(self.loss_fn(self.model, batch))
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            return check_loss(self.loss_fn(self.model, batch))

    def note(self, sentence: str) -> None:
        """Remember a sentence for the user, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def note_again(self, start: str, rest: str) -> None:
        """Remember a sentence in place of the one that began like it."""
        self.notes[:] = [n for n in self.notes if not n.startswith(start)]
        self.note(start + rest)


@dataclass
class ForwardPass:
    """One batch after its forward pass."""

    loss: torch.Tensor | None
    network: GradCapture
    hessian: OutputHessian

    def let_go_of_loss(self) -> None:
        """Free what lies between the outputs and the loss, once its Hessian is known."""
        self.loss = None
        self.hessian.free_graph()


@contextmanager
def forward_pass(setting: MeasureContext, batch: Any, per_image: Mapping[str, bool]) -> Iterator[ForwardPass]:
    """Run the loss on ``batch`` with hooks in place; inside, probes may go back through the graph.

    Raises:
        HawqError: the loss is no finite scalar, or does not depend on the layers.
    """
    cut: frozenset[int] = frozenset()
    for _ in range(2):
        network = GradCapture(setting.layers, setting.table, setting.keep_copies)
        network.per_image = per_image
        with network, Outputs(setting.model, cut) as outputs, torch.enable_grad():
            loss = setting.loss(batch)
            boundary, nested = find_boundary(loss, outputs)
            if not boundary:
                raise HawqError("The loss does not depend on the output of any layer; check loss_fn or training_step.")
            if nested and not cut:
                cut = frozenset(boundary)
                setting.note("The loss also reads an inner feature; its paths were separated.")
                continue
            step = ForwardPass(loss, network, OutputHessian(loss, outputs, boundary))
            del loss  # may be let go of
            yield step
            return


@contextmanager
def outputs_of(setting: MeasureContext, batch: Any) -> Iterator[OutputHessian]:
    """The loss's Hessian at the outputs of ``batch``, for nothing to be sent back through the network.

    Raises:
        HawqError: the loss is no finite scalar, or does not depend on the layers.
    """
    readers = {n: n for n, layer in setting.layers.items() if as_reader(layer).read.reads_activation}
    with InputHooks(setting.layers, readers, _in_graph), Outputs(setting.model) as outputs:
        with torch.enable_grad():
            loss = setting.loss(batch)
            boundary, nested = find_boundary(loss, outputs)
        if nested or not boundary:
            with forward_pass(setting, batch, {s.name: False for s in setting.table}) as step:
                yield step.hessian
            return
        with torch.enable_grad():
            yield OutputHessian(loss, outputs, boundary)


def _in_graph(site: str, x: torch.Tensor) -> torch.Tensor:
    return x if x.requires_grad else x.detach().requires_grad_(True)


def check_loss(loss: Any) -> torch.Tensor:
    """Return the loss if it is a finite scalar with a graph.

    Raises:
        HawqError: otherwise, in one sentence.
    """
    if not isinstance(loss, torch.Tensor):
        raise HawqError(f"The loss is {type(loss).__name__}, not a tensor; give loss_fn(module, batch) -> scalar.")
    if loss.numel() != 1:
        raise HawqError(f"The loss has shape {list(loss.shape)}, not a scalar; reduce it in loss_fn.")
    if not bool(torch.isfinite(loss.detach()).all()):
        raise HawqError(f"The loss is {loss.item()}; traces need a finite loss.")
    if loss.grad_fn is None:
        raise HawqError("The loss does not depend on the model's parameters, so it has no curvature in them.")
    return loss.reshape(())


def check_weights(layers: Mapping[str, WeightReader]) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        HawqError: it names the layer.
    """
    for name, layer in layers.items():
        for key, parameter in layer.module.named_parameters(recurse=False):
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise HawqError(f"Layer {name!r}: its {key} holds NaN or infinity.")
