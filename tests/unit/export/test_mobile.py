"""Programs of integers: the plan's grids and codes; ExecuTorch and LiteRT run them."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, Plan, PlanSite, quantize, sites
from hawq_lightning.export import (
    EXPORTERS,
    compare_executorch,
    compare_litert,
    export,
    to_executorch,
    to_litert,
    to_pt2e,
)


class Residual(nn.Module):
    """A block with ResNet's shortcut without parameters, gammas of both signs, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        self.norm.weight.data = torch.linspace(-1, 1.3, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(F.relu(self.norm(self.second(x)) + shortcut).mean((2, 3)))


def network(bits: int = 8, skip: str = "") -> tuple[nn.Module, Plan, torch.Tensor]:
    torch.manual_seed(0)
    net, x = Residual().eval(), torch.rand(6, 2, 6, 6)
    table = sites(net, x)
    chosen = [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 8, "affine") for s in table.weights]
    chosen = [s for s in chosen if s.layers != (skip,)]
    for s in table.activations:
        chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, "affine", 1.5 / (2**bits - 1), 0))
    plan = Plan(tuple(chosen), table.layers)
    return quantize(net, plan), plan, x


def test_every_tensor_lies_on_a_grid_and_every_reader_has_its_own_node():
    net, plan, x = network()
    made = to_pt2e(net, plan, x, [x])
    nodes = list(made.program.graph.nodes)
    readers = [n for n in nodes if "dequantize_per_tensor" in str(n.target)]
    assert readers and all(len(n.users) == 1 for n in readers)
    names = {str(n.target).rpartition("::")[2] for n in nodes if n.op == "call_function"}
    assert not [n for n in names if "slice" in n or "pad" in n], "the shortcut is a convolution"
    assert made.planned == 3 and made.calibrated == 3  # conv and sum before the pool, and the logits
    scales = [n.args[1] for n in nodes if "per_channel" in str(n.target)]
    state = made.program.state_dict | dict(made.program.named_buffers())
    by_name = {spec.arg.name: spec.target for spec in made.program.graph_signature.input_specs}
    assert scales and all((state[by_name[s.name]] > 0).all() for s in scales)
    run = made.program.module()
    with torch.no_grad():
        outputs = torch.cat([run(image[None]) for image in x])
        assert (outputs - net(x)).abs().max() < 4 * made.output.scale


def test_executorch_runs_it_as_one_delegate(tmp_path):
    pytest.importorskip("executorch")
    net, plan, x = network()
    written = to_executorch(net, plan, x, tmp_path / "m.pte", batches=[x])
    assert written.delegates == 1 and written.left == ()
    found = compare_executorch(net, tmp_path / "m.pte", [x], images=4)
    assert found.images == 4 and found.difference < 6 * written.integers.output.scale


def test_litert_reads_and_gives_int8(tmp_path):
    pytest.importorskip("litert_torch")
    net, plan, x = network()
    written = to_litert(net, plan, x, tmp_path / "m.tflite", batches=[x])
    found = compare_litert(net, tmp_path / "m.tflite", [x])
    assert found.images == 6 and found.difference < 6 * written.integers.output.scale


def test_what_has_no_form_is_said_before_anything_is_written(tmp_path, monkeypatch):
    net, plan, x = network(bits=4)
    with pytest.raises(HawqError, match="activations of 8 bits; this plan has one of 4"):
        to_pt2e(net, plan, x)
    odd = nn.Sequential(nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 2)).eval()
    table = sites(odd, y := torch.rand(4, 6))
    eight = [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 8, "affine", 0.01, 0) for s in table.activations]
    weights = [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 8, "affine") for s in table.weights]
    quantize(odd, whole := Plan((*weights, *eight), table.layers))
    with pytest.raises(HawqError, match="operation aten.softplus.default has no integer form"):
        to_pt2e(odd, whole, y)
    net, plan, x = network()
    with pytest.raises(HawqError, match="no images to see the ranges"):
        to_pt2e(net, plan, x, [])
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    for name in ("executorch", "litert"):
        with pytest.raises(HawqError, match=rf"hawq-lightning\[{name}\]"):
            export(net, plan, tmp_path / "folder" / f"m{EXPORTERS[name].suffix}", name, example_input=x)
    assert not (tmp_path / "folder").exists()
