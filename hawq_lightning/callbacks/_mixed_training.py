"""Mixed precision in training only: scores are those of the float32 arithmetic that the packed file stands for."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from lightning.pytorch.plugins.precision import MixedPrecision

from hawq_lightning._errors import HawqError


class MixedTraining(MixedPrecision):
    """A plugin for ``Trainer(plugins=...)``: bfloat16 autocast in ``training_step``, float32 everywhere else.

    bfloat16 has 8 significant bits, so that validating in it adds an error of the size of 8-bit activations' own.

    Args:
        device: type of the accelerator, ``cpu`` or ``cuda``.

    Raises:
        HawqError: another device type.
    """

    def __init__(self, device: str = "cpu") -> None:
        if device not in ("cpu", "cuda"):
            raise HawqError(f"trainer.plugins.device={device!r} is unknown; use cpu or cuda.")
        super().__init__("bf16-mixed", device)

    @contextmanager
    def val_step_context(self) -> Generator[None, None, None]:
        """Float32."""
        yield

    test_step_context = val_step_context
    predict_step_context = val_step_context
