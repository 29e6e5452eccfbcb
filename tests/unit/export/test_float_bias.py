"""Biases of exported layers are nodes of their own, of the layer's output channels however its weight lies."""

import numpy as np
import pytest
import torch
from torch import nn

from hawq_lightning.export import to_onnx
from hawq_lightning.export.onnx import compare
from tests.internals import internal
from tests.unit.export.test_fixed_shapes import quantized

onnx = pytest.importorskip("onnx")

NODES = {
    "gemm [out, in]": ("Gemm", (3, 5), [2, 5], 3, {"transB": 1}),
    "gemm [in, out]": ("Gemm", (5, 3), [2, 5], 3, {"transB": 0}),
    "gemm, no attribute": ("Gemm", (5, 3), [2, 5], 3, {}),
    "conv": ("Conv", (4, 2, 3), [2, 2, 8], 4, {}),
    "conv, groups": ("Conv", (4, 1, 3), [2, 2, 8], 4, {"group": 2}),
    "transposed": ("ConvTranspose", (4, 3, 3), [2, 4, 8], 3, {}),
    "transposed, groups": ("ConvTranspose", (4, 3, 3), [2, 4, 8], 6, {"group": 2}),
}


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_of_its_own_fits_the_layer(name, bias):
    op, shape, reads, channels, attributes = NODES[name]
    helper, arrays = onnx.helper, onnx.numpy_helper
    stored = [arrays.from_array(np.ones(shape, np.int8), "codes"), arrays.from_array(np.float32(0.1), "scale")]
    stored += [arrays.from_array(np.ones(channels, np.float32), "b")] if bias else []
    gives = [2, channels, *(["length"] * (len(shape) - 2))]
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"]),
        helper.make_node(op, ["x", "w", *(["b"] if bias else [])], ["y"], **attributes),
    ]
    ports = [[helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s)] for n, s in (("x", reads), ("y", gives))]
    graph = helper.make_graph(nodes, "layer", *ports, stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert internal("export.onnx._float_bias").split_bias(proto, ["codes"]) == 1
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    assert inferred.graph.output[0].type.tensor_type.shape.dim[1].dim_value == channels


@pytest.mark.stress
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("attention", [True, False])
def test_gpt2_is_exported_with_biases_as_they_are_drawn(tmp_path, zero, attention):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    net, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 20, (2, 6))
    if not zero:
        for module in net.modules():
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                nn.init.normal_(module.bias)
    net, plan = quantized(net, (tokens,), attention=attention)
    to_onnx(net, plan, tokens, tmp_path / "net.onnx")
    assert compare(net, tmp_path / "net.onnx", [tokens]).difference < 1e-4
