"""Layers of the user's own, with several weights, are packed, deployed, exported and restored as others are."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning import (
    ApplyPlan,
    Plan,
    PlanSite,
    QuantizerConfig,
    load_from_checkpoint,
    load_packed,
    quantize,
    save_packed,
    sites,
)
from hawq_lightning.export import compare, deploy, packed_overhead, read_packed, to_onnx, to_program
from hawq_lightning.quantization import plan_of, quantized_layers, trained_quantizers
from tests.own_kinds import Gated, Mixture, Paired
from tests.trainers import hawq, trainer, weights_only

KINDS = [Mixture, Paired, Gated]


def _images(kind: type[nn.Module], count: int = 6) -> torch.Tensor:
    return torch.randn(count, 2, 3) if kind is Mixture else torch.randn(count, 3)


def _quantized(kind: type[nn.Module], quantizer: str = "uniform") -> tuple[nn.Module, Plan, torch.Tensor]:
    """Each site at bits of its own, so that no two can stand for each other."""
    torch.manual_seed(0)
    net, x = kind().eval(), _images(kind)
    chosen = []
    for i, s in enumerate(sites(net, x)):
        if s.kind == "weight":
            code = "codebook" if quantizer == "lq_nets" else "affine"
            bits = (3, 2, 4)[i % 3]
            chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, code))
        else:
            chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 3 + i, "affine", 0.1 + 0.02 * i, 2 + i))
    plan = Plan(tuple(chosen), quantizer=quantizer)
    return quantize(net, plan), plan, x


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_has_the_grid_of_its_own_site(kind):
    net, plan, _ = _quantized(kind)
    layers = quantized_layers(net)
    for site in plan.activations:
        for name in site.layers:
            reads = layers[name].input_quantizer
            assert (reads.bits, float(reads.zero_point)) == (site.bits, site.zero_point)
            assert float(reads.scale) == pytest.approx(site.scale)
    assert plan_of(net).bits.items() >= plan.bits.items()


@pytest.mark.parametrize("quantizer", ["uniform", "lsq", "lq_nets"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_file_brings_the_network_back_bit_for_bit(kind, quantizer, tmp_path):
    net, plan, x = _quantized(kind, quantizer)
    size = save_packed(net, plan, tmp_path / "net")
    loaded = load_packed(tmp_path / "net", kind().eval())
    assert torch.equal(loaded(x), net(x))
    wrapped = load_packed(tmp_path / "net", nn.Sequential(kind()).eval())
    assert torch.equal(wrapped(x), net(x))
    assert set(read_packed(tmp_path / "net").codes) == {s.name for s in plan.weights}
    stored = read_packed(tmp_path / "net").rest
    assert not {s.name for s in plan.weights} & {key for keys in stored for key in keys}  # codes only, no float weight
    if quantizer == "uniform":
        codes = sum(math.ceil(s.numel * s.bits / 8) for s in plan.weights)
        scales = sum(4 * read_packed(tmp_path / "net")[s.name].storage.tensors["scale"].numel() for s in plan.weights)
        assert size == packed_overhead(kind(), plan.sites) + codes + scales


@pytest.mark.parametrize("kind", KINDS)
def test_the_deployed_network_holds_codes_and_gives_the_same_outputs(kind):
    net, plan, x = _quantized(kind)
    before = net(x)
    deployed = deploy(net, plan, x, fold=False).model
    assert torch.equal(deployed(x), before) and torch.equal(net(x), before)
    assert not {s.name for s in plan.weights} & {n for n, p in deployed.named_parameters()}
    assert sum(n.endswith(".codes") for n in deployed.state_dict()) == len(quantized_layers(net))
    assert torch.allclose(to_program(net, plan, x).module()(x), before, atol=1e-6)


@pytest.mark.parametrize("kind", [Paired, Gated])
def test_the_onnx_file_is_compared_by_the_activations_of_every_weight(kind, tmp_path):
    pytest.importorskip("onnxruntime")
    net, plan, x = _quantized(kind)
    to_onnx(net, plan, x, tmp_path / "net.onnx")
    agreement = compare(net, tmp_path / "net.onnx", [x])
    assert agreement.difference < 1e-5 and not any(agreement.flipped.values())
    assert set(agreement.codes) == {f"{s.layers[0]}.input" for s in plan.activations}
    for site in plan.activations:  # an activation on another grid does not pass
        wrong = copy.deepcopy(net)
        for name in site.layers:
            reads = quantized_layers(wrong)[name].input_quantizer
            reads.zero_point.add_(1)
            reads.refresh()
        assert compare(wrong, tmp_path / "net.onnx", [x]).flipped[f"{site.layers[0]}.input"]


class Task(LightningModule):
    def __init__(self, kind: str = "Paired"):
        super().__init__()
        self.save_hyperparameters()
        self.net = {"Paired": Paired, "Gated": Gated, "Mixture": Mixture}[kind]()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_every_weight_back_quantized(kind, tmp_path):
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(_images(kind, 8), torch.randint(3, (8,))), 4)
    task, callback = Task(kind.__name__), hawq(images=8, budget="6x")
    fitted = trainer(tmp_path, callback)
    fitted.fit(task, data)
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    x = _images(kind)
    expected = task.eval().net(x)
    loaded = load_from_checkpoint(Task, tmp_path / "last.ckpt").eval()
    assert torch.equal(loaded.net(x), expected)
    assert {n.removeprefix("net.") for n in trained_quantizers(task.state_dict())} == {
        n for n, m in task.net.named_modules() if hasattr(m, "quantizer_options")
    }
    fresh = Task(kind.__name__)
    again = ApplyPlan(callback.plan)
    trainer(tmp_path, again, max_epochs=2).fit(fresh, data, ckpt_path=str(tmp_path / "last.ckpt"), **weights_only(True))
    assert again.plan.bits == callback.plan.bits  # and no word of another plan
    save_packed(task, callback.plan, tmp_path / "task")
    assert torch.equal(load_packed(tmp_path / "task", kind().eval())(x), expected)


def test_a_users_module_called_a_quantizer_is_no_layer_of_ours():
    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vector_quantizer = nn.Linear(3, 3)

    assert trained_quantizers(nn.Sequential(Codes()).state_dict()) == {}
    with_options = QuantizerConfig("lsq")
    net = nn.Sequential(nn.Linear(3, 3))
    table = sites(net, torch.randn(2, 3))
    weights = tuple(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 4, "affine") for s in table.weights)
    quantize(net, Plan(weights, quantizer=with_options.name))
    assert trained_quantizers(nn.Sequential(net).state_dict()) == {"0.0": "lsq"}
