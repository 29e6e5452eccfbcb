"""Backward hooks that change gradients: training has them, the loss that is measured does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from hawq_lightning import candidates, forecast, measure, sites


class Net(nn.Module):
    """With a hook of its own at what is between its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.between: Callable[[torch.Tensor], torch.Tensor | None] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu()
        if self.between is not None and h.requires_grad:
            h.register_hook(self.between)
        return self.c(self.b(h).tanh())


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def scaled(seen: list[int], grad: torch.Tensor) -> torch.Tensor:
    seen.append(1)
    return grad * 0.1


def in_place(seen: list[int], grad: torch.Tensor) -> None:
    seen.append(1)
    grad.clamp_(-1e-3, 1e-3)


def attach(
    net: Net, where: str, what: Callable[[list[int], torch.Tensor], Any], seen: list[int]
) -> list[RemovableHandle]:
    def of_module(module: nn.Module, grads: Any, *rest: Any) -> Any:
        changed = [None if g is None else what(seen, g) for g in grads]
        return None if what is in_place else tuple(changed)

    if where == "tensor":
        net.between = lambda grad: what(seen, grad)
        return []
    if where == "parameters":
        return [p.register_hook(lambda grad: what(seen, grad)) for p in net.parameters()]
    if where == "module":
        return [net.b.register_full_backward_hook(of_module)]
    if where == "before module":
        return [net.b.register_full_backward_pre_hook(of_module)]
    if where == "old":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [net.b.register_backward_hook(of_module)]
    return [nn.modules.module.register_module_full_backward_hook(of_module)]


WHERE = ["tensor", "parameters", "module", "before module", "old", "global"]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("what", [scaled, in_place], ids=lambda f: f.__name__)
@pytest.mark.parametrize("where", WHERE)
def test_traces_and_forecasts_are_those_of_the_loss(where, what):
    batch = torch.randn(8, 5), torch.arange(8) % 3

    def all_of(net: nn.Module) -> dict[str, Any]:
        table = sites(net, batch, forward=loss_of)
        listed = candidates(net, [batch], None, table, loss_of, weight_bits=(2, 4), activation_bits=(4,))
        found: dict[str, Any] = {
            estimator: [r.trace for r in measure(
                net, [batch], loss_of, sites=table, estimator=estimator, max_probes=8, rtol=0.01, progress=False,
            )]
            for estimator in ("exact", "hutchinson", "hessian", "ggn")
        }  # fmt: skip
        return found | {"forecast": dict(forecast(net, [batch], loss_of, table, listed).shares)}

    truth, net, seen = all_of(Net().eval()), Net().eval(), list[int]()
    handles = attach(net, where, what, seen)
    try:
        hooked = [dict(d) for d in (net.b._backward_hooks, net.b._backward_pre_hooks)]
        assert all_of(net) == truth
        assert seen, "hooks are still called"
        assert hooked == [dict(d) for d in (net.b._backward_hooks, net.b._backward_pre_hooks)]
        loss_of(net, batch).backward()
        with_hooks = [p.grad.clone() for p in net.parameters()]
    finally:
        for handle in handles:
            handle.remove()
    plain = Net().eval()
    loss_of(plain, batch).backward()
    assert not all(torch.equal(g, p.grad) for g, p in zip(with_hooks, plain.parameters())), "training has its hooks"
