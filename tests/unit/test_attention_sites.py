"""Queries, keys, probabilities and values as activation sites, in attention that is written in every way."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning import HawqError, MeasureConfig, Plan, QuantizerConfig
from hawq_lightning.export import load_packed, save_packed
from hawq_lightning.layers import OPERANDS, AttentionProducts, makes_attention
from hawq_lightning.quantization import candidates, enabled_bits, plan_of, rounding_errors
from hawq_lightning.selection import COSTS, Problem, select

WIDTH, HEADS, POSITIONS = 8, 2, 3
Batch = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """Projections, and the two products that a subclass makes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values ``[N, heads, positions, width]``."""
        parts = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return [*parts.unbind()]

    def merged(self, y: torch.Tensor) -> torch.Tensor:
        """The output of heads ``[N, heads, positions, width]``."""
        out: torch.Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class Fused(Attention):
    """By ``F.scaled_dot_product_attention``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[N, positions, width]``."""
        return self.merged(F.scaled_dot_product_attention(*self.heads(x)))


class ByOperator(Attention):
    """By ``@``, a module's softmax and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax, self.drop = nn.Softmax(-1), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[N, positions, width]``."""
        q, k, v = self.heads(x)
        return self.merged(self.drop(self.softmax(q @ k.mT * 0.5)) @ v)


class ByEinsum(Attention):
    """By ``einsum``, values first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[N, positions, width]``."""
        q, k, v = self.heads(x)
        p = torch.einsum("nhqd,nhkd->nhqk", q, k).softmax(-1)
        return self.merged(torch.einsum("nhkd,nhqk->nhqd", v, p))


class ByBmm(Attention):
    """By ``baddbmm`` and ``bmm``, heads and samples in one axis, in a function of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[N, positions, width]``."""
        return self.merged(_attend(*self.heads(x)))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    shape = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    bias = q.new_zeros(len(q), POSITIONS, POSITIONS)
    return torch.bmm(torch.baddbmm(bias, q, k.mT).softmax(-1), v).view(shape)


class Torch(nn.Module):
    """By ``nn.MultiheadAttention``, which hides its products."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[N, positions, width]``."""
        y: torch.Tensor = self.inner(x, x, x, need_weights=False)[0]
        return y


