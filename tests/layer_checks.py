"""What holds for the layers of every kind: traces, quantized passes, training, files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hawq_lightning import Plan, SiteTable, candidates, load_packed, measure, quantize, save_packed, select
from hawq_lightning.layers import kind_of
from hawq_lightning.quantization import enabled_bits, plan_of, unquantize
from hawq_lightning.selection import Problem
from hawq_lightning.sensitivity import find_sites
from tests.cases import LossFn, dense_activation_traces, dense_weight_traces


def table_of(net: nn.Module, batch: Any, loss: LossFn) -> SiteTable:
    """Sites of a batch whose first part has the samples first."""
    return find_sites(net, lambda: loss(net, batch), len(batch[-1]))


def check_traces(
    net: nn.Module, batch: Any, loss: LossFn, *, exact: Sequence[str] = (), estimator: str = "hessian"
) -> SiteTable:
    """Traces of every site against dense Hessians in float64.

    Args:
        net: in float64 and evaluation mode.
        batch: its last part has an entry a sample.
        loss: of both.
        exact: beginnings of names whose Gauss-Newton part is all, so that ``estimator="exact"`` must agree.
        estimator: an unbiased one for the other sites.

    Returns:
        the sites.
    """
    before = {k: v.clone() for k, v in net.state_dict().items()}
    table = table_of(net, batch, loss)
    with sdpa_kernel(SDPBackend.MATH), _differentiable_bags(net):  # fused kernels have no second derivative
        truth = dense_weight_traces(net, batch, loss, table) | dense_activation_traces(net, batch, loss, table)
    for r in measure(net, [batch], loss, sites=table, estimator="exact", progress=False):
        if r.name.startswith(tuple(exact)):
            assert r.trace == pytest.approx(truth[r.name], rel=1e-7, abs=1e-10), r.name
    rest = measure(net, [batch], loss, sites=table, estimator=estimator, rtol=0.2, max_probes=64, progress=False)
    for r in rest:
        assert abs(r.trace - truth[r.name]) <= 4.5 * r.stderr + 1e-7 * abs(truth[r.name]) + 1e-12, (r, truth[r.name])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    return table


@contextmanager
def _differentiable_bags(net: nn.Module) -> Iterator[None]:
    bags = [m for m in net.modules() if isinstance(m, nn.EmbeddingBag)]
    handles = [kind_of(bag).on_read(bag, "weight", lambda x: x) for bag in bags]
    yield
    for handle in handles:
        handle.remove()


def plan_for(net: nn.Module, batch: Any, loss: LossFn, budget: str = "8x") -> Plan:
    """A plan of a float network, by the usual way."""
    table = table_of(net, batch, loss)
    traces = measure(net, [batch], loss, sites=table, rtol=0.5, progress=False)
    return select(Problem(table, candidates(net, [batch], traces, table, loss), traces), budget=budget)


def check_quantized(
    build: Callable[[], nn.Module], batch: Any, loss: LossFn, tmp_path: Path, *, packs: bool = True
) -> nn.Module:
    """A plan goes in, computes with rounded weights, trains, is copied, pickled, packed and taken out again.

    Args:
        build: makes the float network, always the same.
        batch: in float32; its last part has an entry a sample.
        loss: of both.
        tmp_path: for the file.
        packs: whether a packed file can be made of it.

    Returns:
        the quantized network.
    """
    net = build().eval()
    with torch.no_grad():
        before = loss(net, batch)
    keys = list(net.state_dict())
    plan = plan_for(net, batch, loss)
    plan = Plan.from_dict(plan.to_dict())
    quantize(net, plan)
    bits = enabled_bits(net)
    assert {s.name: s.bits for s in plan.sites}.items() <= bits.items()
    assert {s.name for s in plan_of(net).weights} == {s.name for s in plan.weights}
    with torch.no_grad():
        quantized = loss(net, batch)
    assert not torch.equal(quantized, before)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.no_grad():
            assert torch.equal(loss(again, batch), quantized)
    if packs:
        save_packed(net, plan, tmp_path / "net")
        other = load_packed(tmp_path / "net", build().eval())
        with torch.no_grad():
            assert torch.equal(loss(other, batch), quantized)
    step = copy.deepcopy(net).train()
    weights = {s.name: dict(step.named_parameters(remove_duplicate=False))[s.name] for s in plan.weights}
    start = {n: w.detach().clone() for n, w in weights.items()}
    loss(step, batch).backward()
    torch.optim.SGD(step.parameters(), 0.1).step()
    assert [n for n, w in weights.items() if torch.equal(w, start[n])] == []
    restored = unquantize(copy.deepcopy(net))
    with torch.no_grad():
        assert torch.equal(loss(restored, batch), before) and list(restored.state_dict()) == keys
    return net
