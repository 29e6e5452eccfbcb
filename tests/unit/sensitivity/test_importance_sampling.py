"""Images drawn by the curvature at their outputs: the same mean, honest errors, less work; and when it is not done."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, measure
from hawq_lightning.sensitivity import ProcessShard, chunks, find_sites, join, pick, sampling_design
from tests.cases import CASES, ConvNet, build
from tests.console import Program


def sure_net() -> nn.Module:
    """As a trained network: sure of most images, so that few carry the traces."""
    net = copy.deepcopy(build(ConvNet))
    with torch.no_grad():
        net.fc.weight.mul_(200)
        net.fc.bias.mul_(200)
    return net


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    return torch.randn(count, 2, 8, 8, generator=g, dtype=torch.float64), torch.arange(count) % 3


@pytest.fixture(scope="module")
def sure():
    _, loss_fn = CASES["cross_entropy"]
    net = sure_net()
    x, y = images(48)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)]
    table = find_sites(net, lambda: loss_fn(net, batches[0]), 16)
    exact = measure(net, batches, loss_fn, sites=table, estimator="exact", progress=False)
    return net, batches, loss_fn, table, exact


def test_a_trained_network_draws_by_itself_and_saves_work(sure):
    net, batches, loss_fn, table, exact = sure
    keywords = {"sites": table, "max_probes": 200, "progress": False}
    drawn = measure(net, batches, loss_fn, **keywords)
    whole = measure(net, batches, loss_fn, sampling="all", **keywords)
    assert drawn.settings["draw"] == "curvature" and whole.settings["draw"] == "all"
    assert drawn.settings["probes"] < whole.settings["probes"]
    for r in exact:
        for found in (drawn, whole):
            assert abs(found[r.name].trace - r.trace) <= 4 * found[r.name].stderr + 1e-9 * r.trace, r.name


@pytest.mark.parametrize("count", [24, pytest.param(60, marks=pytest.mark.stress)])
def test_drawn_estimates_are_unbiased_for_weights_and_activations(sure, count):
    net, batches, loss_fn, table, exact = sure
    runs = [
        measure(net, batches, loss_fn, sites=table, sampling="curvature", rtol=9.0, seed=s, progress=False)
        for s in range(count)
    ]
    for r in exact:
        for value, told in (("trace", r.trace), ("mean_trace", r.mean_trace)):
            values = torch.tensor([getattr(run[r.name], value) for run in runs], dtype=torch.float64)
            error = float(values.std()) / math.sqrt(len(runs))
            assert abs(float(values.mean()) - told) <= 4 * error + 1e-9 * told, (r.name, value)


@pytest.mark.parametrize(
    ("runs", "least", "band"), [(30, 150, 0.9), pytest.param(100, 500, 0.92, marks=pytest.mark.stress)]
)
def test_intervals_of_drawn_estimates_cover_at_the_stopping_time(sure, runs, least, band):
    net, batches, loss_fn, table, exact = sure
    hits = total = 0
    for seed in range(runs):
        found = measure(
            net,
            batches,
            loss_fn,
            sites=table,
            sampling="curvature",
            rtol=0.1,
            seed=seed,
            max_probes=200,
            progress=False,
        )
        for r in found:
            if exact[r.name].trace and r.stderr > 1e-9 * r.trace:
                hits += abs(r.trace - exact[r.name].trace) <= 1.96 * r.stderr
                total += 1
    assert total > least
    assert band <= hits / total <= 1.9 - band


def test_rows_stand_for_the_same_means(sure):
    net, batches, loss_fn, table, _ = sure
    found = measure(net, batches, loss_fn, sites=table, sampling="curvature", progress=False)
    for r in found:
        rows = torch.tensor(found.rows[r.name], dtype=torch.float64)
        assert len(rows) == 48
        assert float(rows.mean()) == pytest.approx(r.trace, rel=1e-6)


def test_losses_that_couple_images_are_not_drawn_from(sure):
    net, batches, _, table, _ = sure
    weights = torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64)

    def weighted(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], weight=weights)  # divides by the weights of the batch

    found = measure(net, batches, weighted, sites=table, progress=False)
    plain = measure(net, batches, weighted, sites=table, sampling="all", progress=False)
    assert found.settings["draw"] == "all"
    assert [r.trace for r in found] == [r.trace for r in plain]
    with pytest.raises(HawqError, match=r"'curvature' is impossible: the loss of an image depends on the batch"):
        measure(net, batches, weighted, sites=table, sampling="curvature", progress=False)
    with pytest.raises(HawqError, match="whole batches as rows"):
        measure(net, batches, weighted, sites=table, sampling="curvature", estimator="hutchinson", progress=False)
    with pytest.raises(HawqError, match=r"Unknown sampling 'curve'.*curvature"):
        measure(net, batches, weighted, sites=table, sampling="curve", progress=False)


def test_sums_over_images_are_told_from_means(sure):
    net, batches, loss_fn, table, _ = sure

    def total(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    mean = measure(net, batches, loss_fn, sites=table, sampling="curvature", progress=False)
    summed = measure(net, batches, total, sites=table, sampling="curvature", progress=False)
    for a, b in zip(mean, summed):
        assert b.trace == pytest.approx(16 * a.trace, rel=1e-6)


def test_an_interrupted_drawn_measurement_goes_on(sure, tmp_path):
    net, batches, loss_fn, table, _ = sure
    keywords = {"sites": table, "sampling": "curvature", "rtol": 0.05, "progress": False}
    whole = measure(net, batches, loss_fn, **keywords)
    calls = [0]

    def failing(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 24:
            raise KeyboardInterrupt
        return loss_fn(model, batch)

    with pytest.raises(KeyboardInterrupt):
        measure(net, batches, failing, resume=tmp_path / "rows", **keywords)
    assert (tmp_path / "rows").is_file()
    again = measure(net, batches, loss_fn, resume=tmp_path / "rows", **keywords)
    assert [r.trace for r in again] == [r.trace for r in whole]


def _halves() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = images(48)
    return [(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)]


def _coupled_in_one(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A weighted mean, which is a plain one for batches without class 2."""
    return F.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([1.0, 1.0, 5.0], dtype=torch.float64))


