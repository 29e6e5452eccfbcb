"""QONNX, AIMET, torchao: codes and grids in other tools' forms; the tools themselves where they are installed."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, Plan, PlanSite, quantize, sites
from hawq_lightning.export import EXPORTERS, export, to_torchao
from hawq_lightning.export.onnx import compare_qonnx
from tests.unit.export.test_packed import random_plan

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def network(code: str = "affine", zero: int = 0, seed: int = 0) -> tuple[nn.Module, Plan, torch.Tensor]:
    """Convolution, BatchNorm with gammas of both signs, linear layer."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    net[1].weight.data = torch.tensor([1.0, -0.7, 0.4, -1.2])
    x = torch.randn(5, 2, 4, 4)
    table = sites(net, x)
    chosen = [
        PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, code) for s, bits in zip(table.weights, (3, 5))
    ]
    for s, z in zip(table.activations, (zero, 0)):
        chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 8, "affine", 4 / 255, z))
    plan = Plan(tuple(chosen), table.layers)
    return quantize(net, plan), plan, x


def quant(x, scale, zero, bits, signed=None, narrow=None, rounding_mode=None):
    """The standard's formula."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return ((np.round(np.clip(x / scale + zero, low, high)) - zero) * scale).astype(np.float32)


def reference(path: Path, x: torch.Tensor) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Quant(OpRun):
        op_domain = "qonnx.custom_op.general"

        def _run(self, *values, **how):
            return (quant(*values, **how),)

    run = ReferenceEvaluator(str(path), new_ops=[Quant])
    return np.concatenate([run.run(None, {"input": image[None].numpy()})[0] for image in x])


@pytest.mark.parametrize(
    ("code", "zero", "wider"),
    [
        ("affine", 128, {}),  # a symmetric grid is a signed one
        ("midrise", 100, {"0": (3, 4), "4": (5, 6), "0.input": (8, 9)}),
    ],
)
def test_qonnx_computes_the_network_and_says_where_it_needs_more_bits(tmp_path, code, zero, wider):
    net, plan, x = network(code, zero)
    widths = export(net, plan, tmp_path / "m.qonnx.onnx", "qonnx", example_input=x)
    assert widths.wider == wider
    assert widths.weights == {"0": 3 + (code == "midrise"), "4": 5 + (code == "midrise")}
    assert widths.reads == {"0": 8 + (zero == 100), "4": 8}
    with torch.no_grad():
        assert np.allclose(reference(tmp_path / "m.qonnx.onnx", x), net(x).numpy(), atol=1e-5)


def test_qonnx_itself_agrees_and_counts_the_same_bit_operations(tmp_path):
    pytest.importorskip("qonnx")
    net, plan, x = network(zero=128)
    export(net, plan, tmp_path / "m.qonnx.onnx", "qonnx", example_input=x)
    agreement = compare_qonnx(net, tmp_path / "m.qonnx.onnx", [x])
    assert agreement.images == agreement.same == 5 and agreement.difference < 1e-5
    assert agreement.macs == sum(layer.macs for layer in plan.layers)
    assert agreement.bops == sum(y.macs * plan[y.weight].bits * plan[y.activation].bits for y in plan.layers)
    with pytest.raises(HawqError, match="no images"):
        compare_qonnx(net, tmp_path / "m.qonnx.onnx", [])


def test_aimet_files_hold_the_codes_and_the_grids(tmp_path):
    net, plan, x = network(zero=100)
    written = export(net, plan, tmp_path / "m.aimet.onnx", "aimet", example_input=x)
    names = EXPORTERS["aimet"].files("m")
    assert names == ("m.aimet.onnx", "m.aimet.encodings", "m.aimet.0_6_1.encodings")
    new, old = (json.loads((tmp_path / n).read_text()) for n in names[1:])
    assert (new["version"], old["version"]) == ("1.0.0", "0.6.1")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / names[0])).graph.initializer}
    clamped = 0
    for entry in new["param_encodings"]:
        layer = net.get_submodule(entry["name"].removesuffix(".weight"))
        codes = layer.weight_quantizer.codes(layer.weight).numpy()
        scale = np.array(entry["scale"], np.float32).reshape(-1, *[1] * (codes.ndim - 1))
        again = np.round(stored[entry["name"]] / scale)
        signs = np.sign((again * codes).reshape(len(codes), -1).sum(1)).reshape(scale.shape)
        half = 2 ** (entry["bw"] - 1)
        assert entry["offset"] == [-half] * len(codes) and np.abs(again + 0.5).max() < half
        clamped += int((signs * codes == half).sum())
        assert np.array_equal(again, np.minimum(signs * codes, half - 1))
        assert [e["scale"] for e in old["param_encodings"][entry["name"]]] == entry["scale"]
    assert clamped == sum(written.clamped.values())
    grids = {e["name"]: (e["scale"][0], e["offset"][0], e["bw"]) for e in new["activation_encodings"]}
    assert grids["input"] == (pytest.approx(4 / 255), -100, 8) and len(grids) == 2
    assert {
        k: (v[0]["scale"], v[0]["offset"], v[0]["bitwidth"]) for k, v in old["activation_encodings"].items()
    } == grids


def test_a_turned_code_is_clamped_and_counted():
    from tests.internals import internal

    positive = internal("export._positive").positive_scales
    codes = np.array([[-4, 3, 1], [-4, 3, 1]], np.int8)
    turned, scale, clamped = positive(codes, np.array([0.5, -0.5], np.float32), 0, 3)
    assert turned.tolist() == [[-4, 3, 1], [3, -3, -1]] and scale.tolist() == [0.5, 0.5] and clamped == 1
    assert positive(codes, np.array([0.5, -0.5], np.float32), 0, 4)[2] == 0, "a wider type holds +4"


def test_torchao_holds_the_same_weights_and_reads_the_same_grids():
    pytest.importorskip("torchao")
    for quantized in (network(zero=100), network("midrise")):
        net, plan, x = quantized
        made = to_torchao(net, plan, x)
        assert made.static == ("4",) and list(made.left) == ["0"] and "no int8 kernel for Conv2d" in made.left["0"]
        assert torch.equal(made.model[4].weight.dequantize(), net[4].quantized_weight)
        with torch.no_grad():
            assert torch.allclose(made.model(x), net(x), atol=1e-5)
    plan = random_plan(sites(nn.Sequential(nn.Linear(6, 5)).eval(), torch.rand(4, 6)), 1)
    weights = [replace(s, bits=4, code="affine") for s in plan.weights]
    grids = [replace(s, bits=3, scale=0.1, zero_point=2) for s in plan.activations]
    plan = plan.replace(sites=(*weights, *grids))
    net = quantize(nn.Sequential(nn.Linear(6, 5)).eval(), plan)
    y = torch.randn(4, 6)
    assert torch.allclose(to_torchao(net, plan, y).model(y), net(y), atol=1e-6)


def test_what_is_missing_is_said_before_anything_is_written(tmp_path, monkeypatch):
    net, plan, x = network()
    for package in ("torchao", "qonnx"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(HawqError, match=r"needs torchao.*hawq-lightning\[torchao\]"):
        to_torchao(net, plan, x)
    with pytest.raises(HawqError, match=r"needs qonnx.*hawq-lightning\[qonnx\]"):
        EXPORTERS["qonnx"].check(net, verify=True)
    EXPORTERS["qonnx"].check(net)  # writing needs it not
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for name in ("qonnx", "aimet"):
        with pytest.raises(HawqError, match=r"hawq-lightning\[export\]"):
            export(net, plan, tmp_path / "folder" / "m", name, example_input=x)
    assert not (tmp_path / "folder").exists()
