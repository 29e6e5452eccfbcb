"""The callback of post-training methods: on the Trainer's own data, alike on every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from hawq_lightning._config import MeasureConfig
from hawq_lightning._errors import HawqError
from hawq_lightning._types import JsonObject
from hawq_lightning.callbacks._apply import quantizing_callback
from hawq_lightning.callbacks._companion import Companion
from hawq_lightning.callbacks._trainer import (
    is_sharded,
    loss_from_training_step,
    shows_progress,
    sync_averages,
    train_batches,
)
from hawq_lightning.quantization import enabled_bits, quantizers
from hawq_lightning.quantization.post_training import METHODS, check_methods, post_training


class PostTraining(Companion):
    """Improve rounding and biases without training, as soon as quantizers are enabled.

    ``trainer.validate`` alone then measures, quantizes, improves and scores the network; so does ``trainer.fit`` with
    no epochs. The train data is used where there is any, in ``validate`` otherwise the validation data.

    Args:
        methods: names of :data:`hawq_lightning.quantization.post_training.METHODS`; ``True``: adaptive rounding, then
            bias correction, and between them BatchNorm's statistics where no layer's rounding can be learned.
        measure: which images to look at (``images``, ``seed``) and how to run the module on them (``loss_fn``);
            ``None``: the config of ``HAWQ`` beside it.

    Attributes:
        improved: method -> what it reports of each layer.

    Raises:
        HawqError: an unknown method; at the start: no ``HAWQ`` or ``ApplyPlan`` beside it, or split layers.
    """

    def __init__(self, methods: bool | str | Sequence[str] = True, measure: MeasureConfig | None = None) -> None:
        self.methods = True if methods is True else check_methods(methods)
        if not self.methods:
            raise HawqError(f"PostTraining(methods={methods!r}) names no method; leave the callback out for none.")
        self.measure = measure
        self.improved: dict[str, JsonObject] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Somebody has to quantize."""
        self._check_company(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``trainer.validate`` quantizes a float network."""
        if trainer.state.fn == "validate" and not enabled_bits(pl_module):
            self._check_company(trainer, pl_module)
            callback = quantizing_callback(trainer)
            assert callback is not None
            with outside_of_evaluation(pl_module):
                callback.quantize(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Only ``fit`` and ``validate`` quantize."""
        if not enabled_bits(pl_module):
            rank_zero_warn("HAWQ: the network is float here; trainer.validate() quantizes it.")

    on_predict_start = on_test_start

    def after_enable(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Improve what was quantized just now."""
        if name := is_sharded(trainer):
            raise HawqError(f"{name} splits the layers; post-training methods need them whole.")
        self._improve(trainer, pl_module)
        sync_averages(trainer, pl_module, weights=True)

    def _check_company(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if quantizing_callback(trainer) is None and not enabled_bits(pl_module):
            raise HawqError("PostTraining improves a network that HAWQ or ApplyPlan quantizes: add one of them.")

    def _improve(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callback = quantizing_callback(trainer)
        config = self.measure or (MeasureConfig() if callback is None else callback.measure_config)
        with loss_from_training_step(trainer, pl_module, config.loss_fn) as forward:
            batches = train_batches(trainer, pl_module, config, config.images, forward)
            show = (callback is None or callback.progress) and shows_progress(trainer)
            self.improved = post_training(pl_module, batches, self.methods, forward=forward, progress=show)
        if trainer.world_size > 1:  # one processor's rounding may differ from another's
            of_quantizers = {id(t) for q in quantizers(pl_module) for t in (*q.parameters(), *q.buffers())}
            for tensor in (*pl_module.parameters(), *pl_module.buffers()):
                if id(tensor) not in of_quantizers:
                    tensor.data.copy_(trainer.strategy.broadcast(tensor.data))
        for name, layers in self.improved.items():
            what = METHODS[name].summary(layers) if layers else "no layer that it applies to"
            rank_zero_info(f"HAWQ: {name}: {f'{len(layers)} layers, ' if layers else ''}{what}.")


@contextmanager
def outside_of_evaluation(pl_module: LightningModule) -> Iterator[None]:
    """Gradients and training mode in the midst of ``trainer.validate``, which has switched both off."""
    modes = [(m, m.training) for m in pl_module.modules()]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            pl_module.train()  # detectors return losses in training mode only
            yield
    finally:
        for module, mode in modes:
            module.training = mode
