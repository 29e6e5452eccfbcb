"""Traces and a fine-tuning step on 1 and 2 processes (gloo, one thread each), and a model of 8 and 64 GPUs on paper.

    python benchmarks/scaling.py [--images 64] [--batch 16] [--steps 6] [--rounds 3]

ResNet20 on random 32 x 32 images. Traces: the same images whatever the number of processes, each process takes every
n-th batch, and tables are added up after each round; what a process spends in that addition is communication (waiting
for the slower one included). Fine-tuning step: DistributedDataParallel at W4A8, ``--batch`` images a process;
communication is the step's time beyond that of the same step under ``no_sync()``. Runs take turns; the median of
``--rounds`` is shown. On paper: the times of a step and a probe come from the tables that ``training_step.py`` and
``traces_full_size.py`` write on a GPU, where these are there, and are assumed otherwise; the table says which.
Results: benchmarks/results/scaling.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn
from torch.nn import functional as F

RESULTS = Path(__file__).resolve().parent / "results"
# the model on paper: a ring all-reduce of S bytes on N GPUs takes 2 (N-1)/N S / bandwidth + 2 (N-1) latency
GPUS = {
    "8 in one machine (NVLink, 200 GB/s, 5 us)": (8, 200e9, 5e-6),
    "64 in eight machines (InfiniBand, 25 GB/s, 15 us)": (64, 25e9, 15e-6),
}
STEP_SECONDS = 0.12  # assumed: ResNet50, 64 images of 224 x 224 a GPU, fake-quantized, one way there and back
PROBE_SECONDS = 0.25  # assumed: one probe of a batch of 64, a forward and two backward passes
PARAMETERS, SITES, IMAGES, BATCH, PROBES = 25.6e6, 108, 1024, 64, 16


def measured(folder: Path = RESULTS) -> dict[str, tuple[float, str]]:
    """``step`` and ``probe``: seconds, and where they come from."""
    found = {"step": (STEP_SECONDS, "assumed"), "probe": (PROBE_SECONDS, "assumed")}
    for precision in ("", "_tf32", "_bf16"):  # what people train in comes last
        file = folder / f"training_step_cuda{precision}.json"
        if file.is_file():
            record = json.loads(file.read_text())
            seconds = record["networks"].get("resnet50", {}).get("uniform", {}).get("seconds")
            if seconds:
                found["step"] = statistics.median(seconds), f"measured, {file.name}, {record['cpu']}"
        file = folder / f"traces_full_size_cuda{precision}.json"
        if file.is_file() and not precision:  # traces are measured in float32
            record = json.loads(file.read_text())
            part = record["networks"].get("resnet50", {"methods": {}, "setting": [0]})
            seconds = part["methods"].get("ours", {}).get("probe_seconds")
            if seconds:
                each = seconds * BATCH / part["setting"][0]
                found["probe"] = each, f"measured, {file.name}, {record['machine']}"
    return found


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def network() -> nn.Module:
    from hawq_lightning.models import resnet20

    torch.manual_seed(0)
    return resnet20()


def traces(rank: int, world: int, args: argparse.Namespace) -> dict[str, float]:
    from hawq_lightning import measure
    from hawq_lightning.sensitivity import ProcessShard

    g = torch.Generator().manual_seed(1)
    data = [
        (torch.randn(args.batch, 3, 32, 32, generator=g), torch.randint(0, 10, (args.batch,), generator=g))
        for _ in range(args.images // args.batch)
    ]
    spent, sent = 0.0, 0

    def all_reduce_sum(table: torch.Tensor) -> torch.Tensor:
        nonlocal spent, sent
        began = time.perf_counter()
        dist.all_reduce(table)
        spent, sent = spent + time.perf_counter() - began, sent + table.numel() * table.element_size()
        return table

    model = network().eval()
    dist.barrier()
    began = time.perf_counter()
    measure(
        model, data, loss_fn, estimator="ggn", rtol=1e-9, max_probes=args.probes, progress=False,
        shard=ProcessShard(rank, world, all_reduce_sum if world > 1 else None),
    )  # fmt: skip
    return {"seconds": time.perf_counter() - began, "communication": spent, "bytes": float(sent)}


def steps(rank: int, world: int, args: argparse.Namespace) -> dict[str, float]:
    import hawq_lightning as hl

    g = torch.Generator().manual_seed(2 + rank)
    batch = torch.randn(args.batch, 3, 32, 32, generator=g), torch.randint(0, 10, (args.batch,), generator=g)
    model = network().eval()
    table = hl.sites(model, batch)
    example = [batch]
    given = hl.measure(model, example, loss_fn, estimator="ggn", rtol=9.0, max_probes=2, progress=False)
    choices = hl.candidates(model, example, given, table, loss_fn, weight_bits=(4,), activation_bits=(8,))
    hl.quantize(model, hl.select(hl.Problem(table, choices, given), budget="8x"))
    wrapped = nn.parallel.DistributedDataParallel(model.train())
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        loss_fn(wrapped, batch).backward()
        optimizer.step()
        return time.perf_counter() - began

    synced, alone = [], []
    for _ in range(args.steps + 1):
        dist.barrier()
        synced.append(step())
        dist.barrier()
        with wrapped.no_sync():
            alone.append(step())
    own = statistics.median(synced[1:])
    return {"seconds": own, "communication": max(0.0, own - statistics.median(alone[1:])),
            "bytes": float(sum(4 * p.numel() for p in model.parameters()))}  # fmt: skip


def process(rank: int, world: int, port: int, args: argparse.Namespace, out: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {"traces": traces(rank, world, args), "step": steps(rank, world, args)}
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def run(world: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = RESULTS / f".scaling-{os.getpid()}.json"
    spawn(process, (world, port, args, str(out)), nprocs=world)
    found = json.loads(out.read_text())
    out.unlink()
    return found


def on_paper(inputs: dict[str, tuple[float, str]]) -> list[dict[str, Any]]:
    """ResNet50 with the seconds of :func:`measured`; nothing is overlapped, which is the worst case."""
    rows = []
    (step_seconds, _), (probe_seconds, _) = inputs["step"], inputs["probe"]
    batches, rounds = IMAGES // BATCH, PROBES // 2
    table = 3 * 8.0 * IMAGES * SITES  # mean, spread and size: a float64 a site and image, added once a round
    one = batches * PROBES * probe_seconds
    for name, (n, bandwidth, latency) in GPUS.items():
        ring = {s: 2 * (n - 1) / n * s / bandwidth + 2 * (n - 1) * latency for s in (table, 4 * PARAMETERS)}
        own, added = -(-batches // n) * PROBES * probe_seconds, rounds * ring[table]
        step = step_seconds + ring[4 * PARAMETERS]
        rows.append({
            "gpus": name, "traces_seconds": own + added, "traces_speedup": one / (own + added),
            "traces_communication": added / (own + added), "step_seconds": step,
            "step_efficiency": step_seconds / step, "step_communication": ring[4 * PARAMETERS] / step,
        })  # fmt: skip
    return rows


def markdown(found: dict[str, Any]) -> str:
    (step, step_from), (probe, probe_from) = found["inputs"]["step"], found["inputs"]["probe"]
    lines = [
        "# Traces and fine-tuning on several processes", "",
        f"`python benchmarks/scaling.py`, {found['machine']}; load before the runs {found['load']}; "
        f"nice {found['nice']}. ResNet20, random images; medians of {found['rounds']} (range).", "",
        "| | processes | seconds | in communication | bytes sent |", "|---|---|---|---|---|",
    ]  # fmt: skip
    label = {"traces": f"traces, {found['images']} images", "step": f"fine-tuning step, {found['batch']} images each"}
    for what in ("traces", "step"):
        for world, row in found[what].items():
            low, high = row["range"]
            lines.append(
                f"| {label[what]} | {world} | {row['seconds']:.3g} ({low:.3g} to {high:.3g}) | "
                f"{row['communication'] / row['seconds']:.1%} | {row['bytes']:,.0f} |"
            )
    lines += [
        "", "Two processes share two cores that other work uses as well: the share in communication includes waiting "
        "for the slower process.", "",
        "## On paper: ResNet50 on GPUs", "",
        "An all-reduce of S bytes over N GPUs in a ring takes 2 (N-1)/N S / bandwidth + 2 (N-1) latency, and overlaps "
        "with nothing. Traces: T(N) = ceil(batches / N) probes t_probe + rounds allreduce(24 bytes x images x sites), "
        f"with {IMAGES} images in batches of {BATCH}, {SITES} sites, {PROBES} probes a batch in {PROBES // 2} rounds "
        f"and t_probe = {probe:.3g} s ({probe_from}). Step: T(N) = t_step + allreduce(4 bytes x {PARAMETERS:.3g} "
        "parameters), "
        f"with t_step = {step:.3g} s ({step_from}) for {BATCH} images a GPU. The bandwidths and the latencies are "
        "assumptions.", "",
        "| GPUs | traces | speed-up over one | in communication | step | efficiency | in communication |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in found["on_paper"]:
        lines.append(
            f"| {row['gpus']} | {row['traces_seconds']:.2f} s | {row['traces_speedup']:.1f}x | "
            f"{row['traces_communication']:.2%} | {row['step_seconds'] * 1e3:.1f} ms | {row['step_efficiency']:.1%} | "
            f"{row['step_communication']:.1%} |"
        )
    lines += ["", f"With {IMAGES // BATCH} batches no more than {IMAGES // BATCH} processes have work: for 64 GPUs use "
              "smaller batches or more images.", ""]  # fmt: skip
    return "\n".join(lines)


def write(found: dict[str, Any]) -> None:
    (RESULTS / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "scaling.md").write_text(markdown(found))
    print(markdown(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("images", 64), ("batch", 16), ("probes", 8), ("steps", 6), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--paper-only", action="store_true", help="keep what was run, and reckon anew")
    args = parser.parse_args()
    if args.paper_only:
        kept = json.loads((RESULTS / "scaling.json").read_text())
        write(kept | {"inputs": measured(), "on_paper": on_paper(measured())})
        return
    RESULTS.mkdir(exist_ok=True)
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    runs = [(world, run(world, args)) for _ in range(args.rounds) for world in (1, 2)]
    found: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "paper_only"} | {
        "machine": f"{os.cpu_count()} cores, torch {torch.__version__}, {platform.machine()}",
        "load": load, "nice": os.nice(0), "inputs": measured(), "on_paper": on_paper(measured()),
    }  # fmt: skip
    for what in ("traces", "step"):
        found[what] = {}
        for world in (1, 2):
            mine = sorted((r[what] for w, r in runs if w == world), key=lambda r: r["seconds"])
            middle = mine[len(mine) // 2]
            found[what][str(world)] = middle | {"range": [mine[0]["seconds"], mine[-1]["seconds"]]}
    write(found)


if __name__ == "__main__":
    main()
