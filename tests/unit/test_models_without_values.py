"""Models on the meta device are refused whole, and vectors without a batch axis are one sample."""

import copy

import pytest
import torch
from torch import nn

import hawq_lightning as hl
from hawq_lightning import HawqError
from hawq_lightning.export import load_packed, save_packed
from hawq_lightning.quantization import candidates, quantize
from hawq_lightning.selection import Problem, select


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


BATCH = (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2]))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def plan():
    model = net()
    sites, measured = hl.sites(model, BATCH[0]), hl.measure(model, [BATCH], loss, progress=False)
    weighed = candidates(model, [BATCH], measured, sites=sites, loss_fn=loss)
    return select(Problem(sites, weighed, measured), "6x")


@pytest.mark.parametrize("what", ["measure", "quantize", "load_packed"])
@pytest.mark.parametrize("part", [slice(None), slice(2, None)])
def test_a_model_on_the_meta_device_is_refused_before_it_is_changed(tmp_path, plan, what, part):
    packed = tmp_path / "packed.safetensors"
    save_packed(quantize(net(), plan), plan, packed)
    model = net()
    for layer in model[part]:
        layer.to("meta")
    types = [type(m) for m in model.modules()]
    calls = {
        "measure": lambda: hl.measure(model, [BATCH], loss, progress=False),
        "quantize": lambda: quantize(model, plan),
        "load_packed": lambda: load_packed(packed, model),
    }
    with pytest.raises(HawqError, match=f"{what} needs a model with values, but '[02].weight' is on the meta device"):
        calls[what]()
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize(
    "model, x",
    [
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.arange(4.0) - 1.3),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.arange(4.0) - 1.3),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)),
            torch.arange(72.0).cos().view(2, 6, 6),
        ),
    ],
)
def test_a_sample_without_a_batch_axis_has_the_traces_of_a_batch_of_one(model, x):
    torch.manual_seed(0)
    network = model()

    def squares(m, batch):
        y = m(batch).flatten()
        return (y.square() * torch.arange(1.0, 1 + len(y))).mean()

    alone = hl.measure(network, [x], squares, estimator="exact", progress=False)
    batch = hl.measure(copy.deepcopy(network), [x[None]], squares, estimator="exact", progress=False)
    for a, b in zip(alone, batch):
        if a.kind == "weight":
            assert a.trace == pytest.approx(b.trace, rel=1e-5)
