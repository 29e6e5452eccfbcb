"""The paper's own figures of this network, once its traces are known: ``paper_figures=true`` of the analyze script."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from hawq_lightning.callbacks import HAWQ, loss_from_training_step, shows_progress, train_batches
from hawq_lightning.quantization import fake_quant_disabled

_IMAGES = 64


class PaperFigures(pl.Callback):
    """Draws convergence, eigenvalues and landscapes of the float network right after its traces were measured.

    Args:
        hawq: the callback that measures; it comes before this one.
        folder: of the figures.
    """

    def __init__(self, hawq: HAWQ, folder: Path) -> None:
        self.hawq, self.folder = hawq, folder

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, on the first process; without new traces (a plan was given) there is nothing to draw."""
        measured = self.hawq.measure_callback.has_plan and self.hawq.has_sensitivity
        if not measured or not trainer.is_global_zero:
            return
        from hawq_lightning.report import paper_figures

        config = self.hawq.measure_callback.measure
        with (
            fake_quant_disabled(pl_module),
            loss_from_training_step(trainer, pl_module, config.loss_fn) as loss_fn,
        ):
            batches = train_batches(trainer, pl_module, config, min(_IMAGES, config.images), loss_fn)
            paper_figures(
                self.folder, pl_module, batches, loss_fn, self.hawq.sensitivity, self.hawq.sites,
                seed=config.seed, progress=shows_progress(trainer),
            )  # fmt: skip
