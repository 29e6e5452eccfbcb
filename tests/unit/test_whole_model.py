"""Figures of compression say of what, and are those of the packed file; what stays float is told once, with reasons."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hawq_lightning as hl
from hawq_lightning import HAWQ, HawqError, MeasureConfig, Plan, QuantizerConfig, save_packed, sites
from tests.internals import internal
from tests.trainers import CLASSES, FEATURES, Classifier, trainer

stays_float = internal("_stays_float").stays_float
shares = internal("_shares")


class Table(nn.Module):
    """Most bytes are a parameter that no layer owns."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, FEATURES))
        self.body, self.head = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x + self.table[: len(x)])))


class Distances(nn.Module):
    """Squared distances to learned centres: a layer of nobody's."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(count, FEATURES)), nn.Parameter(torch.zeros(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, None] - self.weight).square().mean(-1) + self.bias


class Centres(nn.Module):
    """Most bytes are a layer of a type that is not known."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.near = Distances(count)
        self.left, self.head = nn.Linear(count, 4), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.left(self.near(x))))


class Buffers(nn.Module):
    """Most bytes are a buffer, and a layer that nothing calls."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("memory", torch.randn(rows, FEATURES))
        self.register_buffer("scratch", torch.randn(999, 9), persistent=False)
        self.spare = nn.Linear(FEATURES, rows)
        self.body, self.norm, self.head = nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        near = torch.softmax(x @ self.memory.t(), 1) @ self.memory
        return self.head(torch.relu(self.norm(self.body(near))))


NETS = {
    "table": (lambda: Table(300), ("table", "Table is no known kind of layer")),
    "layer": (lambda: Centres(40), ("near.weight", "Distances is no known kind of layer")),
    "buffer": (lambda: Buffers(200), ("memory", "a buffer", "spare.weight", "not called in the forward pass")),
}


class Task(Classifier):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def fitted(folder: Path, net: nn.Module, **settings: object) -> tuple[HAWQ, Task]:
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, FEATURES, generator=g), torch.randint(0, CLASSES, (32,), generator=g))
    hawq = HAWQ(measure=MeasureConfig(images=16, rtol=0.9, max_probes=4), progress=False, **settings)
    task = Task(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder, hawq, max_epochs=1).fit(task, DataLoader(data, 8))
    return hawq, task


def data_bytes(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    raw = path.read_bytes()
    return len(raw) - 8 - struct.unpack("<Q", raw[:8])[0]


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("budget", [{"model": "1.02x"}, {"weights": "8x", "model": "1.01x"}])
def test_the_whole_models_bytes_are_the_packed_files(kind, budget, tmp_path):
    torch.manual_seed(0)
    build, _ = NETS[kind]
    hawq, task = fitted(tmp_path, build(), weight_bits=(2, 3, 4, 8), budget=budget)
    costs = hawq.plan.costs
    save_packed(task, hawq.plan, tmp_path / "packed")
    assert costs["model_bytes"] == data_bytes(tmp_path / "packed")
    kept = {n: t for n, t in build().state_dict().items() if t.ndim != 0 or n.endswith("num_batches_tracked")}
    assert costs["float_model_bytes"] == sum(t.numel() * t.element_size() for t in kept.values())
    assert costs["model_comp"] == costs["float_model_bytes"] / costs["model_bytes"] >= float(budget["model"][:-1])
    assert costs["quantized_share"] == costs["float_weight_bytes"] / costs["float_model_bytes"] < 0.6
    again = Plan.from_dict(json.loads(json.dumps(hawq.plan.to_dict())))
    recosted = hl.selection.recost(again).costs
    assert {k: recosted[k] for k in costs if "model" in k} == {k: costs[k] for k in costs if "model" in k}


@pytest.mark.parametrize("kind", NETS)
def test_what_stays_float_is_told_once_with_names_sizes_and_reasons(kind, tmp_path):
    torch.manual_seed(0)
    build, expected = NETS[kind]
    task, hawq = Task(build()), HAWQ((2, 8), budget="6x", measure=MeasureConfig(images=16, rtol=0.9), progress=False)
    data = TensorDataset(torch.randn(16, FEATURES), torch.randint(0, CLASSES, (16,)))
    with pytest.warns(UserWarning) as caught:
        trainer(tmp_path, hawq, max_epochs=1).fit(task, DataLoader(data, 8))
    (said,) = [str(w.message) for w in caught if "stays float" in str(w.message)]
    assert all(f in said for f in expected), said
    assert f"net.{expected[0]} (" in said and "KiB" in said and "% of the bytes of its weights" in said
    assert "bias" not in said and "running" not in said
    assert hawq.plan.settings["stays_float"] in said


@pytest.mark.parametrize(("exclude", "named"), [("body", "excluded"), (nn.Linear, ""), (None, "")])
def test_reasons_are_the_users_own_where_layers_are_excluded(exclude, named):
    net = nn.ModuleDict({"body": nn.Linear(40, 40), "head": nn.Conv1d(40, 3, 1)})
    net.forward = lambda x: net["head"](net["body"](x)[..., None])  # type: ignore[method-assign]
    said = stays_float(sites(net, torch.randn(4, 40), exclude=exclude))
    assert bool(said) == (exclude is not None)
    if exclude is not None:
        assert "body.weight (6.2 KiB; excluded)" in said and "93% of the multiply-accumulates" in said


@pytest.mark.parametrize(("share", "of_bytes"), [(3, False), (5, True)])
def test_a_tenth_may_stay_float(share, of_bytes):
    net = nn.Sequential(nn.Linear(40, 40))
    net.register_parameter("extra", nn.Parameter(torch.zeros(40, share)))
    assert bool(stays_float(sites(net, torch.randn(4, 40)))) == of_bytes


@pytest.mark.parametrize(
    ("budget", "says"),
    [({"model": "50x"}, "x."), ({"model": "1kB"}, "KiB"), ({"model": "50x", "weights": "4x"}, "model: 50x")],
)
def test_an_impossible_budget_says_the_nearest_that_is_possible(budget, says, tmp_path):
    torch.manual_seed(0)
    with pytest.raises(HawqError, match="cannot be met: the smallest plan is") as caught:
        fitted(tmp_path, Table(300), weight_bits=(2, 8), budget=budget)
    assert says in str(caught.value)
    nearest = str(caught.value).split("smallest plan is ")[1].split(";")[0].rstrip(".")
    size, times = nearest.split(" = ")
    for possible in (size, times):
        hawq, _ = fitted(tmp_path, Table(300), weight_bits=(2, 8), budget={"model": possible})
        assert {s.bits for s in hawq.plan.weights} == {2}


def test_a_budget_of_the_model_needs_the_models_bytes():
    problem = hl.Problem.from_arrays(["a"], (2, 8), [[1.0, 0.1]], [100])
    with pytest.raises(HawqError, match="needs the bytes that stay float"):
        hl.select(problem, {"model": "3x"})
    assert "model_bytes" not in hl.select(problem, "4x").costs
    with pytest.raises(HawqError, match=r"model_bytes use for example .*nearest: '6x'"):
        hl.select(problem, {"model": "50%"})


def test_functions_alone_choose_by_the_model():
    torch.manual_seed(0)
    net, batch = Table(100), torch.randn(8, FEATURES)
    loss_fn = lambda m, b: nn.functional.cross_entropy(m(b), torch.arange(8) % CLASSES)  # noqa: E731
    table = sites(net, batch)
    config = QuantizerConfig(weight_bits=(2, 4, 8))
    traces = hl.measure(net, [batch], loss_fn, config=MeasureConfig(images=8, rtol=0.9), sites=table, progress=False)
    choices = hl.candidates(net, [batch], traces, table, loss_fn, config=config)
    plan = hl.select(hl.Problem(table, choices, traces), {"model": "1.15x"})
    assert plan.costs["model_comp"] >= 1.15 > hl.select(hl.Problem(table, choices, traces), "4x").costs["model_comp"]


@pytest.mark.parametrize(
    ("share", "text"), [(0.92, "92%"), (0.9997, "99.97%"), (0.003, "0.3%"), (0.0, "0%"), (1.0, "100%"), (1e-7, "1e-07")]
)
def test_shares_are_not_rounded_away(share, text):
    assert shares.percent(share) == text


def test_compressions_say_of_what():
    known = {"float_weight_bytes": 800.0, "weight_bytes": 100.0}
    assert shares.compression_text(known) == "8.0x of the quantized weights" and shares.compression_text({}) == ""
    whole = known | {"float_model_bytes": 1000.0, "model_bytes": 310.0}
    assert shares.compression_text(whole) == "8.0x of the quantized 80%, 3.2x of all"


def test_the_table_of_sites_ends_with_what_is_quantized():
    last = str(sites(Table(100), torch.randn(8, FEATURES))).splitlines()[-1]
    assert last.startswith("(all quantized)") and "17%" in last and "100%" in last and last.endswith("included")
