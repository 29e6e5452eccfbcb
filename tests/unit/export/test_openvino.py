"""OpenVINO as second runtime: agreement, speed and latency of the same files; two bits refused beforehand."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, PlanSite, quantize
from hawq_lightning.export import compare
from hawq_lightning.export.onnx import layer_latencies, measure_file, open_session
from tests.unit.export.test_other_tools import network

onnx = pytest.importorskip("onnx")
HELPER = onnx.helper


def product(kind: int) -> bytes:
    """x times a weight of 2 x 2 in some type."""
    codes = HELPER.make_tensor("codes", kind, [2, 2], [1, 0, 1, -1])
    values = [codes, onnx.numpy_helper.from_array(np.float32(0.5), "scale")]
    nodes = [
        HELPER.make_node("DequantizeLinear", ["codes", "scale"], ["w"]),
        HELPER.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    ports = [HELPER.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 2]) for n in "xy"]
    graph = HELPER.make_graph(nodes, "product", ports[:1], ports[1:], values)
    opset = 25 if kind == onnx.TensorProto.INT2 else 21
    return HELPER.make_model(graph, opset_imports=[HELPER.make_opsetid("", opset)], ir_version=10).SerializeToString()


def test_two_bits_are_refused_in_a_sentence_and_a_missing_extra_is_named(tmp_path, monkeypatch):
    from tests.internals import internal

    refuse = internal("export.onnx._openvino").refuse_two_bits
    with pytest.raises(HawqError, match="reads no INT2, in which 1 of the file's weights are stored .'codes' first"):
        refuse(product(onnx.TensorProto.INT2))
    refuse(product(onnx.TensorProto.INT8))
    with pytest.raises(HawqError, match="is no ONNX file"):
        refuse(b"no")
    with pytest.raises(HawqError, match="no runtime 'tensorrt'; there are onnxruntime and openvino"):
        open_session("tensorrt", product(onnx.TensorProto.INT8))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(HawqError, match=r"needs openvino.*hawq-lightning\[openvino\]"):
        measure_file(tmp_path / "none.onnx", (2,), runtime="openvino")


def test_it_runs_the_file_as_the_network_does(tmp_path):
    pytest.importorskip("openvino")
    from hawq_lightning.export import to_onnx

    net, plan, x = network(zero=100)
    plan = plan.replace(sites=tuple(replace(s, bits=8) for s in plan.sites))
    quantize(net, plan)
    to_onnx(net, plan, x, tmp_path / "m.onnx")
    found = compare(net, tmp_path / "m.onnx", [x], runtime="openvino")
    assert found.same == 5 and found.difference < 1e-5 and not found.codes
    assert str(found).startswith("openvino agrees on 5 of 5") and "flipped" not in str(found)
    speed = measure_file(tmp_path / "m.onnx", (2, 4, 4), batch=2, seconds=0.01, runtime="openvino")
    assert speed.ms > 0 and speed.images_per_second > 0
    rows = layer_latencies(net, plan, (x,), weight_bits=(2,), runtime="openvino")
    assert {(r["layer"], r["weight_bits"]) for r in rows} == {(n, b) for n in ("0", "4") for b in (2, 8)}
    two = quantize(nn.Sequential(nn.Linear(4, 4)).eval(), narrow := plan_of_two_bits())
    to_onnx(two, narrow, torch.rand(2, 4), tmp_path / "two.onnx")
    types = {t.data_type for t in onnx.load(str(tmp_path / "two.onnx")).graph.initializer}
    if onnx.TensorProto.INT2 in types:  # its storage is the exporter's choice
        with pytest.raises(HawqError, match="OpenVINO reads no INT2"):
            compare(two, tmp_path / "two.onnx", [torch.rand(2, 4)], runtime="openvino")
    else:
        assert compare(two, tmp_path / "two.onnx", [torch.rand(2, 4)], runtime="openvino").difference < 1e-5


def plan_of_two_bits():
    from hawq_lightning import Plan

    return Plan((PlanSite("0.weight", "weight", ("0",), (4, 4), 16, 2, "affine"),))
