"""Reductions in front of grids: the same values in any form, and in OpenVINO the right ones."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from hawq_lightning.export import to_onnx
from hawq_lightning.export.onnx import open_session
from tests.internals import internal
from tests.stress.test_runtimes import plan_for

onnx = pytest.importorskip("onnx")
HELPER = onnx.helper
SHAPE = (2, 3, 4, 5)
KINDS = ("amax", "amin", "mean", "sum", "norm")


class Reduced(nn.Module):
    """A product, a reduction over some axis (maybe behind an activation), and a product that reads it."""

    def __init__(self, kind: str, axis: int, keep: bool, after: type[nn.Module], image: bool) -> None:
        super().__init__()
        self.kind, self.axis, self.keep, self.after, self.image = kind, axis, keep, after(), image
        self.first = nn.Conv2d(6, 6, 1) if image else nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        reduced = getattr(x, self.kind)(dim=self.axis, keepdim=self.keep)
        reduced = self.after(reduced)
        return self.last(reduced.transpose(1, -1) if self.image else reduced)


def graph_of(op: str, keep: int, axes: tuple[int, ...], between: str | None, zero: int) -> bytes:
    constants = {"axes": np.array(axes), "scale": np.float32(0.03), "zero": np.uint8(zero)}
    nodes = [HELPER.make_node(op, ["x"] if op == "GlobalMaxPool" else ["x", "axes"], ["reduced"])]
    if op != "GlobalMaxPool":
        nodes[0].attribute.append(HELPER.make_attribute("keepdims", keep))
    read = "reduced"
    if between:
        nodes.append(HELPER.make_node(between, [read], ["between"]))
        read = "between"
    nodes.append(HELPER.make_node("QuantizeLinear", [read, "scale", "zero"], ["codes"]))
    nodes.append(HELPER.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]))
    y = np.zeros(SHAPE).sum(axes, keepdims=bool(keep)).shape
    values = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    ports = [HELPER.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", SHAPE), ("y", y))]
    graph = HELPER.make_graph(nodes, "reduced", ports[:1], ports[1:], values)
    return HELPER.make_model(graph, opset_imports=[HELPER.make_opsetid("", 21)], ir_version=10).SerializeToString()


CASES = [
    *product(
        ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum"), (0, 1), ((1,), (2, 3)), (None, "Sigmoid"), (0, 128)
    ),
    ("GlobalMaxPool", 1, (2, 3), None, 128),
]


def test_parted_reductions_give_the_same_floats():
    pytest.importorskip("onnxruntime")
    part = internal("export.onnx._reductions").part_reductions
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    for case in CASES:
        before = graph_of(*case)
        proto = onnx.load_from_string(before)
        assert part(proto) == (case[0] in ("ReduceMax", "ReduceMin", "GlobalMaxPool") or not case[1])
        onnx.checker.check_model(proto, full_check=True)
        made = {o: n.op_type for n in proto.graph.node for o in n.output}
        for node in proto.graph.node:  # nothing reads a maximum, or a reduction that drops axes, but what parts it
            if node.op_type in ("QuantizeLinear", "Sigmoid"):
                assert made[node.input[0]] not in ("ReduceMax", "ReduceMin", "GlobalMaxPool")
        old, new = (open_session("onnxruntime", g).run(None, {"x": x})[0] for g in (before, proto.SerializeToString()))
        assert old.shape == new.shape and (old == new).all()


def test_a_reduction_that_no_grid_reads_stays():
    part = internal("export.onnx._reductions").part_reductions
    proto = onnx.load_from_string(graph_of("ReduceMax", 0, (1,), None, 128))
    del proto.graph.node[1:]
    proto.graph.output[0].name = "reduced"
    before = proto.SerializeToString()
    assert part(proto) == 0 and proto.SerializeToString() == before


MEMBERS = list(product(KINDS, (1, 2), (False, True), (nn.Identity, nn.ReLU), (False, True)))


@pytest.mark.parametrize("form", ["exact", "integer"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.stress)])
def test_openvino_computes_reductions_as_the_network_does(form, seed, tmp_path):
    pytest.importorskip("openvino")
    from hawq_lightning import quantize

    rng = np.random.default_rng(seed)
    for chosen in rng.permutation(len(MEMBERS))[: 4 if seed == 0 else None]:
        kind, axis, keep, after, image = MEMBERS[chosen]
        if image and (axis == 1 or not keep):
            continue  # the product behind it wants the channels
        torch.manual_seed(int(chosen))
        net = Reduced(kind, axis, keep, after, image).eval()
        x = torch.randn(4, 6, 5, 6) if image else torch.randn(4, 5, 7, 6)
        plan = plan_for(net, x, mixed=False)
        quantize(net, plan)
        to_onnx(net, plan, x, tmp_path / "m.onnx", integer=form == "integer")
        wanted = net(x).detach().numpy()
        opened = open_session("openvino", tmp_path / "m.onnx")
        (outputs,) = opened.run(None, {opened.get_inputs()[0].name: x.numpy()})
        assert outputs.shape == wanted.shape
        apart = float(np.abs(outputs - wanted).mean() / wanted.std())
        assert apart < 0.06, (kind, axis, keep, after.__name__, image, apart)
