"""A plan's losses on images held out of the training split, before and after fine-tuning."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from design import ExperimentDesign
from jobs import composed
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from hawq_lightning import Plan, SiteTable, quantize
from hawq_lightning.cli import make_data, make_task
from hawq_lightning.layers import FakeQuantLayer
from hawq_lightning.quantization import loss_per_site, per_channel_view
from hawq_lightning.quantization.post_training import reestimate_batchnorm
from hawq_lightning.selection import Problem
from hawq_lightning.tasks import make_optimizer

Batches = Sequence[tuple[Tensor, Tensor]]


class HeldOut:
    """The sweep's network and data, evaluated on what is held out of the training split.

    Args:
        design: the sweep.
        setting: whose configuration is meant; settings differ in their plans only.
        images: how many to score on.
    """

    def __init__(self, design: ExperimentDesign, setting: str, images: int) -> None:
        tuning = [o for o in design.asked["tuning"]["overrides"] if o.startswith("data.evaluate_on=")]
        given = [*design.common, *design.asked["settings"][setting]["overrides"], *tuning, "paths.output_dir=''"]
        self.cfg = composed(given)
        self.mixed = "trainer=cpu_mixed" in design.asked["train"]
        data = make_data(self.cfg)
        data.setup("fit")
        self._loader = data.train_dataloader()
        self.held_out = _spread(data.val_dataloader().dataset, images)
        if "augment" in self.cfg.data:
            still = self.cfg.copy()
            still.data.augment = "none"
            data = make_data(still)
            data.setup("fit")
        self.still = _spread(data.train_dataloader().dataset, 1024)

    def network(self, plan: Plan | None = None) -> LightningModule:
        """With its float weights, quantized if there is a plan."""
        task = make_task(self.cfg).to(memory_format=torch.channels_last).eval()
        return task if plan is None else quantize(task, plan)

    def stages(self, plan: Plan, lr: float, steps: int) -> dict[str, Any]:
        """The four scores of a plan."""
        net = self.network(plan)
        found = {"quantized": score(net, self.held_out)}
        reestimate_batchnorm(net, self.still)
        found["batchnorm"] = score(net, self.held_out)
        found["norm"] = score(with_norms(self.network(plan)), self.held_out)
        found["trained"] = self.fine_tune(plan, lr, steps)[-1]
        return found

    def fine_tune(
        self, plan: Plan, lr: float, steps: int, seed: int = 1, marks: Sequence[int] = ()
    ) -> list[dict[str, float]]:
        """As the sweep does it; scores at the marks on the way, and at the end."""
        torch.manual_seed(seed)
        net, how = self.network(plan), self.cfg.task
        made = make_optimizer(
            net.parameters(), how.optimizer, lr, how.momentum, how.weight_decay, how.schedule, steps
        )  # fmt: skip
        found = []
        for step, (x, y) in enumerate(itertools.islice(self._endless(), steps)):
            if step in marks:
                found.append({"step": step, **score(net, self.held_out)})
            net.train()
            made["optimizer"].zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()
        return [*found, {"step": steps, **score(net, self.held_out)}]

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for x, y in self._loader:
                yield x.to(memory_format=torch.channels_last), y

    def one_by_one(self, problem: Problem) -> dict[str, float]:
        """``site@bits`` -> loss change with that weight alone quantized, on 512 training images."""
        weights = tuple(s for s in problem.sites if s.kind == "weight")
        table = SiteTable(weights, problem.layers)
        rows = loss_per_site(
            self.network(), self.still[:4], lambda m, b: F.cross_entropy(m(b[0]), b[1]), table, problem.candidates
        )  # fmt: skip
        return {f"{r['site']}@{r['bits']}": r["measured"] for r in rows}


@torch.no_grad()
def with_norms(net: LightningModule) -> LightningModule:
    """Weights as quantized, but as long as they were, channel by channel; activations stay quantized."""
    for layer in net.modules():
        if isinstance(layer, FakeQuantLayer):
            rounded = layer.quantized_weight
            norms = [w.flatten(1).norm(dim=1).clamp_min(1e-30) for w in (layer.weight, rounded)]
            longer = per_channel_view(norms[0] / norms[1], rounded, 0)
            layer.weight.copy_(rounded * longer)
            layer.weight_quantizer.disable()
    return net


@torch.no_grad()
def score(net: nn.Module, batches: Batches) -> dict[str, float]:
    """Mean loss and accuracy, in evaluation mode and float32."""
    net.eval()
    logits = torch.cat([net(x) for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    right = (logits.argmax(1) == labels).float().mean()
    return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(right)}


def _spread(dataset: Any, images: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of that many images, taken evenly from the whole, whose classes come one after the other."""
    pick = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int)
    items = [dataset[int(i)] for i in pick]
    stacked = torch.stack([x for x, _ in items]).to(memory_format=torch.channels_last)
    return list(zip(stacked.split(128), torch.tensor([int(y) for _, y in items]).split(128)))
