"""Operators between two grids as integer arithmetic, each in a small graph: numpy, onnxruntime and onnx's evaluator."""

import numpy as np
import pytest

from tests.internals import internal

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

SHAPE = (2, 4, 7, 6)


def node(op, *more, **attributes):
    """A chain's link: it reads the last tensor, and constants."""
    return op, more, attributes


def ints(*values):
    return np.asarray(values, np.int64)


NORM = np.float32([[1, -2, 0.5, 0], [0.1, 0, -1, 0.3], [0, 1, 0, 0], [1, 2, 1, 1]])
CHAINS = {
    "sigmoid": [node("Sigmoid")],
    "hard swish": [node("HardSwish")],
    "leaky, then a sum": [node("LeakyRelu", alpha=0.2), node("Add", "x")],
    "times its own sigmoid": [node("Sigmoid"), node("Mul", "x")],
    "a product": [node("Mul", "y")],
    "a product of functions": [node("Tanh"), node("Mul", "y")],
    "sum, difference, factor": [node("Add", "y"), node("Sub", "x"), node("Mul", np.float32(-1.7)), node("Sub", "x")],
    "divided, shifted": [node("Div", np.float32(3)), node("Add", np.float32([[[0.3]], [[-1]], [[0]], [[0.5]]]))],
    "negative": [node("Neg"), node("Add", "y"), node("Relu")],
    "clamped sum added": [node("Add", "y"), node("Clip", np.float32(-0.5), np.float32(0.8)), node("Add", "y")],
    "batch norm": [node("BatchNormalization", *NORM)],
    "convolution of eight odd bits": [node("Conv", "w", np.float32([0.3, -0.2]), group=2, pads=[1, 0, 1, 1])],
    "dilated, to a clamped sum": [node("Conv", "w", group=2, dilations=[2, 1]), node("Relu"), node("Neg")],
    "transposed convolution": [node("ConvTranspose", "u", np.float32([0.3, -0.2, 0, 0.1, 0, 1]), group=2,
                                    strides=[3, 2], pads=[1, 0, 0, 2], output_padding=[1, 0])],
    "transposed, dilated": [node("ConvTranspose", "u", group=2, dilations=[1, 2]), node("Relu")],
    "product over the last axis": [node("MatMul", "v"), node("Add", np.float32([0.5, 0, -1, 0.25, 1]))],
    "concat": [node("Concat", "y", axis=1), node("Relu")],
    "concat of functions": [node("Sigmoid"), node("Concat", "y", axis=3)],
    "average, padded": [node("AveragePool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1])],
    "average, padding counts": [node("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)],
    "average, ceil": [node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)],
    "average, same": [node("AveragePool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")],
    "largest, padded": [node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])],
    "largest, ceil": [node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)],
    "global": [node("GlobalAveragePool"), node("Flatten", axis=1)],
    "mean of one axis": [node("ReduceMean", ints(2), keepdims=0)],
    "mean of a function": [node("Exp"), node("ReduceMean", ints(1, -1), keepdims=1)],
    "sum": [node("ReduceSum", ints(3), keepdims=0)],
    "nearest": [node("Resize", None, np.float32([1, 1, 2, 3]), mode="nearest", nearest_mode="floor",
                     coordinate_transformation_mode="asymmetric")],
    "moved": [node("Transpose", perm=[0, 2, 3, 1]), node("Reshape", ints(0, -1, 4)), node("Unsqueeze", ints(1)),
              node("Squeeze", ints(1))],
    "cut and padded": [node("Slice", ints(1, 5), ints(6, 0), ints(2, 3), ints(2, -1)),
                       node("Pad", ints(0, 1, 0, 0, 0, 0, 2, 0))],
    "sums moved": [node("Add", "y"), node("Relu"), node("Transpose", perm=[0, 2, 3, 1])],
    "picked": [node("Gather", ints(2, 0), axis=1), node("Expand", ints(2, 2, 7, 6)), node("Identity")],
    "depth to space": [node("DepthToSpace", blocksize=2, mode="CRD")],
    "space to depth": [node("Slice", ints(0, 0), ints(4, 4), ints(2, 3)), node("SpaceToDepth", blocksize=2)],
}  # fmt: skip


