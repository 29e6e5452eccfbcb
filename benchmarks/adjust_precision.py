"""Precision adjusted through training against one plan at the start: accuracy at equal epochs and equal size.

    python benchmarks/adjust_precision.py [--epochs 8] [--seeds 3]

A small convolutional network is trained in float on scikit-learn's digits, and then fine-tuned for equal epochs at 12
times smaller weights of 2 to 8 bits and 4-bit activations: with one plan made at the start (HAWQ-V2), or from 4x
narrowing to 12x over the first half, traces measured again in every epoch of it
(:class:`hawq_lightning.callbacks.AdjustPrecision`).

Results: benchmarks/results/adjust_precision.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning import HAWQ, MeasureConfig
from hawq_lightning.callbacks import AdjustPrecision

RESULTS = Path(__file__).resolve().parent / "results"
END = 12


class Digits(LightningModule):
    """The network, and SGD with a cosine schedule."""

    def __init__(self, lr: float, steps: int) -> None:
        super().__init__()
        self.lr, self.steps = lr, steps
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if before in (16, 32) and after == before else []
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))

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
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    digits = load_digits()
    x, y = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
    held = torch.arange(len(y)) % 4 == 0
    rows: list[dict[str, Any]] = []
    for seed in range(asked.seeds):
        seed_everything(seed, verbose=False)
        data = DataLoader(TensorDataset(x[~held], y[~held]), 64, shuffle=True)
        start = Digits(0.1, 10 * len(data))
        with tempfile.TemporaryDirectory() as folder:
            fit(start, data, 10, [], folder)
            for method in ("one plan", "adjusted"):
                seed_everything(seed, verbose=False)
                model = Digits(0.02, asked.epochs * len(data))
                model.load_state_dict(start.state_dict())
                budget = f"{END}x" if method == "one plan" else "4x"
                hawq = HAWQ((2, 3, 4, 6, 8), 4, budget, measure=MeasureConfig(images=256, rtol=0.1), progress=False)
                adjust = [AdjustPrecision(END, every=1, until=0.5)] if method == "adjusted" else []
                began = time.perf_counter()
                fit(model, data, asked.epochs, [hawq, *adjust], f"{folder}/{method}")
                model.eval()
                with torch.no_grad():
                    out = model.net(x[held])
                    float_right = (start.eval().net(x[held]).argmax(1) == y[held]).float().mean()
                rows.append({
                    "seed": seed, "method": method, "accuracy": float((out.argmax(1) == y[held]).float().mean()),
                    "loss": float(F.cross_entropy(out, y[held])), "w_comp": hawq.plan.costs["w_comp"],
                    "seconds": time.perf_counter() - began, "float": float(float_right),
                    "moved": [h["moved"] for h in adjust[0].history] if adjust else [], "bits": dict(hawq.plan.bits),
                })  # fmt: skip
                print(rows[-1], flush=True)
                RESULTS.mkdir(exist_ok=True)
                (RESULTS / "adjust_precision.json").write_text(json.dumps(rows, indent=1) + "\n")
                (RESULTS / "adjust_precision.md").write_text(table(rows, asked.epochs))
    print(table(rows, asked.epochs))


def table(rows: list[dict[str, Any]], epochs: int) -> str:
    seeds = len({r["seed"] for r in rows})
    lines = [
        "# Precision adjusted through training", "",
        f"Digits, 12x smaller weights of 2 to 8 bits, 4-bit activations, {epochs} epochs of fine-tuning, {seeds} seeds "
        "(mean and standard deviation); `python benchmarks/adjust_precision.py`.", "",
        "| method | accuracy, held out | loss, held out | W-Comp | seconds |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for method in ("one plan", "adjusted"):
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
