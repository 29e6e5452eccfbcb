"""Numbers do not depend on torch's default type: Lightning sets it while ``configure_model`` and steps run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import candidates, forecast, measure, quantize, save_packed, select, sites
from hawq_lightning.quantization import quantizer_names
from hawq_lightning.selection import Problem


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def net_of(dtype: torch.dtype) -> nn.Module:
    """The same weights whatever the default."""
    made = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(0)
    for name, p in made.named_parameters():
        value = torch.randn(p.shape, generator=generator, dtype=torch.float32) / 4
        made.get_submodule(name.split(".")[0]).register_parameter(name.split(".")[1], nn.Parameter(value.to(dtype)))
    return made.eval()


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def everything(name: str, dtype: torch.dtype, file: Path) -> dict[str, Any]:
    """Of one quantizer: traces, forms' forecasts, the plan, what the network computes, its gradients, and its file."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float32), torch.arange(16) % 3
    batch = (x.to(dtype), labels)
    net = net_of(dtype)
    table = sites(net, batch, forward=loss_of)
    traces = measure(net, [batch], loss_of, sites=table, estimator="hutchinson", max_probes=8, progress=False)
    listed = candidates(
        net, [batch], traces, table, loss_of, quantizer=name, weight_bits=(2, 4), activation_bits=(4, 8)
    )
    ahead = forecast(net, [batch], loss_of, table, listed)
    plan = select(Problem(table, listed, traces), budget="9x").replace(quantizer=name)
    quantize(net, plan)
    net.train()
    loss = loss_of(net, batch)
    loss.backward()
    tensors = {n: t for n, t in (*net.named_parameters(), *net.named_buffers()) if "quantizer" in n}
    out = {
        "traces": [(r.name, r.trace) for r in traces], "forecast": dict(ahead.shares), "plan": plan.bits,
        "loss": float(loss.detach()),
        "grads": {n: p.grad.double().sum().item() for n, p in net.named_parameters() if p.grad is not None},
        "types": {n: t.dtype for n, t in tensors.items()}, "values": {n: t.tolist() for n, t in tensors.items()},
    }  # fmt: skip
    net.zero_grad()
    save_packed(net.eval(), plan, file)
    return out | {"file": sorted((p.name, p.read_bytes()) for p in file.parent.iterdir())}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [n for n in quantizer_names() if not n.startswith("test_")])
def test_every_number_is_the_same_under_any_default(name, weights, tmp_path: Path):
    usual = everything(name, weights, tmp_path / "usual" / "net")
    for default in (torch.bfloat16, torch.float64):
        with default_dtype(default):
            other = everything(name, weights, tmp_path / str(default) / "net")
        for what, value in usual.items():
            assert other[what] == value, (default, what)
    assert {t for t in usual["types"].values() if t.is_floating_point} == {torch.float32}