class Net(nn.Module):
    """An attention and a classifier."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.head = attention, nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        y: torch.Tensor = self.head(self.attention(x).mean(1))
        return y


WAYS = [Fused, ByOperator, ByEinsum, ByBmm, Torch]


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def network(way: Callable[[], nn.Module]) -> Net:
    torch.manual_seed(0)
    return Net(way()).eval()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, POSITIONS, WIDTH, generator=generator), torch.tensor([0, 1, 1, 0])


def planned(
    net: nn.Module, batch: Batch, bits: tuple[int, ...] = (4, 8), budget: object = "6x"
) -> tuple[Plan, Problem]:
    table = hl.sites(net, batch[0], attention=True)
    traces = hl.measure(net, [batch], loss_fn, sites=table, config=MeasureConfig(estimator="exact"), progress=False)
    choices = candidates(net, [batch], traces, table, loss_fn, config=QuantizerConfig(activation_bits=(4, 8)))
    problem = Problem(table, choices, traces)
    return select(problem, budget), problem


def operand_sites(net: nn.Module, batch: Batch) -> dict[str, hl.Site]:
    table = hl.sites(net, batch[0], attention=True)
    return {s.layers[0].rpartition(":")[2]: s for s in table.activations if ":" in s.name}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_attention_has_four_sites_and_two_products(way, batch: Batch) -> None:
    net = network(way)
    table = hl.sites(net, batch[0], attention=True)
    assert {*operand_sites(net, batch)} == {*OPERANDS}
    each = HEADS * POSITIONS * POSITIONS * (WIDTH // HEADS)
    assert [p.macs for p in table.products] == [each, each]
    assert table.macs_share == 1.0
    without = hl.sites(net, batch[0])
    assert not without.products and without.macs_share is not None and without.macs_share < 1
    assert [s for s in table if ":" not in s.name] == [*without]


@pytest.mark.parametrize("way", WAYS)
def test_traces_and_forms_are_those_of_the_dense_gauss_newton_matrix(way, batch: Batch) -> None:
    net = network(way)
    table = hl.sites(net, batch[0], attention=True)
    sites = operand_sites(net, batch)
    rounding = rounding_errors(net, candidates(net, [batch], None, table, loss_fn, activation_bits=3), table)
    traces = hl.measure(
        net, [batch], loss_fn, sites=table, config=MeasureConfig(estimator="exact"), rounding=rounding, progress=False
    )
    with torch.no_grad():
        w = net.head.weight
        p = net(batch[0]).softmax(-1)
        q, k, v = _heads(net, batch[0])

    def logits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor | None = None) -> torch.Tensor:
        p = (q @ k.mT * (WIDTH // HEADS) ** -0.5 * _scale(net)).softmax(-1) if p is None else p
        y = (p @ v).transpose(1, 2).flatten(2)
        out = net.attention.inner.out_proj if isinstance(net.attention, Torch) else net.attention.proj
        return F.linear(out(y).mean(1), w, net.head.bias)

    soft = (q @ k.mT * (WIDTH // HEADS) ** -0.5 * _scale(net)).softmax(-1)
    exact = {}
    for i, (name, x) in enumerate({"query": q, "key": k, "value": v, "probabilities": soft}.items()):

        def of(x: torch.Tensor, n: int, i: int = i) -> torch.Tensor:
            given = [q[n : n + 1], k[n : n + 1], v[n : n + 1], soft[n : n + 1] if i == 3 else None]
            given[i] = x
            return logits(*given)[0]  # type: ignore[arg-type]

        total = form = 0.0
        (error,) = rounding.activations[sites[name].name](x)
        for n in range(len(x)):
            jacobian = torch.autograd.functional.jacobian(lambda x, n=n: of(x, n), x[n : n + 1]).flatten(1)
            hessian = torch.diag(p[n]) - torch.outer(p[n], p[n])
            total += float((jacobian.T @ hessian @ jacobian).trace()) / len(x)
            moved = jacobian @ error[n].flatten()
            form += float(moved @ hessian @ moved) / len(x)
        exact[name] = total, form
    for name, (value, form) in exact.items():
        assert traces[sites[name].name].trace == pytest.approx(value, rel=1e-4), name
        assert traces.forms[sites[name].name][0].value == pytest.approx(form, rel=1e-3), name


def _heads(net: Net, x: torch.Tensor) -> list[torch.Tensor]:
    if isinstance(net.attention, Attention):
        return net.attention.heads(x)
    inner = net.attention.inner
    parts = F.linear(x, inner.in_proj_weight, inner.in_proj_bias).unflatten(-1, (3, HEADS, -1))
    return [*parts.permute(2, 0, 3, 1, 4).unbind()]


def _scale(net: Net) -> float:
    """How often a way's scores are those of fused attention."""
    root = (WIDTH // HEADS) ** 0.5
    return {ByOperator: 0.5 * root, ByEinsum: root, ByBmm: root}.get(type(net.attention), 1.0)


@pytest.mark.parametrize("way", WAYS)
def test_enabled_quantizers_act_at_the_products_and_come_back_from_files(way, batch: Batch, tmp_path: Path) -> None:
    net = network(way)
    plan, _ = planned(net, batch)
    assert Plan.from_dict(plan.to_dict()) == plan
    before = net(batch[0])
    hl.quantize(net, plan)
    assert {n for n in enabled_bits(net) if ":" in n} == {s.name for s in plan.activations if ":" in s.name}
    quantized = net(batch[0])
    only = plan.replace(sites=tuple(s for s in plan.sites if ":" not in s.name), products=())
    other = hl.quantize(network(way), only)(batch[0])
    assert not torch.equal(quantized, other) and not torch.equal(quantized, before)
    assert plan_of(net).bits.items() >= {s.name: s.bits for s in plan.activations if ":" in s.name}.items()
    assert torch.equal(copy.deepcopy(net)(batch[0]), quantized)
    net.train()
    loss_fn(net, batch).backward()
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    save_packed(net, plan, tmp_path / "net.safetensors")
    again = load_packed(tmp_path / "net.safetensors", network(way))
    assert torch.equal(again(batch[0]), quantized)
    hl.unquantize(net)
    assert torch.equal(net(batch[0]), before) and not any(":" in n for n in enabled_bits(net))
    assert net.state_dict().keys() == network(way).state_dict().keys()


def test_products_count_in_bit_operations_at_the_bits_of_both_factors(batch: Batch) -> None:
    plan, problem = planned(network(Fused), batch, budget={"bops": "60%"})
    bits = plan.bits
    products = sum(p.macs * bits[str(p.left)] * bits[str(p.right)] for p in plan.products)
    layers = sum(x.macs * bits[x.weight] * bits[str(x.activation)] for x in plan.layers)
    assert plan.costs["bops"] == products + layers
    assert plan.costs["macs"] == sum(x.macs for x in (*plan.layers, *plan.products))
    many = select(problem, {"bops": "60%", "act": "5bit"})  # by the integer program
    assert many.costs["bops"] <= 0.6 * many.costs["bops_8bit"]


def test_the_exact_frontier_of_coupled_factors_is_that_of_brute_force(batch: Batch) -> None:
    _, problem = planned(network(Fused), batch)
    (row,) = COSTS["bops"].rows(problem)
    bound = 0.7 * COSTS["bops"].eight_bit(problem)
    every = itertools.product(*(range(len(g.bits)) for g in problem.groups))
    best = min(problem.score_of(c) for c in every if row(c) <= bound)
    assert select(problem, {"bops": bound}).omega == pytest.approx(best)


def test_a_masked_causal_grouped_call_is_as_torch_has_it() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 1, 5, 5) > 0.5
    mask[0, 0, 0] = False
    for form in (
        {}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": torch.randn(5, 5)}, {"scale": 0.3},
    ):  # fmt: skip
        want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **form)
        with AttentionProducts(lambda _, x: x):
            have = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **form)
        torch.testing.assert_close(have, want)


def test_single_operands_can_be_left_out(batch: Batch) -> None:
    net = network(Fused)
    table = hl.sites(net, batch[0], attention=True, exclude=["*:probabilities", "*:value"])
    assert [s.name for s in table.activations if ":" in s.name] == ["attention:query.input", "attention:key.input"]
    assert [p.name for p in table.products] == ["attention:scores"]
    with pytest.raises(HawqError, match="activation_bits"):
        QuantizerConfig(attention=True, activation_bits=None)


def test_products_that_are_no_attention_stay_what_they_are() -> None:
    class Interaction(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x, x.mT)

    assert not makes_attention(Interaction()) and not makes_attention(nn.Linear(2, 2))


@pytest.mark.stress
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_network_gives_the_same(way, batch: Batch) -> None:
    net = network(way)
    plan, _ = planned(net, batch)
    hl.quantize(net, plan)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(net)(batch[0]), net(batch[0]))
