"""Precision adjusted through training against one plan at the start: accuracy at equal epochs and equal size.

    python benchmarks/adjust_precision.py [--epochs 8] [--seeds 3]
    python benchmarks/adjust_precision.py --epochs 4 --data DATA/cifar10 --weights mobilenet_cifar.pt

Without ``--data`` a small convolutional network is trained in float on scikit-learn's digits; with it, a network of
``recipes/compact_networks`` has its weights, and ``--images`` images of CIFAR-10 (an image folder) train it. It is then
fine-tuned for equal epochs at 12 times smaller weights of 2 to 8 bits: with one plan made at the start (HAWQ-V2), or
from 4x narrowing to 12x over the first half, traces measured again in every epoch of it
(:class:`hawq_lightning.callbacks.AdjustPrecision`). Stopped, the same command goes on.

Results: benchmarks/results/adjust_precision.{json,md}, adjust_precision_NETWORK.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning import HAWQ, MeasureConfig, models
from hawq_lightning.callbacks import AdjustPrecision
from hawq_lightning.data import ImageFolderDataModule

RESULTS = Path(__file__).resolve().parent / "results"
END = 12
METHODS = ("one plan", "adjusted")


@dataclass(frozen=True)
class Setting:
    """What is fine-tuned.

    Attributes:
        name: in the table's first line.
        net: makes the network; of digits untrained.
        data: training batches.
        held: images ``[N, ...]`` and labels ``[N]`` to score on.
        activation_bits, lr, images: of the fine-tuning; ``images`` of the traces.
        float_epochs: of training before it.
    """

    name: str
    net: Callable[[], nn.Module]
    data: DataLoader[Any]
    held: tuple[torch.Tensor, torch.Tensor]
    activation_bits: int
    lr: float
    images: int
    float_epochs: int


def digits() -> Setting:
    """scikit-learn's digits, a quarter held out."""
    found = load_digits()
    x, y = torch.tensor(found.images[:, None] / 16, dtype=torch.float32), torch.tensor(found.target)
    held = torch.arange(len(y)) % 4 == 0
    data = DataLoader(TensorDataset(x[~held], y[~held]), 64, shuffle=True)
    return Setting("Digits", small_network, data, (x[held], y[held]), 4, 0.02, 256, 10)


def cifar10(folder: Path, weights: Path, network: str, images: int) -> Setting:
    """CIFAR-10: a trained compact network, some images of ``train``, all of ``val``."""
    module = ImageFolderDataModule(folder, num_classes=10, augment="shift_flip", memory=True, train_subset=images)
    module.setup("fit")
    batches = list(module.val_dataloader())
    held = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    def net() -> nn.Module:
        made: nn.Module = getattr(models, network)(weights=str(weights))
        return made

    name = f"{network} on CIFAR-10, {images:,} training images"
    return Setting(name, net, module.train_dataloader(), held, 8, 0.01, 128, 0)


def small_network() -> nn.Module:
    """Four convolutions and a linear layer."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if before in (16, 32) and after == before else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


class Classifier(LightningModule):
    """A network, and SGD with a cosine schedule."""

    def __init__(self, net: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.net, self.lr, self.steps = net, lr, steps

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """SGD."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps), "interval": "step",
            },
        }  # fmt: skip


def fit(module: LightningModule, data: DataLoader[Any], epochs: int, callbacks: list[Callback], folder: str) -> None:
    Trainer(
        max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, accelerator="cpu",
    ).fit(module, data)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder with train/<class>/ and val/<class>/; none: digits")
    parser.add_argument("--weights", type=Path, help="state dict of the network, with --data")
    parser.add_argument("--network", default="mobilenet_cifar", help="with --data")
    parser.add_argument("--images", type=int, default=2000, help="training images, with --data")
    asked = parser.parse_args()
    if (asked.data is None) != (asked.weights is None):
        parser.error("--data and --weights go together")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    setting = digits() if asked.data is None else cifar10(asked.data, asked.weights, asked.network, asked.images)
    stem = RESULTS / ("adjust_precision" if asked.data is None else f"adjust_precision_{asked.network}")
    kept = stem.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if asked.data is not None and kept.is_file() else []
    for seed in range(asked.seeds):
        seed_everything(seed, verbose=False)
        start = Classifier(setting.net(), 0.1, 10 * len(setting.data))
        with tempfile.TemporaryDirectory() as folder:
            if setting.float_epochs:
                fit(start, setting.data, setting.float_epochs, [], folder)
            for method in METHODS:
                if not any(r["seed"] == seed and r["method"] == method for r in rows):
                    rows.append({"seed": seed, "method": method, **one(setting, start, seed, method, asked.epochs)})
                    print(rows[-1], flush=True)
                    RESULTS.mkdir(exist_ok=True)
                    kept.write_text(json.dumps(rows, indent=1) + "\n")
                    stem.with_suffix(".md").write_text(table(rows, setting, asked))
    print(table(rows, setting, asked))


def one(setting: Setting, start: Classifier, seed: int, method: str, epochs: int) -> dict[str, Any]:
    """Fine-tune a copy of ``start`` and score it."""
    seed_everything(seed, verbose=False)
    model = Classifier(setting.net(), setting.lr, epochs * len(setting.data))
    model.load_state_dict(start.state_dict())
    budget = f"{END}x" if method == "one plan" else "4x"
    measure = MeasureConfig(images=setting.images, rtol=0.1)
    hawq = HAWQ((2, 3, 4, 6, 8), setting.activation_bits, budget, measure=measure, progress=False)
    adjust = [AdjustPrecision(END, every=1, until=0.5)] if method == "adjusted" else []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fit(model, setting.data, epochs, [hawq, *adjust], folder)
    seconds, (accuracy, loss) = time.perf_counter() - began, score(model.net, setting.held)
    return {
        "accuracy": accuracy, "loss": loss, "w_comp": hawq.plan.costs["w_comp"], "seconds": seconds,
        "float": score(start.net, setting.held)[0], "moved": [h["moved"] for h in adjust[0].history] if adjust else [],
        "bits": dict(hawq.plan.bits),
    }  # fmt: skip


@torch.no_grad()
def score(net: nn.Module, held: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Accuracy, 0 to 1, and mean loss."""
    net.eval()
    out = torch.cat([net(x) for x in held[0].split(500)])
    return float((out.argmax(1) == held[1]).float().mean()), float(F.cross_entropy(out, held[1]))


def table(rows: list[dict[str, Any]], setting: Setting, asked: argparse.Namespace) -> str:
    """The page."""
    seeds = len({r["seed"] for r in rows})
    more = "" if asked.data is None else f" --epochs {asked.epochs} --data DATA --weights {asked.weights.name}"
    lines = [
        "# Precision adjusted through training", "",
        f"{setting.name}, 12x smaller weights of 2 to 8 bits, {setting.activation_bits}-bit activations, "
        f"{asked.epochs} epochs of fine-tuning, {seeds} seeds (mean and standard deviation); "
        f"`python benchmarks/adjust_precision.py{more}`.", "",
        "| method | accuracy, held out | loss, held out | W-Comp | seconds |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for method in METHODS:
        mine = [r for r in rows if r["method"] == method]
        if mine:
            right, loss = ([r[k] for r in mine] for k in ("accuracy", "loss"))
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in (right, loss)]
            lines.append(
                f"| {method} | {statistics.mean(right):.2%} ± {spread[0]:.2%} | {statistics.mean(loss):.4f} ± "
                f"{spread[1]:.4f} | {statistics.mean(r['w_comp'] for r in mine):.2f} | "
                f"{statistics.mean(r['seconds'] for r in mine):.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
