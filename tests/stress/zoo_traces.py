"""Traces of small versions of the zoo's families against dense Gauss-Newton matrices and Hessians, in float64.

    python -m tests.stress.zoo_traces [NAME ...] [--out FOLDER]

All columns of the Gauss-Newton matrix (``estimator="exact"``), of every weight and activation, must be those of
``J^T H J`` with the dense Jacobian of the outputs and the dense Hessian of the loss in them. Hutchinson's probes of the
true Hessian must lie within their standard errors of its dense trace. Both matrices come from plain autograd. Written
to FOLDER (tests/stress): zoo_traces.json, zoo_traces.md.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from hawq_lightning import HawqError, Site, SiteTable, measure, sites
from hawq_lightning.quantization import quantizable_layers
from hawq_lightning.sensitivity import InputHooks
from tests.stress.zoo_small import SMALL, Small

PROBES = 48
SEVERAL = 4  # other seeds for a site that seems to miss, since a lone miss may be chance


def one(name: str) -> dict[str, Any]:
    """A member's traces beside its dense matrices.

    Returns:
        ``family``, ``parameters``, ``weights`` and ``activations`` (sites), ``outputs`` (numbers); ``gauss_newton``:
        the largest difference of a trace to the dense one, as a share of it; ``hessian``: the largest difference in
        standard errors; ``apart``: how far the two matrices' traces are apart, as a share of the Hessian's;
        ``auto``: what ``estimator="auto"`` takes.
    """
    member = SMALL[name]
    torch.manual_seed(0)
    net, batch = member.make().double().eval(), as_doubles(member.batch())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def loss_fn(model: nn.Module, given: Any) -> Tensor:
        return member.loss(member.run(model, given), given)

    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        table = sites(net, batch, forward=member.run)
        with patch.object(F, "embedding_bag", bags):  # fused kernels have no second derivative
            truth = {s.name: dense(member, net, batch, table, s) for s in table}
        how: dict[str, Any] = {"sites": table, "l1_curvature": "zero", "progress": False}
        exact = measure(net, [batch], loss_fn, estimator="exact", **how)
        auto = measure(net, [batch], loss_fn, estimator="auto", max_probes=2, rtol=9.0, **how)
        errors = hessian_errors(net, batch, loss_fn, how, {n: true for n, (_, true) in truth.items()})
    largest = max(abs(t) for t, _ in truth.values())
    outputs = member.run(net, batch)
    return {
        "family": member.family,
        "parameters": sum(p.numel() for p in net.parameters()),
        "weights": len(table.weights),
        "activations": len(table.activations),
        "outputs": sum(o.numel() for o in outputs),
        "gauss_newton": max(
            abs(r.trace - truth[r.name][0]) / max(abs(truth[r.name][0]), 1e-9 * largest) for r in exact
        ),
        "hessian": max(errors.values()) if isinstance(errors, dict) else errors,
        "apart": sum(abs(g - h) for g, h in truth.values()) / max(1e-300, sum(abs(h) for _, h in truth.values())),
        "auto": str(auto.settings["estimator"]),
    }


def hessian_errors(
    net: nn.Module, batch: Any, loss_fn: Any, how: dict[str, Any], truth: dict[str, float]
) -> dict[str, float] | str:
    """Standard errors that probes are off at each site, or the sentence where the loss has no second derivative."""
    try:
        probed = [hutchinson(net, batch, loss_fn, how, 0)]
        errors = {name: in_errors(probed, name, right) for name, right in truth.items()}
        if max(errors.values()) > 4:
            probed += [hutchinson(net, batch, loss_fn, how, seed) for seed in range(1, SEVERAL + 1)]
            errors = {name: in_errors(probed, name, right) for name, right in truth.items()}
    except HawqError as error:
        return str(error)
    return errors


def bags(ids: Tensor, weight: Tensor, *_: Any, mode: str = "", **__: Any) -> Tensor:
    """``F.embedding_bag`` of bags of one length, by operations that can be differentiated twice."""
    rows = weight[ids]
    return rows.sum(1) if "sum" in (mode, *_) else rows.mean(1)


def hutchinson(net: nn.Module, batch: Any, loss_fn: Any, how: dict[str, Any], seed: int) -> Any:
    """Traces of the true Hessian by so many probes."""
    return measure(net, [batch], loss_fn, estimator="hutchinson", max_probes=PROBES, rtol=1e-6, seed=seed, **how)


def in_errors(measured: Sequence[Any], site: str, right: float) -> float:
    """How many standard errors the mean of measurements is from the right trace; 0 where both are 0."""
    rows = [m[site] for m in measured]
    difference = abs(sum(r.trace for r in rows) / len(rows) - right)
    error = sum(r.stderr**2 for r in rows) ** 0.5 / len(rows)
    return 0.0 if difference <= 1e-8 * abs(right) + 1e-12 else float(difference / max(error, 1e-300))


def as_doubles(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floats as float64, indices as they are."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch)


# ---- dense curvature, by plain autograd ----


def dense(member: Small, net: nn.Module, batch: Any, table: SiteTable, site: Site) -> tuple[float, float]:
    """Traces of the Gauss-Newton matrix and of the Hessian at a site."""
    points, outputs = points_of(lambda: member.run(net, batch), net, table, site)
    flat = torch.cat([o.reshape(-1) for o in outputs])
    leaf = flat.detach().requires_grad_()
    pieces = [p.reshape(o.shape) for p, o in zip(leaf.split([o.numel() for o in outputs]), outputs)]
    (slope,) = torch.autograd.grad(member.loss(pieces, batch), leaf, create_graph=True)
    hessian = rows_of(slope, [leaf]) if slope.requires_grad else torch.zeros(len(leaf), len(leaf), dtype=leaf.dtype)
    jacobian = rows_of(flat, points)
    gauss_newton = float((jacobian * (hessian @ jacobian)).sum())
    slopes = torch.autograd.grad(member.loss(outputs, batch), points, create_graph=True, materialize_grads=True)
    true = 0.0
    for point, slope in zip(points, slopes):
        if slope.requires_grad:
            true += float(rows_of(slope.reshape(-1), [point]).diagonal().sum())
    return gauss_newton, true


def points_of(
    run: Callable[[], Sequence[Tensor]], net: nn.Module, table: SiteTable, site: Site
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """The tensors that a site is, and the outputs that come of them: the weight, or zeros added to what is read."""
    layers = quantizable_layers(net)[0]
    if site.kind == "weight":
        reader = layers[site.layers[0]]
        if not reader.recomputed:
            return [reader.weight], run()
        run()
        leaf = reader.weight.detach().clone().requires_grad_()
        maker = reader.module.parametrizations["weight"]  # type: ignore[index]
        assert parametrize.is_parametrized(reader.module, "weight")
        maker.__dict__["forward"] = lambda: leaf
        try:
            return [leaf], run()
        finally:
            del maker.__dict__["forward"]
    shifts: list[Tensor] = []

    def visit(name: str, x: Tensor) -> Tensor:
        if name != site.name:
            return x
        shifts.append(torch.zeros_like(x, requires_grad=True))
        return x + shifts[-1]

    with InputHooks(layers, {x.name: x.activation for x in table.layers if x.activation}, visit):
        return shifts, run()


def rows_of(values: Tensor, points: list[Tensor]) -> Tensor:
    """Derivatives of a vector by all points, ``[values, elements]``."""
    rows = []
    for i in range(len(values)):
        each = torch.autograd.grad(values[i], points, retain_graph=True, materialize_grads=True, allow_unused=True)
        rows.append(torch.cat([g.reshape(-1) for g in each]))
    return torch.stack(rows)


# ---- the page ----


def page(found: dict[str, dict[str, Any]]) -> str:
    """All members as a Markdown table."""
    done = [r for r in found.values() if "failed" not in r]
    sites_in_all = sum(r["weights"] + r["activations"] for r in done)
    lines = [
        "# Traces of small versions against dense matrices", "",
        "Written by `python -m tests.stress.zoo_traces` (part of `make stress`), in float64. *Gauss-Newton*: all "
        "columns (`estimator=\"exact\"`) against `J^T H J` of the dense Jacobian, the largest difference of a site as "
        f"a share of its trace. *Hessian*: {PROBES} probes of `hutchinson` against the dense Hessian, the largest "
        "difference of a site in standard errors (of some ten sites the largest of ten draws: 1.5 to 3 is what chance "
        "gives). *Apart*: how far the two dense traces are apart, over all sites.", "",
        f"{len(done)} of {len(found)} networks, {sites_in_all} sites: Gauss-Newton traces differ by "
        f"{max((r['gauss_newton'] for r in done), default=0):.0e} at most.", "",
        "| family | network | parameters | weights | activations | outputs | Gauss-Newton | Hessian | apart | auto |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    for name, r in found.items():
        if "failed" in r:
            lines.append(f"| {r['family']} | {name} | | | | | {r['failed']} | | | |")
            continue
        hessian = f"{r['hessian']:.1f}" if isinstance(r["hessian"], float) else r["hessian"]
        lines.append(
            f"| {r['family']} | {name} | {r['parameters']:,} | {r['weights']} | {r['activations']} | {r['outputs']} | "
            f"{r['gauss_newton']:.0e} | {hessian} | {r['apart']:.0%} | {r['auto']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", help="members to run again; all that have no result when not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of results")
    args = parser.parse_args()
    file = args.out / "zoo_traces.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in args.names or [n for n in SMALL if n not in found or "failed" in found[n]]:
        began = time.perf_counter()
        try:
            found[name] = one(name)
        except Exception as error:  # the table tells it
            failed = f"{type(error).__name__}: {str(error).strip()[:300]}".replace("\n", " ")
            found[name] = {"family": SMALL[name].family, "failed": failed}
        found = {n: found[n] for n in SMALL if n in found}
        print(f"{name} ({time.perf_counter() - began:.0f} s): {found[name]}", flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (args.out / "zoo_traces.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
