"""The first loss of a measurement: is it a number, is the network float, and what reads weights past their layers."""

from __future__ import annotations

from hawq_lightning._errors import HawqError, some
from hawq_lightning._function_reads import FunctionReads
from hawq_lightning._sites import READ_BY_FUNCTION
from hawq_lightning._types import Batch
from hawq_lightning.layers import FakeQuantLayer, holder_values, layer_type
from hawq_lightning.sensitivity._boundary import Outputs, read_by
from hawq_lightning.sensitivity._context import MeasureContext


def check_float(context: MeasureContext) -> None:
    """Refuse layers whose quantizers are on.

    Raises:
        HawqError: it names one, and says how to measure the float network.
    """
    for name, reader in context.layers.items():
        layer = reader.module
        if not isinstance(layer, FakeQuantLayer):
            continue
        for attribute in (reader.quantizer_attribute, reader.input_quantizer_attribute):
            quantizer = getattr(layer, attribute)
            if quantizer.bits and not quantizer.fake_quant_disabled:
                raise HawqError(
                    f"Layer {name!r} is quantized, and traces are those of a float network: measure inside of "
                    "hawq_lightning.quantization.fake_quant_disabled(model), or call unquantize(model) first."
                )
    for name, operand in context.operands.items():
        if any(q.bits and not q.fake_quant_disabled for q in holder_values(operand.module)):
            raise HawqError(
                f"What {name!r} reads is quantized, and traces are those of a float network: measure inside of "
                "hawq_lightning.quantization.fake_quant_disabled(model), or call unquantize(model) first."
            )


def check_first_loss(context: MeasureContext, batch: Batch) -> float:
    """The loss of a batch as a number, checked; what reads weights outside of their layers is kept to be noted.

    Args:
        context: model, loss and sites.
        batch: one that memory holds.

    Raises:
        HawqError: the loss is no finite scalar, or sites that no forward pass has found have a weight that a function
            reads as well.
    """
    weights = {id(m.weight): (name, m.weight) for name, m in context.layers.items() if not m.recomputed}
    wanted = [w for _, w in weights.values()]
    wanted += [
        p for m in context.layers.values() if m.recomputed for p in m.module.parameters() if p.is_floating_point()
    ]
    for w in wanted:
        w.requires_grad_(True)
    try:
        with Outputs(context.model) as outputs, FunctionReads(context.model, context.layers) as functions:
            loss = context.loss(batch)
        penalised = [weights[id(w)][0] for w in read_by(loss, outputs) if id(w) in weights]
        value = float(loss.detach())
    finally:
        for w in wanted:
            w.requires_grad_(False)
    read = [n for n in functions.layers() if n not in penalised]
    if read and not context.table.traced:
        raise HawqError(
            f"A function reads the weight of {some(read)} as well, past any quantizer: leave such layers out "
            "(exclude=), or let a forward pass find the sites (hawq_lightning.sites(model, batch))."
        )
    context.diagnostics.differentiates = functions.differentiated and bool(penalised)
    past_layers = context.diagnostics.past_layers
    if penalised and not context.diagnostics.differentiates:
        past_layers.append(
            f"The loss reads the weights of {some(penalised)} outside of their layers (a penalty on weights?);"
        )
    if read:
        past_layers.append(f"A function reads the weight of {some(read)} as well: that use stays float, and")
    for name, modules in functions.elsewhere().items():
        kinds = ", ".join(dict.fromkeys(layer_type(m).__name__ for m in modules))
        past_layers.append(f"The weight of {name} is also that of another module ({kinds}): that use stays float, and")
    return value


def note_float_layers(context: MeasureContext) -> None:
    """Say which layers stay float because a function reads their weights."""
    if names := [f.name for f in context.table.floats if f.reason == READ_BY_FUNCTION]:
        context.diagnostics.warn_once(
            f"{some(names)} stay{'s' if len(names) == 1 else ''} float: a function reads the weight as well, past any "
            "quantizer."
        )
