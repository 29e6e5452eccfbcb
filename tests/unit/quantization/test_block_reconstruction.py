"""Roundings of whole blocks: what a block is, that codes stay neighbours, and that outputs come nearer."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import PlanSite, PostTraining, load_packed, save_packed, sites
from hawq_lightning.quantization import quantize, quantized_layers
from hawq_lightning.quantization.post_training import FloatReference, post_training, reconstruct_blocks
from tests.cases import ConvNet, Sequence1d, SharedHead, Tied, Volume, build
from tests.unit.quantization.test_post_training import inputs, made, weight_plan

FEW = {"steps": 40, "batch_size": 16}


class Residual(nn.Module):
    """Two convolutions around a shortcut, maybe with one of its own."""

    def __init__(self, channels, out):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.Conv2d(out, out, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1)) if channels != out else nn.Identity()

    def forward(self, x):
        return torch.relu(self.b(torch.relu(self.norm(self.a(x)))) + self.shortcut(x))


class Net(nn.Module):
    """A stem, a stage of two blocks, a block of two inputs, a head that is a chain."""

    def __init__(self):
        super().__init__()
        self.stem, self.stage = nn.Conv2d(2, 4, 3), nn.Sequential(Residual(4, 4), Residual(4, 6))
        self.joined = nn.Bilinear(6, 6, 6)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def test_blocks_are_the_smallest_parts_with_one_input_and_one_output():
    model = net()
    layers = list(quantized_layers(quantize(model, weight_plan(model, 3))))
    found = reconstruct_blocks(model, inputs(ConvNet), **FEW)
    assert list(found) == ["stem", "stage.0", "stage.1", "head"] and "stage.1.shortcut.0" in layers


@pytest.mark.parametrize("bits, code", [(3, "affine"), (2, "midrise"), (1, "midrise")])
def test_codes_stay_neighbours_and_blocks_come_nearer(bits, code):
    model, batches = net(), inputs(ConvNet)
    quantize(model, weight_plan(model, bits, code))
    reference, layers = FloatReference(model), quantized_layers(model)
    floats = {n: m.weight.detach().clone() for n, m in layers.items()}
    nearest = {n: m.weight_quantizer.codes(m.weight) for n, m in layers.items()}

    states = torch.get_rng_state()
    report = reconstruct_blocks(model, batches, reference=reference, **FEW)
    assert torch.equal(states, torch.get_rng_state())
    assert sum(r["after"] for r in report.values()) < sum(r["before"] for r in report.values())
    assert all(r["after"] <= r["before"] for r in report.values()) and any(r["moved"] > 0 for r in report.values())
    for n, m in layers.items():
        if n == "joined":
            continue  # two inputs
        codes = m.weight_quantizer.codes(m.weight)
        assert (codes - nearest[n]).abs().max() <= 1
        assert torch.equal(m.weight_quantizer(m.weight), m.weight)  # on the grid
        q = m.weight_quantizer
        apart = (m.weight - floats[n]).abs() / q.scale.reshape(-1, *[1] * (m.weight.ndim - 1))
        half = 1 << (bits - 1)
        free = (nearest[n] > -half) & (nearest[n] < half - 1)
        assert float(apart[free].max() if bool(free.any()) else 0.0) < 1  # below or above, nothing else
        assert m.weight.requires_grad and m.weight.grad is None


def test_one_layer_ends_at_the_best_of_all_its_roundings():
    """Of a single neuron with few weights all roundings can be tried."""
    hits = 0
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 1, bias=False))
        x, w = torch.randn(64, 6) @ torch.randn(6, 6), model[0].weight.detach().clone()
        quantize(model, weight_plan(model, 3))
        q = model[0].weight_quantizer
        below = (w / q.scale.view(-1, 1)).floor()
        ways = itertools.product((0.0, 1.0), repeat=6)
        every = [q.dequantize((below + torch.tensor([p])).clamp(-4, 3).int()) for p in ways]
        errors = [float((x @ (v - w).T).square().mean()) for v in every]
        reconstruct_blocks(model, [x], steps=150, batch_size=64, drop=0.0)
        hits += float((x @ (model[0].weight.detach() - w).T).square().mean()) <= 1.05 * min(errors)
    assert hits >= 3  # gradients find a good one, mostly the best of 64


def test_worse_roundings_are_not_taken():
    model, batches = made(ConvNet, 3)
    post_training(model, batches, ["adaround"])
    before = {n: m.weight.detach().clone() for n, m in quantized_layers(model).items()}
    report = reconstruct_blocks(model, batches, steps=0)
    for name, row in report.items():
        assert row["after"] <= row["before"]
        if row["after"] == row["before"]:
            assert torch.equal(quantized_layers(model)[name].weight, before[name])


@pytest.mark.parametrize("kind", [ConvNet, SharedHead, Sequence1d, Volume, Tied])
def test_every_kind_of_layer_goes_through(kind, tmp_path):
    model, batches = made(kind)
    plan = weight_plan(build(kind).float()).replace(costs={"weight_bytes": 0.0})
    report = reconstruct_blocks(model, batches, **FEW)
    assert all(r["after"] <= r["before"] for r in report.values())
    save_packed(model, plan, tmp_path / "m.safetensors")
    again = load_packed(tmp_path / "m.safetensors", build(kind).float())
    outputs, loaded = (m(batches[0]) for m in (model, again))
    assert all(torch.equal(a, b) for a, b in zip(outputs, loaded))


def test_activations_stay_quantized_inside_of_a_block():
    """The learned roundings make up for what 2-bit activations inside of the block do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))).eval()
    x = torch.randn(128, 8)
    wanted, table = model(x).detach(), sites(model, x)
    plan = weight_plan(model, 4)
    acts = [
        PlanSite(s.name, "activation", s.layers, s.shape, s.numel, 2, "affine", 1.0, 1 if i == 0 else 0)
        for i, s in enumerate(table.activations)
    ]
    quantize(model, replace(plan, sites=(*plan.sites, *acts)))
    before = F.mse_loss(model(x), wanted)
    reconstruct_blocks(model, [x], steps=100)
    assert F.mse_loss(model(x), wanted) < 0.97 * before


def test_a_correction_that_would_undo_it_is_warned_of():
    with pytest.warns(UserWarning, match="bias_correction behind blocks"):
        PostTraining(["blocks", "bias_correction"])
    PostTraining(["bias_correction", "blocks"])
