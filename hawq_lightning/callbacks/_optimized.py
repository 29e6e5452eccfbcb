"""Whether optimizers hold what is to be trained: learned steps of quantizers, and parameters that were made anew."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from hawq_lightning._errors import HawqError, some
from hawq_lightning.callbacks._taking_groups import TakingGroups
from hawq_lightning.callbacks._trainer import is_sharded, optimized
from hawq_lightning.quantization import QuantizedWeight, quantized_reads

_NONE_TAKES = (
    "{kind} takes no learned steps of quantizers, such as that of {name!r}, of shape {shape}, and no other optimizer "
    "is there to take them: give what is no matrix an optimizer such as torch.optim.AdamW beside {kind}, or take a "
    "quantizer without learned steps, such as 'uniform'."
)


def add_learned_steps(trainer: Trainer, pl_module: LightningModule) -> None:
    """Put learned steps that no optimizer holds into the group that holds their layer, or that takes them.

    An optimizer that was made before ``setup``, or from a list of parameters, does not know them. Groups stay as many
    as they are, so that schedulers fit, and a resumed run does the same before its optimizers are restored.

    Raises:
        HawqError: what holds a layer takes no parameters of its steps' shapes, and neither does any other group.
    """
    if is_sharded(trainer):
        return
    held, groups = {id(p) for p in optimized(trainer)}, TakingGroups(trainer.optimizers, pl_module)
    added: dict[str, None] = {}  # in order, each layer once
    alone: dict[str, None] = {}
    elsewhere: dict[str, str] = {}
    for name, layer in quantized_reads(pl_module).items():
        mine = {id(p) for p in layer.module.parameters()}
        weight = layer if isinstance(layer, QuantizedWeight) else None
        steps = [*(() if weight is None else weight.weight_quantizer.parameters()), *layer.input_quantizer.parameters()]
        for step in steps:
            if not step.requires_grad or id(step) in held:
                continue
            holders, found = groups.holders(mine), groups.find(step, mine, name)
            if found is not None:
                found[1]["params"].append(step)
                held.add(id(step))
                if any(found[1] is group for _, group in holders):
                    added[name] = None
                else:
                    elsewhere[name] = f"{type(holders[0][0]).__name__} takes none, {type(found[0]).__name__} does"
            elif holders:
                raise HawqError(_NONE_TAKES.format(kind=type(holders[0][0]).__name__, name=name, shape=[*step.shape]))
            elif (weight is None or weight.weight.requires_grad) and not mine.isdisjoint(held):
                alone[name] = None
    if added:
        rank_zero_info(
            f"HAWQ: no optimizer held the learned steps of {some([*added])}: they were added to the group that holds "
            "the layer."
        )
    if elsewhere:
        rank_zero_info(
            f"HAWQ: no optimizer held the learned steps of {some([*elsewhere])}: they were added to the nearest group "
            f"that takes their shapes ({'; '.join(dict.fromkeys(elsewhere.values()))})."
        )
    if alone:
        rank_zero_warn(
            f"HAWQ: no optimizer holds the learned steps of {some([*alone])}, so they stay as they are: make the "
            "optimizer in configure_optimizers, from self.parameters()."
        )


def warn_made_anew(trainer: Trainer, pl_module: LightningModule) -> None:
    """Warn where optimizers hold parameters that the module has no more, and the new ones are in none."""
    if is_sharded(trainer):
        return
    held = optimized(trainer)
    present, ids = {id(p) for p in pl_module.parameters()}, {id(p) for p in held}
    gone = {p.shape for p in held if id(p) not in present and isinstance(p, nn.Parameter)}
    new = [n for n, p in pl_module.named_parameters() if p.requires_grad and id(p) not in ids and p.shape in gone]
    if new:
        rank_zero_warn(
            f"HAWQ: {some(new)} {'is' if len(new) == 1 else 'are'} in no optimizer, which hold parameters of the same "
            "shape that the module has no more: what is made anew after configure_optimizers is not trained."
        )
