"""Object detection with the losses of torchvision's detectors and COCO's mean average precision (paper, 3.3)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics.detection import MeanAveragePrecision

from hawq_lightning._extra import require
from hawq_lightning._patterns import own_exclude
from hawq_lightning.tasks._matching import join, match_image, objects_of
from hawq_lightning.tasks._optimizers import check_names, make_optimizer

Batch = tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]
_Dicts = list[dict[str, torch.Tensor]]


class DetectionTask(LightningModule):
    """Trains a detector that returns a dict of losses in training mode and boxes, scores and labels otherwise.

    The loss is the sum of that dict. Validation and test log ``map`` (IoU 0.50 to 0.95) and ``map_50`` under
    ``val/`` and ``test/``. After validation ``per_image`` holds every detection with its matches
    (:mod:`hawq_lightning.tasks.matching`), from which intervals over images are made.

    Args:
        net: called as ``net(images, targets)`` in training, ``net(images)`` otherwise; see ``models.retinanet``.
        optimizer: ``adamw`` or ``sgd``.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: decoupled for AdamW; not applied to biases and BatchNorm.
        schedule: ``onecycle``, ``cosine`` (both over all steps of the run) or ``none``.
        freeze_batchnorm: keep BatchNorm's statistics and affine parameters as they are, also while training.

    Raises:
        HawqError: an unknown optimizer or schedule, or the package that computes mAP is missing.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        schedule: str = "onecycle",
        freeze_batchnorm: bool = False,
    ) -> None:
        super().__init__()
        check_names(optimizer, schedule)
        require("faster_coco_eval")
        logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # it prints its table at every validation
        self.save_hyperparameters(ignore=["net"])
        self.net = net
        self.quantization_exclude = tuple(own_exclude(net, "net."))
        self.optimizer, self.lr, self.momentum, self.weight_decay = optimizer, lr, momentum, weight_decay
        self.schedule = schedule
        self.freeze_batchnorm = freeze_batchnorm
        if freeze_batchnorm:
            for module in self._batchnorms():
                for parameter in module.parameters():
                    parameter.requires_grad_(False)
        self.val_map = MeanAveragePrecision(backend="faster_coco_eval")
        self.test_map = MeanAveragePrecision(backend="faster_coco_eval")
        self.per_image: dict[str, torch.Tensor] = {}
        self._matches: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
        for metric in (self.val_map, self.test_map):
            metric.warn_on_many_detections = False

    def forward(self, images: list[torch.Tensor]) -> _Dicts:
        """Detections of each image in evaluation mode."""
        detections: _Dicts = self.net(images)
        return detections

    def train(self, mode: bool = True) -> DetectionTask:
        """Switch the mode; a frozen BatchNorm stays in evaluation mode."""
        super().train(mode)
        if mode and self.freeze_batchnorm:
            for module in self._batchnorms():
                module.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int = 0) -> torch.Tensor:
        """Sum of the detector's losses, the mean over the batch's images."""
        images, targets = batch
        losses = self.net(images, targets)
        loss: torch.Tensor = torch.stack(list(losses.values())).sum()
        for name, value in losses.items():
            self.log(f"train/{name}", value.detach(), batch_size=len(images), on_step=False, on_epoch=True)
        self.log("train/loss", loss.detach(), batch_size=len(images), prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> None:
        """Collect detections."""
        detections, targets = self._collect(self.val_map, batch)
        self._matches += [(match_image(f, t), objects_of(t)) for f, t in zip(detections, targets)]

    def on_validation_epoch_start(self) -> None:
        """Begin a new record."""
        self._matches = []

    def on_validation_epoch_end(self) -> None:
        """Log ``val/map`` and ``val/map_50``; complete ``per_image``."""
        self._log_map("val", self.val_map)
        self.per_image = join(*zip(*self._matches)) if self._matches else {}

    def test_step(self, batch: Batch, batch_idx: int = 0) -> None:
        """Collect detections."""
        self._collect(self.test_map, batch)

    def on_test_epoch_end(self) -> None:
        """Log ``test/map`` and ``test/map_50``."""
        self._log_map("test", self.test_map)

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule by name, over all steps of the fit."""
        steps = 1 if self.schedule == "none" else int(self.trainer.estimated_stepping_batches)
        return make_optimizer(
            self.parameters(), self.optimizer, self.lr, self.momentum, self.weight_decay, self.schedule, steps
        )

    def _collect(self, metric: MeanAveragePrecision, batch: Batch) -> tuple[_Dicts, _Dicts]:
        images, targets = batch
        detections = [
            {k: v.detach().float() if v.is_floating_point() else v for k, v in d.items()} for d in self.net(images)
        ]
        metric.update(
            detections, [{k: t[k] for k in ("boxes", "labels", "iscrowd", "area") if k in t} for t in targets]
        )
        return detections, targets

    def _log_map(self, stage: str, metric: MeanAveragePrecision) -> None:
        result = metric.compute()
        metric.reset()
        for name in ("map", "map_50"):
            # -1 says that no image had a box
            self.log(f"{stage}/{name}", result[name].float().clamp(min=0), prog_bar=True)

    def _batchnorms(self) -> list[nn.Module]:
        return [m for m in self.net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
