"""Small transformers: float training, then HAWQ at four bits a weight; and what the traces of ``auto`` are worth there.

    python recipes/small_transformers/train.py [--nets vit gpt2] [--seeds 1 2 3]

For every network and seed: an ordinary Trainer trains it; the traces are measured and every site is quantized alone at
2, 3, 4 and 8 bits, its KL to the float network on held-out batches beside what Omega predicts (rank correlation);
another Trainer with one added callback fine-tunes it at 8x. Stopped, the same command goes on. Written to
OUT: result.json, result.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nets import EPOCHS, NETS, Classifier
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from hawq_lightning import HAWQ, MeasureConfig, SelectConfig, candidates, measure, save_packed, sites
from hawq_lightning.quantization import loss_per_site

BITS = (2, 3, 4, 6, 8)
RATES = {"vit": (1e-3, 3e-4), "gpt2": (3e-3, 1e-3)}  # peaks of float training and of fine-tuning
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                         "enable_model_summary": False}  # fmt: skip


def run(net: str, seed: int, budget: str, out: Path) -> dict[str, Any]:
    """One network with one seed: all figures of it."""
    pl.seed_everything(seed, verbose=False)
    module, data = NETS[net]()
    (float_epochs, epochs), (rate, low) = EPOCHS[net], RATES[net]
    task, weights = Classifier(module, rate), out / f"{net}-{seed}.pt"
    trainer = pl.Trainer(max_epochs=float_epochs, **QUIET)
    if weights.is_file():
        task.load_state_dict(torch.load(weights, weights_only=True))
    else:
        trainer.fit(task, data)
        torch.save(task.state_dict(), weights)
    found: dict[str, Any] = {"float": trainer.validate(task, data, verbose=False)[0]["accuracy"]}

    task.eval()
    held_out = [b for b, _ in zip(data.val_dataloader(), range(4))]
    found |= worth(task, [b for b, _ in zip(data.train_dataloader(), range(8))], held_out, seed)

    task.lr = low
    hawq = HAWQ(
        BITS, 8, measure=MeasureConfig(seed=seed), select=SelectConfig(budget), dirpath=out / f"{net}-{seed}",
        progress=False,
    )  # fmt: skip
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[hawq], **QUIET)
    trainer.fit(task, data)
    found["fine_tuned"] = float(trainer.callback_metrics["accuracy"])
    found["mean_bits"] = hawq.plan.costs["mean_weight_bits"]
    found["bytes"] = save_packed(task, hawq.plan, out / f"{net}-{seed}" / "model.safetensors")
    found["float_bytes"] = sum(p.numel() * 4 for p in task.parameters())
    return found


def worth(task: Classifier, batches: list[Any], held_out: list[Any], seed: int) -> dict[str, Any]:
    """What ``auto`` chose, its cost in training steps, and its ranks against measured KL of single sites."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())

    def divergence(model: nn.Module, batch: Any) -> Tensor:
        return F.kl_div(model(batch[0]).log_softmax(-1), batch[1], reduction="none", log_target=True).sum(-1).mean()

    began = time.process_time()
    sensitivity = measure(task, batches, loss, config=MeasureConfig(seed=seed), progress=False)
    seconds = time.process_time() - began
    began = time.process_time()
    loss(task, batches[0]).backward()
    step = time.process_time() - began
    task.zero_grad()
    table = sites(task, batches[0][0])
    options = candidates(task, batches, sensitivity, table, loss, weight_bits=(2, 3, 4), activation_bits=(4, 8))
    with torch.no_grad():
        outputs = [(x, task(x).log_softmax(-1)) for x, _ in held_out]
    rows = loss_per_site(task, outputs, divergence, table, options)
    found: dict[str, Any] = {
        "estimator": sensitivity.settings["estimator"], "notes": list(sensitivity.notes),
        "steps": seconds / (step * len(batches)),
    }  # fmt: skip
    for kind, bits in (("weight", 2), ("weight", 3), ("weight", 4), ("activation", 4), ("activation", 8)):
        part = [r for r in rows if r["kind"] == kind and r["bits"] == bits]
        ranks = spearmanr([r["predicted"] for r in part], [r["measured"] for r in part])
        found[f"{kind} {bits}"] = float(ranks.statistic)
    return found


HEADER = (
    "network", "float", "fine-tuned", "difference, by seed", "mean bits", "bytes", "estimator", "cost of measuring",
    "rank correlation: weights 2, 3, 4 bits", "activations 4, 8 bits",
)  # fmt: skip


def table(found: dict[str, dict[str, Any]]) -> str:
    """The figures of all networks as Markdown: means over seeds, with each seed's difference in accuracy."""
    rows = [HEADER, ("---",) * len(HEADER)]
    for net in NETS:
        runs = [r for key, r in found.items() if key.startswith(f"{net} ")]
        if not runs:
            continue

        def mean(key: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.mean(r[key] for r in runs)

        rows.append((
            net, f"{100 * mean('float'):.2f}%", f"{100 * mean('fine_tuned'):.2f}%",
            ", ".join(f"{100 * (r['fine_tuned'] - r['float']):+.2f}" for r in runs), f"{mean('mean_bits'):.2f}",
            f"{mean('bytes'):,.0f} of {mean('float_bytes'):,.0f}", ", ".join(sorted({r["estimator"] for r in runs})),
            f"{mean('steps'):.1f} training steps a batch",
            ", ".join(f"{mean(f'weight {b}'):.2f}" for b in (2, 3, 4)),
            ", ".join(f"{mean(f'activation {b}'):.2f}" for b in (4, 8)),
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(r) + " |" for r in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--budget", default="8x")
    parser.add_argument("--out", type=Path, default=Path("runs/small_transformers"))
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "result.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for seed in args.seeds:
        for net in args.nets:
            if (key := f"{net} {seed}") not in found:
                found[key] = run(net, seed, args.budget, args.out)
                file.write_text(json.dumps(found, indent=1), encoding="utf-8")
                print(key, json.dumps(found[key]), flush=True)
    (args.out / "result.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
