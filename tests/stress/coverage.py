"""Do standard errors mean what they say? 95% intervals against exact traces, over many networks, losses and seeds.

``python -m tests.stress.coverage NETWORKS SEEDS`` prints, for every estimator and for few and many outputs, the share
of intervals that hold the exact trace, and every trace that is said to be exact and is not. Each network is measured
with many seeds, so that a cell's figure does not hang on one lucky network.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import warnings
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, measure, sites

ESTIMATORS = ("ggn", "hutchinson", "hessian")
EXACT = 1e-7  # relative difference of what is said to be exact


def network(rng: random.Random, outputs: int, smooth: bool) -> nn.Module:
    torch.manual_seed(rng.randrange(1 << 30))
    act = nn.Tanh if smooth else nn.ReLU
    return nn.Sequential(nn.Linear(3, 4), act(), nn.Linear(4, 4), act(), nn.Linear(4, outputs)).double()


def cross_entropy(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(o, torch.arange(len(o)) % o.shape[1])


def squared(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(o, y)


def of_the_sum(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Outputs enter by their sum: a quadratic form in signs that is 0 or 1 for most of them."""
    return o.sum(1).square().mean() + 0.01 * o.square().mean()


def coupled(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(o, y) + o.mean().square()


def one_counts(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """All but one image are nearly flat: few noisy rows."""
    w = torch.full((len(o), 1), 1e-3, dtype=o.dtype)
    w[0] = 1.0
    return (w * (o - y).square()).mean()


LOSSES = (cross_entropy, squared, of_the_sum, coupled, one_counts)


def cases(count: int, few: bool) -> list[tuple[random.Random, int, int, Any, bool]]:
    """(generator, images, outputs, loss, smooth) of every network."""
    out = []
    for i in range(count):
        rng = random.Random(f"{few} {i}")
        images, outputs = (rng.randint(1, 4), rng.randint(1, 3)) if few else (rng.randint(6, 24), rng.randint(3, 6))
        loss = rng.choice([f for f in LOSSES if outputs > 1 or f is not cross_entropy])
        out.append((rng, images, outputs, loss, rng.random() < 0.5))
    return out


def exact_traces(model: nn.Module, batch: Any, loss_fn: Any, table: Any, estimator: str) -> dict[str, float] | None:
    """What an estimator's mean is: of ``ggn`` all columns, of the others all entries of the Hessian's diagonal."""
    if estimator == "ggn":
        try:
            measured = measure(model, [batch], loss_fn, sites=table, estimator="exact", progress=False)
        except HawqError:
            return None  # no curvature at all
        return {r.name: r.trace for r in measured}
    return {site.name: _hessian_trace(model, batch, loss_fn, site) for site in table}


def _hessian_trace(model: nn.Module, batch: Any, loss_fn: Any, site: Any) -> float:
    layer = model.get_submodule(site.layers[0])
    point: torch.Tensor = layer.weight
    if site.kind == "activation":
        point = torch.zeros(len(batch[0]), layer.in_features, dtype=torch.float64, requires_grad=True)
        handle = layer.register_forward_pre_hook(lambda m, args: (args[0] + point,))
    loss = loss_fn(model, batch)
    if site.kind == "activation":
        handle.remove()
    (slope,) = torch.autograd.grad(loss, point, create_graph=True)
    if not slope.requires_grad:
        return 0.0
    rows = [torch.autograd.grad(v, point, retain_graph=True)[0].reshape(-1) for v in slope.reshape(-1)]
    return float(torch.stack(rows).diagonal().sum())


def run(networks: int, seeds: int, few: bool) -> dict[str, Any]:
    """Coverage of one cell: few (1 to 4 images, 1 to 3 outputs) or many outputs."""
    hits: dict[str, Counter[str]] = defaultdict(Counter)
    false_zeros: list[str] = []
    for number, (rng, images, outputs, loss, smooth) in enumerate(cases(networks, few)):
        model = network(rng, outputs, smooth)
        batch = torch.randn(images, 3, dtype=torch.float64), torch.randn(images, outputs, dtype=torch.float64)
        loss_fn = lambda m, b, loss=loss: loss(m(b[0]), b[1])  # noqa: E731
        table = sites(model, batch)
        for estimator in ESTIMATORS:
            right = exact_traces(model, batch, loss_fn, table, estimator)
            if right is None or not any(right.values()):
                continue
            size = max(map(abs, right.values()))
            for seed in range(seeds):
                try:
                    measured = measure(
                        model, [batch], loss_fn, sites=table, estimator=estimator, rtol=rng.choice([0.05, 0.1, 0.3]),
                        max_probes=64, seed=seed, progress=False,
                    )  # fmt: skip
                except HawqError as error:
                    if "no curvature" not in str(error):
                        raise
                    continue
                for r in measured:
                    off = abs(r.trace - right[r.name])
                    if r.stderr <= 1e-9 * size:
                        hits[estimator]["said to be exact"] += 1
                        if off > EXACT * size:
                            false_zeros.append(
                                f"{loss.__name__} {images}x{outputs} {estimator} seed {seed} network {number} "
                                f"{r.name}: {r.trace:.6g} for {right[r.name]:.6g}"
                            )
                        continue
                    hits[estimator]["intervals"] += 1
                    hits[estimator]["hold"] += off <= 1.96 * r.stderr
    cells = {
        name: {
            "intervals": c["intervals"],
            "coverage": round(c["hold"] / c["intervals"], 4) if c["intervals"] else math.nan,
            "said to be exact": c["said to be exact"],
        }
        for name, c in hits.items()
    }  # fmt: skip
    return {"few": few, "networks": networks, "seeds": seeds, "cells": cells, "not exact": false_zeros}


def main(arguments: list[str] | None = None) -> int:
    """``python -m tests.stress.coverage NETWORKS SEEDS``; 1 where an interval is too short or a zero is false."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("networks", type=int)
    parser.add_argument("seeds", type=int)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bad = False
    for few in (True, False):
        result = run(given.networks, given.seeds, few)
        print(json.dumps(result, indent=1), flush=True)
        covers = [c["coverage"] for c in result["cells"].values() if c["intervals"] >= 100]
        bad |= bool(result["not exact"]) or any(not 0.92 <= c <= (1 if few else 0.98) for c in covers)
    return int(bad)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
