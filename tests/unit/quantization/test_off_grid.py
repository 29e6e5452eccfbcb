"""Code that rewrites a quantized network: weights that left their grids and layers that were replaced are told."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F

from hawq_lightning import Plan, PlanSite, quantize, save_packed, sites
from hawq_lightning.callbacks import ApplyPlan
from hawq_lightning.export import to_program
from hawq_lightning.quantization import off_grid, plan_of, quantized_layers
from tests.unit.layers.test_adapters import Lora

TELLS = pytest.warns(UserWarning, match="far off the grids")


def network(bits: int = 4, quantizer: str = "uniform", seed: int = 0) -> tuple[nn.Module, Plan]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)).eval()
    plan = planned(net, torch.randn(3, 2, 4, 4), bits, quantizer)
    return quantize(net, plan), plan


def planned(net: nn.Module, x: torch.Tensor, bits: int, quantizer: str = "uniform") -> Plan:
    table = sites(net, x)
    code = "midrise" if bits == 1 or quantizer == "dorefa" else "affine"
    chosen = [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, code) for s in table.weights]
    return Plan(tuple(chosen), table.layers, quantizer=quantizer)


def add(w: nn.Parameter) -> None:
    """As an adapter is merged."""
    w.data += 40 * w.std() * (torch.rand(len(w), 1) + 0.5) * torch.randn(1, *w.shape[1:]).sign()


def scaled_up(w: nn.Parameter) -> None:
    w.data.mul_(30)


def scaled_down(w: nn.Parameter) -> None:
    w.data.mul_(1e-4)


def put(w: nn.Parameter) -> None:
    w.data = torch.randn_like(w) * 20


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("rewrite", [add, scaled_up, scaled_down, put])
def test_weights_that_code_rewrote_are_far_off_their_grids(bits, rewrite):
    net, _ = network(bits)
    rewrite(net[3].weight)
    assert off_grid(quantized_layers(net)) == ["3"]
    quantize(net, plan_of(net))
    assert not off_grid(quantized_layers(net)), "grids that are fitted anew fit"


@pytest.mark.parametrize("quantizer", ["uniform", "lsq", "dorefa", "int_only", "fqn", "lq_nets"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_weights_as_they_are_drawn_and_trained_are_on_their_grids(quantizer, bits):
    torch.manual_seed(bits)
    draws = {
        "normal": torch.randn(6, 40), "uniform": torch.rand(6, 40) - 0.5, "heavy": torch.randn(6, 40) ** 5,
        "sparse": torch.randn(6, 40) * (torch.rand(6, 40) < 0.05), "zeros": torch.zeros(6, 40),
        "outlier": torch.cat([torch.randn(6, 39), torch.full((6, 1), 60.0)], 1), "positive": torch.rand(6, 40),
    }  # fmt: skip
    for name, values in draws.items():
        net = nn.Sequential(nn.Linear(40, 6))
        net[0].weight.data.copy_(values)
        codes = {"lq_nets": "codebook", "dorefa": "midrise"}.get(quantizer, "midrise" if bits == 1 else "affine")
        if quantizer == "lq_nets" and bits > 4:
            continue
        weights = PlanSite("0.weight", "weight", ("0",), (6, 40), 240, bits, codes)
        quantize(net, Plan((weights,), quantizer=quantizer))
        assert not off_grid(quantized_layers(net)), (name, "as fitted")
        net[0].weight.data.mul_(1.3)
        assert not off_grid(quantized_layers(net)), (name, "a third larger")


def test_long_training_with_weight_decay_leaves_weights_on_their_grids():
    net, _ = network(2)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
    x, y = torch.randn(30, 2, 4, 4), torch.arange(30) % 5
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert not off_grid(quantized_layers(net))


def test_merged_adapters_are_told_when_packed_and_exported(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(Lora(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 6)
    quantize(net, planned(net, x, 8))
    adapter = net[0]
    adapter.lora_B["default"].weight.data.mul_(40)
    merged = adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight * 0.5
    adapter.base_layer.weight.data += merged.detach()  # as merge_and_unload does
    net[0] = adapter.base_layer
    plan = plan_of(net)
    with TELLS:
        save_packed(net, plan, tmp_path / "a.safetensors")
    with TELLS:
        to_program(net, plan, x)
    quantize(net, plan_of(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_packed(net, plan, tmp_path / "b.safetensors")


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_validations_and_predictions_tell_what_was_rewritten_or_replaced():
    task, data = Task(), [(torch.randn(4, 6), torch.arange(4) % 3)]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    plan = plan_for_task()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu",
             "enable_model_summary": False, "max_epochs": 1}  # fmt: skip
    trainer = Trainer(callbacks=[ApplyPlan(plan)], **quiet)
    trainer.fit(task, loader, loader)
    trainer.validate(task, loader, verbose=False)
    task.net[0].weight.data.mul_(100)
    with TELLS:
        trainer.predict(task, loader)
    task.net[0].weight.data.div_(100)
    task.net[2] = nn.Linear(8, 3)
    with pytest.warns(UserWarning, match="bits for net.2, which are float now"):
        trainer.validate(task, loader, verbose=False)


def plan_for_task() -> Plan:
    shapes = {"net.0": (8, 6), "net.2": (3, 8)}
    return Plan(tuple(PlanSite(f"{n}.weight", "weight", (n,), s, s[0] * s[1], 4, "affine") for n, s in shapes.items()))
