"""Options of ONNX files: free sizes, 7 bits for CPUs without VNNI, weights beside the graph, TensorRT's form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning import HawqError, quantize
from hawq_lightning.export import compare, export, to_onnx
from hawq_lightning.export.onnx import session, vector_instructions
from tests.internals import internal
from tests.unit.export.test_onnx import planned

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Small(nn.Module):
    """Two convolutions over any size; ``flat`` fixes it."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.flat = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 3, padding=1), flat
        self.head = nn.Linear(64 if flat else 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


def made(net: nn.Module, x: torch.Tensor, bits: int = 8, code: str = "affine", grid: int = 8):
    plan = planned(net.eval(), x, code, lambda i: bits, grid)
    quantize(net, plan)
    return plan


def run(path, x: torch.Tensor, integers: bool = True) -> np.ndarray:
    return session(path, integers=integers).run(None, {"input": x.numpy()})[0]


def stored(path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


@pytest.mark.parametrize("integer", [False, pytest.param(True, marks=pytest.mark.stress)])
def test_height_and_width_are_free_where_asked_for(tmp_path, integer):
    net, x = Small(), torch.randn(2, 3, 8, 8)
    plan = made(net, x)
    to_onnx(net, plan, x, tmp_path / "m.onnx", free_size=True, integer=integer)
    for size in ((8, 8), (12, 20), (7, 5)):
        y = torch.randn(3, 3, *size)
        with torch.no_grad():
            wanted = net(y).numpy()
        found = run(tmp_path / "m.onnx", y, integer)
        assert np.abs(found - wanted).max() < (0.1 if integer else 1e-5)
    flat = Small(flat=True)
    with pytest.raises(HawqError, match=r"size \[8, 8\] alone.*free_size=True is for networks that take any"):
        to_onnx(flat, made(flat, x), x, tmp_path / "flat.onnx", free_size=True)
    assert not (tmp_path / "flat.onnx").exists()


@pytest.mark.stress
def test_multiples_of_a_stride_are_free_too(tmp_path):
    class Skips(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.first(x))
            return self.head((x[:, :1] + F.interpolate(torch.relu(self.second(y)), scale_factor=2)).mean((2, 3)))

    net, x = Skips(), torch.randn(2, 3, 8, 8)
    to_onnx(net, made(net, x), x, tmp_path / "m.onnx", free_size=True)
    y = torch.randn(2, 3, 12, 6)
    with torch.no_grad():
        assert np.abs(run(tmp_path / "m.onnx", y, False) - net(y).numpy()).max() < 1e-5


def test_seven_bits_are_enough_for_no_kernel_to_saturate(tmp_path):
    net, x = Small(), torch.randn(4, 3, 8, 8)
    plan = made(net, x)
    few = plan.replace(sites=tuple(replace(s, bits=5) if s.name == "second.weight" else s for s in plan.sites))
    quantize(net, few)
    written = export(net, few, tmp_path / "m.onnx", "onnx_integer", example_input=x, seven_bits=True, storage="int8")
    assert written.narrowed == ("first", "head")
    arrays = stored(tmp_path / "m.onnx")
    for name, layer in (("first", net.first), ("second", net.second), ("head", net.head)):
        codes = layer.weight_quantizer.codes(layer.weight).numpy()
        kept = arrays[f"{name}.weight_quantizer.codes"]
        kept = kept if kept.shape == codes.shape else kept.T
        assert kept.min() >= -64 and kept.max() <= 63
        assert np.array_equal(kept, codes if name == "second" else np.clip(np.rint(codes / 2), -64, 63))
    with torch.no_grad():
        assert np.abs(run(tmp_path / "m.onnx", x) - net(x).numpy()).max() < 0.1
    with pytest.raises(HawqError, match="give integer=True too"):
        to_onnx(net, few, x, tmp_path / "n.onnx", seven_bits=True)


@pytest.mark.parametrize(
    ("flags", "known"),
    [("sse4_2 avx2", False), ("avx2 avx512f", False), ("avx2 avx_vnni", True), ("avx2 avx512_vnni", True),
     ("sse4_2", True), ("neon asimd", True)],
)  # fmt: skip
def test_a_cpu_whose_kernels_saturate_is_told_where_it_is_measured(monkeypatch, capsys, flags, known):
    speeds = internal("cli._speeds")
    onnx_speed = internal("export.onnx._speed")
    monkeypatch.setattr(onnx_speed.Path, "read_text", lambda *args, **how: f"flags : fpu {flags}\n")
    assert vector_instructions() is known
    row = {"file_bytes": 1, "gzip_bytes": 1, "ms": 1.0, "images_per_second": 1.0, "peak_bytes": 1}
    settings = {"onnxruntime": "1.0", "threads": 1, "batch_size": 1}
    speeds.show({"speed": {"float": row, "plan": row}, "speed_settings": settings})
    assert ("seven_bits=true" in capsys.readouterr().out) is not known


def test_weights_of_more_than_two_gibibytes_lie_beside_the_graph(tmp_path, monkeypatch):
    net, x = Small(), torch.randn(2, 3, 8, 8)
    plan = made(net, x)
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    proto = internal("export.onnx._proto")
    with monkeypatch.context() as lowered:
        lowered.setattr(proto, "_GRAPH", onnx.checker.MAXIMUM_PROTOBUF - 400)
        lowered.setattr(proto, "_SMALL", 200)
        to_onnx(net, plan, x, path, storage="int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"] and data.stat().st_size >= 216
    found = compare(net, path, [x])
    assert found.share == 1 and found.difference < 1e-5 and not found.codes
    assert internal("export.onnx._proto").content(path) == path.read_bytes() + data.read_bytes()
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.stress
def test_a_smaller_network_takes_the_weights_back_and_an_integer_one_has_to_be_small(tmp_path, monkeypatch):
    net, x = Small(), torch.randn(2, 3, 8, 8)
    plan, path = made(net, x), tmp_path / "m.onnx"
    with monkeypatch.context() as lowered:
        lowered.setattr(internal("export.onnx._proto"), "_GRAPH", onnx.checker.MAXIMUM_PROTOBUF - 400)
        with pytest.raises(HawqError, match="An integer file's weights take less than 2 GiB"):
            to_onnx(net, plan, x, path, integer=True)
        assert not list(tmp_path.iterdir())
        to_onnx(net, plan, x, path)
    assert (tmp_path / "m.onnx.data").exists()
    to_onnx(net, plan, x, path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"] and compare(net, path, [x]).codes


def test_tensorrts_form_has_int8_codes_around_zero(tmp_path):
    net, x = Small(), torch.rand(4, 3, 8, 8)
    plan = made(net, x, grid=5)
    sites = tuple(replace(s, zero_point=0, scale=3 / 31) if s.kind == "activation" else s for s in plan.sites)
    quantize(net, plan := plan.replace(sites=sites))
    written = export(net, plan, tmp_path / "m.onnx", "tensorrt", example_input=x)
    assert list(written.scales.values()) == [pytest.approx(3 / 127)] * 3
    proto, arrays = onnx.load(str(tmp_path / "m.onnx")), stored(tmp_path / "m.onnx")
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zeros = arrays[node.input[2]]
            assert zeros.dtype == np.int8 and not zeros.any()
    assert not {"Clip"} & {n.op_type for n in proto.graph.node}
    assert {n.op_type for n in proto.graph.node if len(n.input) > 2} >= {"Conv"}, "biases stay in their layers, float"
    with torch.no_grad():
        assert np.abs(run(tmp_path / "m.onnx", x, False) - net(x).numpy()).max() < 0.1
    assert compare(net, tmp_path / "m.onnx", [x], codes=False).images == 4


@pytest.mark.stress
def test_tensorrt_has_no_type_for_eight_odd_bits(tmp_path):
    odd, x = Small(), torch.rand(4, 3, 8, 8)
    with pytest.raises(HawqError, match="TensorRT has INT8 weights; 'first"):
        export(odd, made(odd, x, code="midrise"), tmp_path / "odd.onnx", "tensorrt", example_input=x)
    assert not (tmp_path / "odd.onnx").exists()


READS = {
    "given back": lambda net, x: (net.head(x), net.first.weight),
    "its norm": lambda net, x: net.head(x) * net.second.weight.norm(),
    "asked for its type": lambda net, x: net.head(x.to(net.first.weight.dtype)),
}


@pytest.mark.parametrize("how", READS)
def test_a_function_that_reads_a_stored_weight_is_named_or_exported(tmp_path, how):
    class Reads(Small):
        def forward(self, x: torch.Tensor) -> object:
            y = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
            return READS[how](self, y)

    net, x = Reads().eval(), torch.randn(2, 3, 8, 8)
    table = hl.sites(net)  # without a forward pass nobody has seen the function
    sites = [hl.PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 8, "affine") for s in table.weights]
    quantize(net, plan := hl.Plan(tuple(sites), table.layers))
    deploy = internal("export._deployed").deploy
    if how == "asked for its type":
        assert deploy(net, plan, x).plan is not None
        return
    name = {"given back": "first", "its norm": "second"}[how]
    with pytest.raises(HawqError, match=rf"a function reads that of {name}, which is stored as codes"):
        deploy(net, plan, x)