def graph(chain, rounded: bool, zero: int):
    """Two inputs on grids of their own, a chain behind the first, and a grid behind it or none."""
    stored: dict[str, np.ndarray] = {}

    def keep(name, value):
        stored[name] = np.asarray(value)
        return name

    nodes = []
    for name, scale, middle in (("x", 0.021, zero), ("y", 0.013, 90)):
        grid = [keep(f"{name}.scale", np.float32(scale)), keep(f"{name}.zero", np.uint8(middle))]
        nodes.append(helper.make_node("QuantizeLinear", [f"{name}.in", *grid], [f"{name}.codes"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.codes", *grid], [name]))
    rng = np.random.default_rng(0)
    wide = 2 * rng.integers(-128, 128, (2, 2, 3, 3)) + 1  # midrise levels of 8 bits
    wide[0, 0, 0, :2] = -255, 255
    flat, deep = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((6, 5), (4, 3, 3, 3)))
    for name, codes, axis in (("w", wide.astype(np.int16), 0), ("v", flat, 1), ("u", deep, 1)):
        scales = np.float32([0.002, -0.001, 0.003, 0.004, 0.0])[: codes.shape[axis]]
        reads = [keep(f"{name}.codes", codes), keep(f"{name}.scale", scales)]
        nodes.append(helper.make_node("DequantizeLinear", reads, [name], axis=axis))
    last = "x"
    for i, (op, more, attributes) in enumerate(chain):
        reads = [m if isinstance(m, str) else "" if m is None else keep(f"{i}.{k}", m) for k, m in enumerate(more)]
        nodes.append(helper.make_node(op, [last, *reads], [f"t{i}"], name=f"{op}{i}", **attributes))
        last = f"t{i}"
    if rounded:
        grid = [keep("out.scale", np.float32(0.017)), keep("out.zero", np.uint8(120))]
        top = [keep("out.low", np.uint8(0)), keep("out.top", np.uint8(200))]
        nodes.append(helper.make_node("QuantizeLinear", [last, *grid], ["wide"]))
        nodes.append(helper.make_node("Clip", ["wide", *top], ["out.codes"]))
        nodes.append(helper.make_node("DequantizeLinear", ["out.codes", *grid], ["out"]))
        last = "out"
    made = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(f"{n}.in", TensorProto.FLOAT, SHAPE) for n in "xy"],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in stored.items()],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(proto, feed):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)[
        0
    ]


@pytest.mark.parametrize("name", CHAINS)
def test_an_operator_is_the_same_everywhere_and_that_of_real_numbers(name):
    if name == "space to depth" and tuple(int(n) for n in ort.__version__.split(".")[:2]) < (1, 28):
        pytest.skip("onnxruntime has SpaceToDepth of UINT8 since 1.28; torch writes it as Reshape and Transpose")
    read = internal("export.onnx.integer_only._real_nodes").read
    certificate = internal("export.onnx.integer_only._certificate").Certificate
    graphs = internal("export.onnx.integer._graph").Graph
    rng = np.random.default_rng(len(name))
    images = {f"{n}.in": (rng.normal(size=SHAPE) * 1.3).astype(np.float32) for n in "xy"}
    for rounded, zero in ((True, 130), (False, 0)):
        proto = graph(CHAINS[name], rounded, zero)
        program = read(graphs(proto), 31)
        written = certificate(program, {k: v.shape for k, v in images.items()}, False).proto()
        onnx.checker.check_model(written, full_check=True)
        feed = program.codes(images)
        (port,) = program.outputs
        ours, theirs = program.run(feed)[port.name], run(written, feed)
        evaluated = ReferenceEvaluator(written).run(None, feed)[0]
        assert np.array_equal(ours, evaluated) and np.array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype == evaluated.dtype == np.dtype(port.dtype)
        wanted = run(proto, images)
        assert wanted.shape == ours.shape and wanted.std() > 0.01
        apart = np.abs(port.values(ours) - wanted)
        # one code where two roundings fall on two sides; without a grid what 15 bits of a function's table leave
        assert apart.max() < (0.0171 if rounded else 2e-3) and (apart > 1e-3).mean() < 0.02
