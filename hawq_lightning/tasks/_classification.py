"""Image classification as a LightningModule."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from hawq_lightning._errors import HawqError
from hawq_lightning._patterns import own_exclude
from hawq_lightning._types import Outputs
from hawq_lightning.tasks._optimizers import check_names, make_optimizer

Batch = tuple[Tensor, Tensor]


class ClassificationTask(pl.LightningModule):
    """Cross-entropy training; logs loss and top-1 (and top-5) accuracy under ``train/``, ``val/`` and ``test/``.

    A network that returns several logits in training (InceptionV3) has the first as its answer; the others are
    auxiliary and enter the training loss only.

    After validation ``per_image`` holds ``correct``: for every image that this process saw, in the loader's order,
    whether the best class was right. Paired comparisons of runs need it.

    Args:
        net: images ``[N, C, H, W]`` to logits ``[N, num_classes]``. Its ``quantization_exclude`` (globs of layer
            names) says which layers get no quantizer.
        num_classes: at least 2; top-5 accuracy is logged from 6 classes on.
        optimizer: ``sgd`` or ``adamw``.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: not applied to biases and BatchNorm.
        schedule: ``onecycle``, ``cosine`` (both over all steps of the fit) or ``none``.
        label_smoothing: of the training loss, 0 to 1.
        auxiliary_weight: of each auxiliary loss.

    Raises:
        HawqError: an unknown optimizer or schedule, or a number out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: str = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: str = "onecycle",
        label_smoothing: float = 0.0,
        auxiliary_weight: float = 0.4,
    ) -> None:
        super().__init__()
        check_names(optimizer, schedule)
        if num_classes < 2:
            raise HawqError(f"num_classes={num_classes} must be at least 2.")
        if not 0 <= label_smoothing < 1:
            raise HawqError(f"task.label_smoothing={label_smoothing} is out of range (0 to 1).")
        if not lr > 0:
            raise HawqError(f"task.lr={lr} must be positive.")
        self.save_hyperparameters(ignore=["net"])
        self.net = net
        self.num_classes = num_classes
        self.optimizer, self.lr, self.momentum = optimizer, lr, momentum
        self.weight_decay, self.schedule = weight_decay, schedule
        self.label_smoothing, self.auxiliary_weight = label_smoothing, auxiliary_weight
        self.quantization_exclude = tuple(own_exclude(net, "net."))
        metrics = {"acc": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes > 5:
            metrics["acc_top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        scores = MetricCollection(dict(metrics))
        self.train_scores = scores.clone(prefix="train/")
        self.val_scores = scores.clone(prefix="val/")
        self.test_scores = scores.clone(prefix="test/")
        self.per_image: dict[str, Tensor] = {}
        self._correct: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, num_classes]``."""
        return _split(self.net(images))[0]

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """Mean cross-entropy of the batch, auxiliary losses added."""
        images, labels = batch
        logits, auxiliary = _split(self.net(images))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        for other in auxiliary:
            loss = loss + self.auxiliary_weight * F.cross_entropy(other, labels, label_smoothing=self.label_smoothing)
        self.train_scores.update(logits.detach(), labels)
        self.log(
            "train/loss",
            loss.detach(),
            on_epoch=True,
            on_step=False,
            prog_bar=True,
            sync_dist=True,
            batch_size=len(labels),
        )
        self.log_dict(self.train_scores, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> None:
        """Collect loss and accuracy."""
        self._correct.append(self._evaluate("val", self.val_scores, batch))

    def on_validation_epoch_start(self) -> None:
        """Begin a new record."""
        self._correct = []

    def on_validation_epoch_end(self) -> None:
        """Complete ``per_image``."""
        self.per_image = {"correct": torch.cat(self._correct).cpu()} if self._correct else {}

    def test_step(self, batch: Batch, batch_idx: int = 0) -> None:
        """Collect loss and accuracy."""
        self._evaluate("test", self.test_scores, batch)

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule by name, over all steps of the fit."""
        steps = 1 if self.schedule == "none" else int(self.trainer.estimated_stepping_batches)
        return make_optimizer(
            self.parameters(), self.optimizer, self.lr, self.momentum, self.weight_decay, self.schedule, steps
        )

    def _evaluate(self, stage: str, scores: MetricCollection, batch: Batch) -> Tensor:
        images, labels = batch
        logits: Tensor = self(images)
        scores.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{stage}/loss", loss, sync_dist=True, batch_size=len(labels))
        for name, score in scores.items():
            self.log(name, score, prog_bar=name.endswith("/acc"), batch_size=len(labels))
        return logits.argmax(1) == labels


def _split(output: Outputs) -> tuple[Tensor, list[Tensor]]:
    """The answer and the auxiliary logits of a network's output."""
    if isinstance(output, Tensor):
        return output, []
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0], [x for x in output[1:] if isinstance(x, torch.Tensor)]
    raise HawqError(f"The network returned {type(output).__name__}; expected logits, or logits and auxiliary logits.")
