"""The file for integer kernels: what fuses, what it computes, what stays float and is named."""

import collections
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, quantize
from hawq_lightning.export import compare, to_onnx
from hawq_lightning.export.onnx import session
from tests.deployed_networks import NETWORKS
from tests.unit.export.test_onnx import planned

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


class Residual(nn.Module):
    """A block with a skip, a pool and a linear layer; clamped by ReLU and ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.norm(self.stem(x)))
        x = nn.functional.max_pool2d(torch.relu(x + self.conv(x)), 2)
        return self.head(x.mean((2, 3)))


def optimized(path, tmp_path) -> collections.Counter:
    """Operators that onnxruntime really runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return collections.Counter(n.op_type for n in onnx.load(str(tmp_path / "optimized.onnx")).graph.node)


def made(net: nn.Module, x: torch.Tensor, bits=lambda i: 8, grid=8):
    torch.manual_seed(0)
    plan = planned(net.eval(), x, "affine", bits, grid)
    # behind a ReLU a grid begins at 0
    first = plan.activations[0].name
    sites = [replace(s, zero_point=0) if s.kind == "activation" and s.name != first else s for s in plan.sites]
    plan = plan.replace(sites=tuple(sites))
    quantize(net, plan)
    return plan


def test_a_residual_network_runs_in_integer_kernels_alone(tmp_path):
    torch.manual_seed(0)
    net, x = Residual(), torch.randn(32, 3, 8, 8)
    with torch.no_grad():  # a negative gamma, a tiny and a zero one
        net.norm.weight[:3] = torch.tensor([-0.7, 1e-12, 0.0])
        net.norm.bias[:3] = 0.5
    plan = made(net, x, lambda i: (8, 4, 8)[i])
    path = tmp_path / "a.onnx"
    deployed = to_onnx(net, plan, x, path, integer=True)
    found = optimized(path, tmp_path)
    assert not {"Conv", "Gemm", "MatMul", "DequantizeLinear"} & set(found), found
    assert found["QLinearConv"] == 2 and found["QLinearAdd"] == 1 and found["QGemm"] == 1
    assert not deployed.still_float and deployed.grids
    onnx.checker.check_model(onnx.load(str(path)), full_check=True)
    with torch.no_grad():
        wanted = net(x).numpy()
    (integers,) = session(path).run(None, {"input": x.numpy()})
    (floats,) = session(path, integers=False).run(None, {"input": x.numpy()})
    assert np.abs(integers - floats).max() < 0.02 * wanted.std() * 4
    assert np.abs(integers - wanted).max() < 0.1 * wanted.std() * 4
    assert compare(net, path, [x]).images == 32


@pytest.mark.stress
def test_what_has_no_integer_kernel_is_named_and_reads_float_weights(tmp_path):
    make, shape = NETWORKS["conv_transpose_groups"]
    torch.manual_seed(0)
    net, x = make(), torch.randn(8, *shape)
    plan = made(net, x)
    deployed = to_onnx(net, plan, x, tmp_path / "a.onnx", integer=True)
    assert [why.split(":")[0] for why in deployed.still_float.values()] == ["ConvTranspose"]
    found = optimized(tmp_path / "a.onnx", tmp_path)
    assert found["QLinearConv"] == 2 and found["ConvTranspose"] == 1
    about = {e.key: e.value for e in onnx.load(str(tmp_path / "a.onnx")).metadata_props}
    assert "no integer kernel" in about["hawq_lightning.still_float"] and about["hawq_lightning.form"] == "integer"


@pytest.mark.stress
def test_integer_kernels_read_no_two_bits_and_need_images(tmp_path):
    net, x = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)), torch.randn(2, 3, 8, 8)
    plan = made(net, x)
    with pytest.raises(HawqError, match="Integer kernels read INT8 only"):
        to_onnx(net, plan, x, tmp_path / "a.onnx", integer=True, storage="native")
    with pytest.raises(HawqError, match="no batches to calibrate"):
        to_onnx(net, plan, x, tmp_path / "a.onnx", integer=True, calibration=[])
    assert not list(tmp_path.iterdir())
