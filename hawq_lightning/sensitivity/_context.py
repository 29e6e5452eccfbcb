"""A forward pass of one batch, ready for probes: site gradients, boundary, output Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from hawq_lightning._attention_calls import operands_of
from hawq_lightning._errors import HawqError
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import quantizable_layers
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.layers import OperandReader, WeightReader
from hawq_lightning.sensitivity._boundary import OutputHessian, Outputs, ReplacedOutputs, find_boundary
from hawq_lightning.sensitivity._grad_capture import GradCapture, not_recording
from hawq_lightning.sensitivity._graph_start import graph_started
from hawq_lightning.sensitivity._isolate import RandomStates, random_states_kept
from hawq_lightning.sensitivity._loss_differences import DifferenceHessian, check_second_derivative
from hawq_lightning.sensitivity._loss_parts import LossParts, has_curvature
from hawq_lightning.sensitivity._memory import out_of_memory
from hawq_lightning.sensitivity._rounding import RoundingErrors
from hawq_lightning.sensitivity._second_derivative import NoSecondDerivative, nodes_between, twice_differentiable


@dataclass
class Diagnostics:
    """What is noticed while measuring; the one thing about a measurement that changes.

    Attributes:
        notes: what the user should know, in sentences, each once.
        figures: what goes into the result's settings, such as the ``loss`` and the number of ``classes``.
        overwritten: layers whose input is changed in place after they read it, so that they must keep a copy.
        loss_parts: modules that return a part of the loss, not an output of the network.
        operations: between the outputs and the loss, that a second derivative was taken through.
        plain: attention and hard sigmoids take operations that can be differentiated twice.
        differentiates: the loss takes derivatives of the network.
        past_layers: what reads weights outside of their layers, in sentences that lack what follows from it.
        once_only: what has no second derivative, so that the loss's is taken by differences; empty: all has one.
    """

    notes: list[str] = field(default_factory=list)
    figures: dict[str, float | str] = field(default_factory=dict)
    overwritten: set[str] = field(default_factory=set)
    loss_parts: LossParts = field(default_factory=LossParts)
    operations: set[str] = field(default_factory=set)
    plain: bool = False
    differentiates: bool = False
    past_layers: list[str] = field(default_factory=list)
    once_only: str = ""

    def do_without(self, reason: NoSecondDerivative) -> None:
        """From now on plain operations where there are any, else differences of gradients.

        Raises:
            NoSecondDerivative: ``reason``, if there is nothing left to try.
        """
        if self.once_only:
            raise reason
        if reason.has_plain_form and not self.plain:
            self.plain = True
            return
        self.once_only, self.figures["loss_hessian"] = reason.operation, "finite differences"
        self.warn_once(
            f"The loss has no second derivative in PyTorch, since it goes through {reason.operation}: its Hessian at "
            "the network's outputs is taken by central differences of gradients (four evaluations a product)."
        )

    def warn_once(self, sentence: str) -> None:
        """Add a sentence, unless it is there."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def tell_past_layers(self, counted: bool) -> None:
        """Note what reads weights outside of their layers.

        Args:
            counted: whether the estimator that measures sees the curvature from there.
        """
        for sentence in self.past_layers:
            tail = "is counted as well." if counted else "is not counted (estimator='hutchinson' alone counts it)."
            self.warn_once(f"{sentence} the curvature from there {tail}")

    def replace_warning(self, start: str, rest: str) -> None:
        """Add the sentence ``start + rest`` in the place of the one that began like it."""
        self.notes[:] = [n for n in self.notes if not n.startswith(start)]
        self.warn_once(start + rest)


