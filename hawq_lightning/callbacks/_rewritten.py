"""What code wrote to a network after it was quantized, told before a validation, a test or a prediction."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from hawq_lightning._errors import some
from hawq_lightning._plan import Plan
from hawq_lightning.callbacks._trainer import is_sharded
from hawq_lightning.quantization import quantized_layers, warn_off_grid


def warn_rewritten(trainer: Trainer, pl_module: LightningModule, plan: Plan | None) -> None:
    """Warn of weights that left their grids, and of layers of the plan that are gone or float.

    Args:
        trainer: nothing is told inside of its ``fit``, where training moves weights.
        pl_module: with quantizers enabled, or not.
        plan: that it was given.
    """
    if trainer.state.fn == "fit" or not trainer.is_global_zero or is_sharded(trainer):
        return
    weights = {n: x for n, x in quantized_layers(pl_module).items() if x.weight_quantizer.bits}
    warn_off_grid(weights)
    planned = [] if plan is None else [name for site in plan.weights for name in site.layers]
    gone = [name for name in planned if name not in weights]
    if weights and gone and len(gone) < len(planned):
        rank_zero_warn(
            f"HAWQ: the plan has bits for {some(gone)}, which are float now or no more: something replaced these "
            "layers after they were quantized. Replace layers before quantizing, or call "
            "hawq_lightning.quantize(model, plan) with a plan of the network as it is."
        )
