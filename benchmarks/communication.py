"""Gradients in few bits between two processes: bytes sent and loss after equal steps, against torch's own hooks.

    python benchmarks/communication.py [--steps 300] [--seeds 3]

Two gloo processes on one machine train a small convolutional network on scikit-learn's digits, 32 images each a step,
from one and the same start (20 float steps by one process, after which the traces are measured). Every method takes the
same batches. Bytes are those of the tensors that a process hands to ``torch.distributed``, the 5 float steps of the
warm-up excluded, over those of float32. torch's quantization hooks send one byte a value; PowerSGD is of rank 1, 2 and
4. *Uniform* is ours with one width for all; *by trace* chooses among 1, 2, 4 and 8 bits under a budget.

Results: benchmarks/results/communication.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from torch.multiprocessing import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hawq_lightning as hl
from hawq_lightning.callbacks import GradientCompression, compressed_gradients

RESULTS = Path(__file__).resolve().parent / "results"
WARMUP = 5
Setup = Callable[[DistributedDataParallel, dict[str, float]], None]


class Counter:
    """Bytes that are handed to the collectives."""

    def __init__(self) -> None:
        self.bytes = 0
        for name in ("all_reduce", "all_gather"):
            setattr(dist, name, self._counted(getattr(dist, name), name == "all_gather"))

    def _counted(self, function: Callable[..., Any], gathers: bool) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.bytes += args[1 if gathers else 0].nbytes
            return function(*args, **kwargs)

        return counted


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def ours(budget: float, error_feedback: bool = True) -> Setup:
    def setup(ddp: DistributedDataParallel, traces: dict[str, float]) -> None:
        state = GradientCompression(ddp, traces, budget, warmup=WARMUP, error_feedback=error_feedback)
        ddp.register_comm_hook(state, compressed_gradients)

    return setup


def uniform(bits: int) -> Setup:
    def setup(ddp: DistributedDataParallel, traces: dict[str, float]) -> None:
        state = GradientCompression(ddp, traces, 1.0, [bits], WARMUP)
        ddp.register_comm_hook(state, compressed_gradients)

    return setup


def power(rank: int) -> Setup:
    def setup(ddp: DistributedDataParallel, traces: dict[str, float]) -> None:
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=WARMUP + 1, min_compression_rate=1
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    return setup


METHODS: dict[str, Setup] = {
    "float32 (all-reduce)": lambda ddp, traces: ddp.register_comm_hook(None, default_hooks.allreduce_hook),
    "float16 (torch)": lambda ddp, traces: ddp.register_comm_hook(None, default_hooks.fp16_compress_hook),
    "8 bits a tensor (torch)": lambda ddp, traces: ddp.register_comm_hook(
        None, quantization_hooks.quantization_pertensor_hook
    ),
    "8 bits a channel (torch)": lambda ddp, traces: ddp.register_comm_hook(
        None, quantization_hooks.quantization_perchannel_hook
    ),
    "PowerSGD, rank 4": power(4), "PowerSGD, rank 2": power(2), "PowerSGD, rank 1": power(1),
    "uniform 4 bits": uniform(4), "uniform 2 bits": uniform(2), "uniform 1 bit": uniform(1),
    "by trace, 8x": ours(8), "by trace, 12x": ours(12), "by trace, 16x": ours(16), "by trace, 20x": ours(20),
    "by trace, 12x, no error feedback": ours(12, False),
}  # fmt: skip


def work(rank: int, folder: str, steps: int, seeds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    digits, counter = load_digits(), Counter()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    held = torch.arange(len(labels)) % 4 == 0
    x, y, test = images[~held], labels[~held], (images[held], labels[held])
    rows = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        start = net()
        optimizer = torch.optim.SGD(start.parameters(), 0.05, momentum=0.9)
        for _ in range(20):
            some = torch.randint(len(y), (64,))
            optimizer.zero_grad()
            loss_fn(start, (x[some], y[some])).backward()
            optimizer.step()
        measured = hl.measure(start.eval(), [(x[:512], y[:512])], loss_fn, progress=False)
        traces = {t.name: t.mean_trace for t in measured if t.kind == "weight"}
        order = torch.randint(len(y), (steps, 64))
        for name, setup in METHODS.items():
            torch.manual_seed(seed)
            model = net()
            model.load_state_dict(start.state_dict())
            ddp = DistributedDataParallel(model)
            try:
                setup(ddp, traces)
                optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
                for step, some in enumerate(order):
                    if step == WARMUP:
                        counter.bytes = 0
                    mine = some[32 * rank : 32 * (rank + 1)]
                    optimizer.zero_grad()
                    loss_fn(ddp, (x[mine], y[mine])).backward()
                    optimizer.step()
            except Exception as error:  # a hook that gloo or the CPU cannot run
                rows.append({"method": name, "seed": seed, "error": _reason(error)})
                continue
            with torch.no_grad():
                right = (model(test[0]).argmax(1) == test[1]).float().mean()
                rows.append({
                    "method": name, "seed": seed, "bytes": counter.bytes, "loss": float(loss_fn(model, (x, y))),
                    "accuracy": float(right),
                })  # fmt: skip
            if rank == 0:
                print(rows[-1], flush=True)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _reason(error: Exception) -> str:
    """The innermost error's name and sentence, without paths."""
    found = re.findall(r"\w+Error: [^\n(]*", f"{type(error).__name__}: {error}")
    return found[-1].rpartition("callback: ")[2].partition(". ")[0].strip()


def table(rows: list[dict[str, Any]], steps: int, seeds: int) -> str:
    whole = {r["seed"]: r["bytes"] for r in rows if r["method"].startswith("float32")}
    lines = [
        "# Gradients between two processes", "",
        f"Two gloo processes, digits, {steps} steps of 2 x 32 images, seeds: {seeds} (mean and standard deviation); "
        f"`python benchmarks/communication.py --steps {steps} --seeds {seeds}`. Bytes as handed to the collective, "
        "over float32's, after warm-up.", "",
        "| method | bytes, x smaller | train loss | test accuracy |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for name in METHODS:
        mine = [r for r in rows if r["method"] == name]
        if any("error" in r for r in mine):
            lines.append(f"| {name} | does not run here: {next(r['error'] for r in mine if 'error' in r)} | | |")
            continue
        ratio = statistics.mean(whole[r["seed"]] / r["bytes"] for r in mine)
        loss, right = ([r[k] for r in mine] for k in ("loss", "accuracy"))
        spread = [f" ± {statistics.stdev(v):.4f}" if len(v) > 1 else "" for v in (loss, right)]
        lines.append(
            f"| {name} | {ratio:.2f} | {statistics.mean(loss):.4f}{spread[0]} | "
            f"{statistics.mean(right):.4f}{spread[1]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (folder, asked.steps, asked.seeds), nprocs=2)
        rows = json.loads(Path(folder, "rows.json").read_text())
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "communication.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "communication.md").write_text(table(rows, asked.steps, asked.seeds))
    print(table(rows, asked.steps, asked.seeds))


if __name__ == "__main__":
    main()
