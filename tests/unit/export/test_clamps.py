"""Minima and maxima with a number, as Clip: the same values, whatever stands around them."""

import itertools

import numpy as np
import pytest
import torch

from hawq_lightning import quantize
from hawq_lightning.export import to_onnx
from tests.internals import internal
from tests.unit.export.test_onnx import planned

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

NUMBERS = {"two": 2.0, "minus": -0.5, "zero": 0.0}
LINKS = ["Relu", *itertools.product(("Min", "Max"), NUMBERS, (False, True)), ("Min", "row", False)]


def chain(links, read_twice):
    """A graph of links, and whether its first result is a second output."""
    nodes, last = [], "x"
    for i, link in enumerate(links):
        op, number, first = (link, None, False) if isinstance(link, str) else link
        reads = [last] if number is None else [number, last] if first else [last, number]
        nodes.append(helper.make_node(op, reads, [f"t{i}"]))
        last = f"t{i}"
    outputs = ["t0", last] if read_twice and last != "t0" else [last]
    stored = [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in NUMBERS.items()]
    stored.append(numpy_helper.from_array(np.float32([1, 0, 3]), "row"))
    kind = (TensorProto.FLOAT, [None, 3])
    made = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", *kind)],
                             [helper.make_tensor_value_info(n, *kind) for n in outputs], stored)  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_values_stay_and_no_number_is_left_to_a_minimum():
    clamps = internal("export.onnx._clamps").clamps_as_clip
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32) * 3
    for length, twice in itertools.product((1, 2, 3), (False, True)):
        for links in itertools.islice(itertools.product(LINKS, repeat=length), 0, None, 1 if length < 3 else 37):
            proto = chain(links, twice)
            wanted = ReferenceEvaluator(proto).run(None, {"x": x})
            found = clamps(proto)
            onnx.checker.check_model(proto, full_check=True)
            assert found == sum(not isinstance(link, str) and link[1] != "row" for link in links)
            for a, b in zip(ReferenceEvaluator(proto).run(None, {"x": x}), wanted, strict=True):
                assert np.array_equal(a, b)


def test_a_relu_that_a_branch_reads_stays():
    proto = chain(["Relu", ("Min", "two", False)], False)
    kind = (TensorProto.FLOAT, [None, 3])
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["t0"], [name])], name, [], [helper.make_tensor_value_info(name, *kind)]
        )
        for name, op in (("then", "Neg"), ("else", "Abs"))
    }
    proto.graph.input.append(helper.make_tensor_value_info("negative", TensorProto.BOOL, []))
    proto.graph.node.append(helper.make_node("If", ["negative"], ["branched"], **branches))
    proto.graph.output.append(helper.make_tensor_value_info("branched", *kind))
    feed = {"x": np.float32([[-1, 1, 3]]), "negative": np.array(True)}
    wanted = ReferenceEvaluator(proto).run(None, feed)
    assert internal("export.onnx._clamps").clamps_as_clip(proto) == 1
    onnx.checker.check_model(proto, full_check=True)
    found = ReferenceEvaluator(proto).run(None, feed)
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


class Six(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.second = (torch.nn.Conv2d(3, 3, 3, bias=False) for _ in range(2))

    def forward(self, x):
        return self.second(torch.nn.functional.relu6(self.conv(x))).relu().minimum(torch.tensor(6.0))


def test_six_is_one_clip_in_every_version_of_torch(tmp_path):
    net, x = Six().eval(), torch.randn(2, 3, 8, 8)
    plan = planned(net, x, "affine", lambda i: 8, 8)
    quantize(net, plan)
    to_onnx(net, plan, x, tmp_path / "a.onnx")
    operators = [node.op_type for node in onnx.load(str(tmp_path / "a.onnx")).graph.node]
    # a grid's own Clip is of codes, and written only below 8 bits
    assert operators.count("Clip") == 2 and not {"Relu", "Min"} & set(operators)