@dataclass(frozen=True)
class MeasureContext:
    """What stays the same over all batches of a measurement.

    Attributes:
        model: in the state that it is measured in.
        layers: layer name -> module, for every layer of ``table``.
        table: the sites.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        l1_curvature: what losses count as that have slope and no curvature: ``zero`` or ``fisher``.
        precision: of forward and backward passes: ``float32`` or ``bf16``.
        diagnostics: what is noticed meanwhile.
        operands: of attention, those that are sites of ``table``.
        rounding: errors along which gradients are measured as well; ``None``: none.
    """

    model: nn.Module
    layers: Mapping[str, WeightReader]
    table: SiteTable
    loss_fn: LossFn
    l1_curvature: str = "zero"
    precision: str = "float32"
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    operands: Mapping[str, OperandReader] = field(default_factory=dict)
    rounding: RoundingErrors | None = None

    @classmethod
    def of(cls, model: nn.Module, table: SiteTable, loss_fn: LossFn, l1_curvature: str = "zero") -> MeasureContext:
        """For all sites of a table; the model's readers are looked up by their names."""
        layers, operands = quantizable_layers(model)[0], operands_of(model, table)
        on_table = {x.name: layers[x.name] for x in table.layers}
        return cls(model, on_table, table, loss_fn, l1_curvature, operands=operands)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The checked loss of a batch, in the precision of the measurement.

        Raises:
            HawqError: it is no finite scalar, or has no graph.
        """
        with ExitStack() as contexts:
            if self.diagnostics.plain:
                contexts.enter_context(twice_differentiable())
            if self.precision != "float32":
                device = next((p.device.type for p in self.model.parameters()), "cpu")
                contexts.enter_context(torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False))
            return check_loss(self.loss_fn(self.model, batch))


@dataclass
class ForwardPass:
    """One batch after its forward pass."""

    loss: torch.Tensor | None
    network: GradCapture
    hessian: OutputHessian

    def free_loss(self) -> None:
        """Free what lies between the outputs and the loss, once its Hessian is known."""
        self.loss = None
        self.hessian.free_graph()


@contextmanager
def forward_pass(context: MeasureContext, batch: Batch, per_sample: Mapping[str, bool]) -> Iterator[ForwardPass]:
    """Run the loss on ``batch`` with hooks in place; inside, probes may go back through the graph.

    Raises:
        HawqError: the loss is no finite scalar, or does not depend on the layers.
    """
    cut: frozenset[int] = frozenset()
    parts, stepped = context.diagnostics.loss_parts, set[str]()
    while True:  # again with the boundary further in front, or cut, where an output on it also feeds another
        network = GradCapture(
            context.layers, context.table, context.diagnostics.overwritten, context.operands, context.rounding
        )
        network.per_sample = per_sample
        states = RandomStates()
        # layers see their outputs before the boundary does: the hooks entered last come first
        with Outputs(context.model, cut, parts.modules) as outputs, network, torch.enable_grad():
            loss = context.loss(batch)
            network.keep_reached(loss)
            boundary, nested = find_boundary(loss, outputs)
            if not boundary and not stepped:
                raise HawqError("The loss does not depend on the output of any layer; check loss_fn or training_step.")
            if nested and not cut:
                cut = frozenset(boundary)
                continue
            try:
                forward = ForwardPass(loss, network, _hessian(context, batch, loss, outputs, boundary, states, network))
            except NoSecondDerivative as reason:
                context.diagnostics.do_without(reason)
                continue
            del loss  # so that the user of `forward` alone decides how long its graph lives
            if modules := parts.look(forward.hessian):
                stepped |= modules
                parts.step_back(modules)
            elif stepped and not has_curvature(forward.hessian):
                parts.revert(stepped)
                stepped.clear()
            else:
                if nested:
                    context.diagnostics.warn_once(
                        "The loss reads an inner layer's output as well as what follows from it: both count."
                    )
                yield forward
                return
            cut = frozenset()
            del forward


def _hessian(
    context: MeasureContext, batch: Batch, loss: torch.Tensor, outputs: Outputs, boundary: list[int],
    states: RandomStates, network: GradCapture | None = None,
) -> OutputHessian:  # fmt: skip
    """The loss's Hessian at the boundary: by autograd, or by differences once that is known to be needed.

    Args:
        context: model, loss and sites.
        batch: one batch.
        loss: of it.
        outputs: that were recorded.
        boundary: their numbers.
        states: random states before the pass.
        network: whose hooks are in place, and not to record when the loss is computed again.

    Raises:
        NoSecondDerivative: the loss takes operations that have none, and this was not known.
    """
    diagnostics = context.diagnostics
    visits = [outputs.visits[i] for i in boundary]

    def slopes(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [v.detach().requires_grad_(True) for v in values]
        replaced = ReplacedOutputs(context.model, diagnostics.loss_parts.modules, dict(zip(visits, leaves)))
        with random_states_kept(), not_recording(network), replaced, torch.enable_grad():
            states.put_back()  # as in the pass that gave the outputs
            again = context.loss(batch)
            replaced.recording = False
            gradients = torch.autograd.grad(again, leaves, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, gradients)]

    if diagnostics.once_only:
        return DifferenceHessian(loss, outputs, boundary, slopes)
    edges = [outputs.edges[i] for i in boundary]
    operations = {type(node).__name__ for node in nodes_between(loss, edges)}
    if operations <= diagnostics.operations:
        return OutputHessian(loss, outputs, boundary)
    try:
        hessian = OutputHessian(loss, outputs, boundary)
        check_second_derivative(hessian, loss, slopes)
    except (RuntimeError, NotImplementedError) as error:
        if out_of_memory(error):
            raise
        raise NoSecondDerivative(f"an operation that says: {str(error).strip().splitlines()[0]}") from error
    diagnostics.operations |= operations
    return hessian


@contextmanager
def outputs_of(context: MeasureContext, batch: Batch) -> Iterator[OutputHessian]:
    """The loss's Hessian at the outputs of ``batch``, for nothing to be sent back through the network.

    Raises:
        HawqError: the loss is no finite scalar, or does not depend on the layers.
    """
    parts, states = context.diagnostics.loss_parts, RandomStates()
    with graph_started(context.layers), Outputs(context.model, skip=parts.modules) as outputs:
        with torch.enable_grad():
            loss = context.loss(batch)
            boundary, nested = find_boundary(loss, outputs)
        if boundary and not nested:
            try:
                with torch.enable_grad():
                    hessian = _hessian(context, batch, loss, outputs, boundary, states)
            except NoSecondDerivative as reason:
                context.diagnostics.do_without(reason)
            else:
                if not parts.look(hessian):
                    yield hessian
                    return
                del hessian
    del loss
    with forward_pass(context, batch, {s.name: False for s in context.table}) as forward:
        yield forward.hessian


def check_loss(loss: object) -> torch.Tensor:
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
    if loss.is_inference():
        raise HawqError(
            "The loss is computed under torch.inference_mode(), where there are no gradients: measure outside of it, "
            "or within torch.inference_mode(False)."
        )
    if loss.grad_fn is None:
        raise HawqError(
            "The loss does not depend on the weights that are measured, or torch.no_grad() is in it, so it has no "
            "curvature in them. Of a step that sends back several losses by hand the first is measured; "
            "MeasureConfig(loss_fn=...) can name another."
        )
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
