"""Bytes, shares and compressions of networks that are not float32: against float32, stored at their own types."""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace

import pytest
import torch
from torch import nn

import hawq_lightning as hl
from hawq_lightning import HawqError, sites
from hawq_lightning.selection import recost

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS = torch.arange(24) % 100


class Lookup(nn.Module):
    """Half of it stays float: a table whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(100, 8, sparse=True)
        self.left, self.out = nn.Linear(8, 50, bias=False), nn.Linear(50, 8, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.left(self.table(rows)))).float()


def loss(net: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(net(rows), rows % 8)


@pytest.mark.parametrize("kind", TYPES)
def test_shares_are_those_of_the_same_network_in_float32(kind):
    table = sites(Lookup().to(kind), ROWS)
    assert table.quantized_share == 0.5
    assert sum(r["bytes_share"] for r in table.rows() if r["quantized"]) == pytest.approx(0.5)
    assert table.float_bytes == 800 * kind.itemsize
    assert table.float_rest == 3200
    (line,) = [x for x in str(table).splitlines() if x.startswith("table")]
    assert " 800 " in line


@pytest.mark.parametrize(("rest", "weights"), list(itertools.product(TYPES, TYPES)))
def test_a_network_of_two_types_has_one_share(rest, weights):
    net = Lookup()
    net.table.to(rest)
    net.left.to(weights), net.out.to(weights)
    table = sites(net, ROWS, forward=lambda m, b: m.out(torch.relu(m.left(m.table(b).to(weights)))))
    assert table.quantized_share == 0.5
    assert table.float_bytes == 800 * rest.itemsize


def planned(net: nn.Module, budget: object) -> hl.Plan:
    table = sites(net, ROWS)
    traces = hl.measure(net, [ROWS], loss, sites=table, progress=False, rtol=0.9)
    found = hl.candidates(net, [ROWS], traces, table, loss, activation_bits=None)
    return hl.select(hl.Problem(table, found, traces), budget)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_the_whole_models_bytes_are_the_files_and_its_compression_is_against_float32(kind, tmp_path):
    net = Lookup().to(kind)
    plan = planned(net, "8x")
    hl.quantize(net, plan)
    hl.save_packed(net, plan, tmp_path / "packed")
    raw = (tmp_path / "packed").read_bytes()
    costs = plan.costs
    assert costs["model_bytes"] == len(raw) - 8 - struct.unpack("<Q", raw[:8])[0]
    assert costs["kept_bytes"] == 800 * kind.itemsize
    assert costs["float_model_bytes"] == 6400
    assert costs["model_comp"] == 6400 / costs["model_bytes"]
    assert costs["quantized_share"] == 0.5
    again = recost(hl.Plan.from_dict(plan.to_dict())).costs
    assert {k: v for k, v in again.items() if "model" in k or k == "kept_bytes"} == {
        k: v for k, v in costs.items() if "model" in k or k == "kept_bytes"
    }


def test_a_plan_of_an_earlier_release_is_costed_as_it_was():
    plan = planned(Lookup(), "8x")
    old = plan.replace(costs={k: v for k, v in plan.costs.items() if k != "kept_bytes"})
    assert recost(old).costs["model_bytes"] == plan.costs["model_bytes"]


def test_a_budget_of_a_narrow_model_counts_what_its_type_saves():
    with pytest.raises(HawqError, match="cannot be met"):
        planned(Lookup(), {"model": "2.5x"})
    assert planned(Lookup().bfloat16(), {"model": "2.5x"}).costs["model_comp"] >= 2.5


DENSE = torch.eye(40) * torch.arange(1, 41)


def repeated() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[1, 1, 0], [2, 2, 0]]), torch.ones(3), (40, 40))


HOLDERS = {
    "coo": (lambda: DENSE.to_sparse(), 40 * (4 + 2 * 8), 40 * (4 + 2 * 8)),
    "coo of two types": (lambda: DENSE.to_sparse().bfloat16(), 40 * (2 + 2 * 8), 40 * (4 + 2 * 8)),
    "coo with repetitions": (repeated, 2 * (4 + 2 * 8), 2 * (4 + 2 * 8)),
    "csr": (lambda: DENSE.to_sparse_csr(), 40 * (4 + 8) + 41 * 8, 40 * (4 + 8) + 41 * 8),
    "csc": (lambda: DENSE.double().to_sparse_csc(), 40 * (8 + 8) + 41 * 8, 40 * (4 + 8) + 41 * 8),
    "bsr": (lambda: DENSE.to_sparse_bsr((2, 2)), 20 * (16 + 8) + 21 * 8, 20 * (16 + 8) + 21 * 8),
    "complex": (lambda: torch.zeros(5, dtype=torch.complex128), 80, 40),
    "whole numbers": (lambda: torch.zeros(5, dtype=torch.int64), 40, 40),
    "truth values": (lambda: torch.zeros(5, dtype=torch.bool), 5, 5),
    "8-bit floats": (lambda: torch.zeros(5).to(torch.float8_e4m3fn), 5, 20),
}


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.filterwarnings("ignore:Sparse", "ignore:Detected", "ignore:.*beta state")
def test_a_buffer_counts_what_it_holds(name):
    make, own, wide = HOLDERS[name]
    net = Lookup()
    net.register_buffer("held", make())
    (held,) = [t for t in sites(net, ROWS).float_tensors if t.name == "held"]
    assert (held.bytes, held.float32_bytes) == (own, wide)
    assert sites(net, ROWS).float_rest == 3200 + wide


def test_a_site_table_of_ones_own_needs_no_types():
    table = sites(Lookup(), ROWS)
    known = replace(table, float_tensors=tuple(replace(t, float32_bytes=None) for t in table.float_tensors))
    assert known.quantized_share == table.quantized_share == 0.5
