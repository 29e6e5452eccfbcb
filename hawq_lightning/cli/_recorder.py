"""Writes metrics.json and the packed file at the end of the fit, in the process that holds the network."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._io import write_text
from hawq_lightning._types import JsonObject
from hawq_lightning.callbacks import HAWQ
from hawq_lightning.cli._per_image import keep_per_image
from hawq_lightning.cli._records import MONITOR, SCORES, sealed_text
from hawq_lightning.cli._resume import RunState


def scores(metrics: Mapping[str, float | Tensor], monitor: str | None = None) -> dict[str, float]:
    """The validation scores among Lightning's metrics under their names in metrics.json, finite ones only.

    Args:
        metrics: what was logged.
        monitor: name of a score of the user's own.

    Raises:
        HawqError: there are scores, and ``monitor`` is not among them.
    """
    values = {name: float(metrics[key]) for key, name in SCORES.items() if key in metrics}
    if monitor is not None and metrics:
        if monitor not in metrics:
            raise HawqError(
                f"monitor={monitor} is not logged in validation; there are {', '.join(metrics)}."
                f"{nearest(monitor, metrics)}"
            )
        values[MONITOR] = float(metrics[monitor])
    return {k: v for k, v in values.items() if math.isfinite(v)}


class CommitAtFirstBatch(pl.Callback):
    """From the first step on there are results to lose; all that can be refused before one was refused."""

    def __init__(self, progress: RunState) -> None:
        self.progress = progress
        self._committed = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: object) -> None:
        """In the first process."""
        self._commit(trainer)

    def _commit(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and not self._committed:
            self.progress.commit()
            self._committed = True


class Recorder(CommitAtFirstBatch):
    """Keeps the scores before and after fine-tuning and the seconds of each phase.

    Args:
        hawq: the callback that chooses the plan.
        folder: the run folder.
        record: what is known already: command, seed, the float network's scores and seconds. It is completed.
        progress: where the record is kept until the run has come to its end.
    """

    def __init__(self, hawq: HAWQ, folder: Path, record: JsonObject, progress: RunState) -> None:
        super().__init__(progress)
        self.hawq, self.folder, self.record = hawq, folder, record
        self._clock = time.perf_counter()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the clock."""
        self._clock = time.perf_counter()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The plan is chosen and in force, unless that is for a later epoch."""
        if self.hawq.has_plan:
            self._commit(trainer)
        self._lap("traces_and_plan")

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The whole validation set has been seen once, before any fine-tuning."""
        fresh = trainer.global_step == 0  # a resumed run has this score from before
        if fresh and self.hawq.has_plan:  # with hawq.start_epoch the network is float until later
            self._put("quantized", self._scores(trainer))
            self._keep_images("quantized", trainer, pl_module)
        self._lap("validation")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without a sanity check the plan has been chosen by now."""
        if "traces_and_plan" not in self.record["seconds"]:
            self._lap("traces_and_plan")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One row of the history an epoch."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            values = self._scores(trainer)
            self._put("fine_tuned", values)  # the last one stays
            self._keep_images("fine_tuned", trainer, pl_module)
            names = {"accuracy": "val_acc", MONITOR: self._monitor}
            columns = {names.get(k) or f"val_{k}": v for k, v in values.items()}
            epoch = trainer.current_epoch + 1
            # an epoch that was cut short after its validation comes twice
            rows = [row for row in self.record["history"] if row["epoch"] < epoch]
            self.record["history"] = [*rows, {"epoch": epoch, "phase": "fine_tuning", **columns}]
            if trainer.is_global_zero:
                self.progress.keep(self.record)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the packed file and metrics.json from the first process."""
        if trainer.global_step > 0:
            self._put("fine_tuned", self._scores(trainer))
            self._lap("fine_tuning")
        if not trainer.is_global_zero:
            return
        from hawq_lightning.export import save_packed

        if not self.hawq.has_plan:
            raise HawqError(f"hawq.start_epoch={self.hawq.start_epoch} was never reached: nothing was quantized.")
        plan = self.hawq.plan
        self._commit(trainer)  # nothing was trained
        if not (self.folder / "plan.json").is_file():  # it was given, or came with a checkpoint
            plan.save(self.folder / "plan.json")
        size = save_packed(pl_module, plan, self.folder / "model.safetensors")
        self._lap("packing")
        self.record["sizes"] |= {
            "weight_bytes": int(plan.costs["weight_bytes"]),
            "float_weight_bytes": int(plan.costs["float_weight_bytes"]),
            "file_bytes": size,
        }
        self.record["bops"] = plan.costs.get("bops")
        self.record["costs"] = dict(plan.costs)
        seconds = self.record["seconds"]
        seconds["total"] = sum(v for k, v in seconds.items() if k != "total")
        write_text(self.folder / "metrics.json", sealed_text(self.record))
        self.progress.done()

    @property
    def _monitor(self) -> str | None:
        """The setting ``monitor``."""
        name: str | None = self.record.get(MONITOR, {}).get("name")
        return name

    def _scores(self, trainer: pl.Trainer) -> dict[str, float]:
        return scores(trainer.callback_metrics, self._monitor)

    def _keep_images(self, stage: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        arrays = getattr(pl_module, "per_image", None)
        if arrays and trainer.world_size == 1:  # else each process saw a part
            keep_per_image(self.folder, stage, {k: v.numpy() for k, v in arrays.items()})

    def _put(self, stage: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.record.setdefault(name, {})[stage] = value

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self.record["seconds"][name] = self.record["seconds"].get(name, 0.0) + max(0.0, now - self._clock)
        self._clock = now
