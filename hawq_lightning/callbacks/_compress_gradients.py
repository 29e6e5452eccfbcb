"""Few bits for what processes send one another, by the traces that HAWQ measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch
from hawq_lightning.callbacks._gradient_codes import WIDTHS
from hawq_lightning.callbacks._gradient_compression import GradientCompression, compressed_gradients
from hawq_lightning.callbacks._hawq import HAWQ
from hawq_lightning.sensitivity import Sensitivity


class CompressGradients(Callback):
    """In DDP, gradients are sent in bits chosen by trace; beside :class:`HAWQ`, whose traces it takes, or with traces.

    With one process it does nothing. What rounding leaves is not saved in checkpoints: a resumed training begins with
    float32 steps again, as torch's PowerSGD does.

    Args:
        budget: how many times fewer bytes than float32 a step may send.
        traces: parameter name in the LightningModule -> mean trace; ``None``: those of the :class:`HAWQ` beside it.
        widths: of 1, 2, 4 and 8 bits those that gradients may take.
        warmup: float32 steps before bits are chosen.
        error_feedback: whether what rounding leaves is added to the next gradient.

    Attributes:
        state: bits and bytes; ``None`` with one process.

    Raises:
        HawqError: a setting out of range; at the start of training: no traces, or a strategy with a hook of its own.
    """

    def __init__(
        self,
        budget: float = 8.0,
        traces: Mapping[str, float] | None = None,
        *,
        widths: Sequence[int] = WIDTHS,
        warmup: int = 5,
        error_feedback: bool = True,
    ) -> None:
        self._settings = {"budget": budget, "widths": widths, "warmup": warmup, "error_feedback": error_feedback}
        self._traces = traces
        self.state: GradientCompression | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the hook to DDP, before its first backward pass."""
        self.state = None
        hawq = self._hawq(trainer)
        if self._traces is None and hawq is None:
            raise HawqError("CompressGradients needs traces: put HAWQ into the Trainer's callbacks, or give traces.")
        if not isinstance(trainer.model, DistributedDataParallel):
            return
        self.state = GradientCompression(pl_module, self._traces or {}, **self._settings)  # type: ignore[arg-type]
        try:
            trainer.model.register_comm_hook(self.state, compressed_gradients)
        except (RuntimeError, ValueError) as error:
            raise HawqError(f"CompressGradients: the strategy's DDP takes no hook ({error}).") from error

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Begin as soon as there are traces."""
        hawq = self._hawq(trainer)
        if self.state is not None and not self.state.traces and hawq is not None:
            measured = hawq.measure_callback
            if measured.has_sensitivity:
                self.state.start(mean_traces(hawq.sensitivity))

    @staticmethod
    def _hawq(trainer: Trainer) -> HAWQ | None:
        listed = trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in listed if isinstance(c, HAWQ)), None)


def mean_traces(sensitivity: Sensitivity) -> dict[str, float]:
    """Mean traces by the names of weights."""
    return {t.name: t.mean_trace for t in sensitivity if t.kind == "weight"}