def _second_has_class_2() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x, y if i == 1 else y.clamp_max(1)) for i, (x, y) in enumerate(_halves())]


def _one_of_two(rank: int, address: str, folder: str, coupled: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)

    def all_reduce_sum(table: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(table)
        return table

    batches = _second_has_class_2() if coupled else _halves()
    loss_fn = _coupled_in_one if coupled else CASES["cross_entropy"][1]
    sampling = "auto" if coupled else "curvature"
    found = measure(
        sure_net(), batches, loss_fn, sampling=sampling, shard=ProcessShard(rank, 2, all_reduce_sum), progress=False
    )
    found.save(f"{folder}/{rank}.json")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("coupled", [False, True])
def test_two_processes_go_the_same_way(sure, tmp_path, coupled):
    """The same images drawn; and where one process finds that it cannot draw, none does."""
    from hawq_lightning import Sensitivity

    net, batches, loss_fn, _, _ = sure
    if coupled:
        alone = measure(net, _second_has_class_2(), _coupled_in_one, sampling="all", progress=False)
    else:
        alone = measure(net, batches, loss_fn, sampling="curvature", progress=False)
    meet = f"file://{tmp_path}/meet"
    processes = [Program(_one_of_two, rank, meet, str(tmp_path), coupled, cwd=tmp_path) for rank in (0, 1)]
    for process in processes:
        done = process.end()
        assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = Sensitivity.load(tmp_path / f"{rank}.json")
        assert found.settings["draw"] == ("all" if coupled else "curvature")
        assert found.settings["probes"] == alone.settings["probes"]
        for a, b in zip(alone, found):
            assert b.trace == pytest.approx(a.trace, rel=1e-9) and b.stderr == pytest.approx(a.stderr, rel=1e-9)


def test_the_design_spends_work_where_the_curvature_is():
    even = sampling_design(torch.ones(100))
    assert even.gain == 1.0 and bool((even.probability == 1).all())
    heavy = sampling_design(torch.tensor([1.0] * 5 + [0.001] * 95))
    assert bool((heavy.probability[:5] == 1).all()) and bool((heavy.probability[5:] < 0.5).all())
    assert heavy.gain > 3 and bool((heavy.probability > 0).all())
    assert sampling_design(torch.zeros(10)).gain == 1.0


@pytest.mark.parametrize("make", ["tuple", "dict", "lists"])
def test_images_are_taken_out_and_joined(make):
    def batch(start: int, count: int) -> object:
        x = torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(count, 3).clone()
        if make == "tuple":
            return (x, x[:, 0])
        if make == "dict":
            return {"image": x, "label": x[:, 0], "scale": 2.0}
        return [list(x), [{"boxes": v[None]} for v in x]]

    def first(whole: object) -> list[float]:
        x = whole["image"] if make == "dict" else whole[0]  # type: ignore[index]
        return [float(v[0]) for v in x]

    kept = [batch(0, 5), batch(5, 4)]
    one = pick(kept[0], 5, torch.tensor([3, 0]))
    assert first(one) == [3.0, 0.0]
    assert first(join([one, kept[1]], [2, 4])) == [3.0, 0.0, 5.0, 6.0, 7.0, 8.0]
    from hawq_lightning.sensitivity import batch_images

    chosen = [(0, torch.tensor([1, 4])), (1, torch.tensor([2]))]
    (chunk,) = chunks(kept, [5, 4], chosen, 5, batch_images)
    assert first(chunk.batch) == [1.0, 4.0, 7.0] and chunk.samples == 3
    assert [c.samples for c in chunks(kept, [5, 4], chosen, 2, batch_images)] == [2, 1]
