"""Lightning's rich progress bar without the version number that means nothing here."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


class PlainProgressBar(RichProgressBar):
    """Shows the metrics of the task only."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """All but ``v_num``."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
