"""Networks as programs of integers: the same to the bit wherever they run, and close to onnxruntime's kernels."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, Plan, PlanSite, quantize, sites
from hawq_lightning.export import compare, export, kernel_differences, to_integer_only
from hawq_lightning.export.onnx import session, vector_instructions
from tests.deployed_networks import NETWORKS
from tests.internals import internal
from tests.unit.export.test_onnx import CIFAR, WEIGHTS
from tests.unit.export.test_onnx import planned as plain_plan

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from onnx.reference import ReferenceEvaluator  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
INTEGERS = {"UINT8", "INT32", "INT64", "UINT64"}


class Member(nn.Module):
    """A generated network: a stem, some of the parts that networks are built of, a head."""

    def __init__(self, seed: int, parts: tuple[str, ...]) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.parts = parts
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.norm.weight.data = torch.linspace(-1.2, 1.3, 8)  # folded, some scales are negative
        self.norm.bias.data = torch.randn(8) / 4
        self.layers = nn.ModuleDict({p: self.layer(p) for p in parts})
        self.head = nn.Linear(8, 5)

    def layer(self, part: str) -> nn.Module:
        groups = {"depthwise": 8, "groups": 2}.get(part, 1)
        return nn.Conv2d(8, 4 if part == "concat" else 8, 3, padding=1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for part, conv in self.layers.items():
            y = conv(x)
            if part == "residual":
                x = F.relu(y + x)
            elif part == "concat":
                x = torch.cat([F.relu6(y), y], 1)
            elif part == "product":
                x = x * torch.sigmoid(y)
            elif part == "swish":
                x = F.silu(y) + F.hardswish(y)
            elif part == "leaky":
                x = F.leaky_relu(y, 0.1)
            elif part == "pool":
                x = F.avg_pool2d(F.relu(y), 3, 2, 1, count_include_pad=False)
            elif part == "largest":
                x = F.max_pool2d(F.relu(y), 3, 2, 1)
            elif part == "nearest":
                x = x + F.interpolate(F.max_pool2d(y, 2), scale_factor=2)
            elif part == "shortcut":
                x = F.relu(conv(x)[:, :, ::2, ::2] + F.pad(x[:, 2:, ::2, ::2], (0, 0, 0, 0, 1, 1)))
            else:
                x = F.relu(y)
        return self.head(x.mean((2, 3)))


def planned(net: nn.Module, x, widths=(8, 3, 5), grids=(8,), code: str = "affine") -> Plan:
    """Widths in turn, activation grids over the range of ``x``."""
    inputs = x if isinstance(x, tuple) else (x,)
    table = sites(net, inputs, forward=lambda m, batch: m(*batch))
    seen: dict[str, tuple[float, float]] = {}

    def note(name: str):
        def hook(module, args):
            seen[name] = (min(0.0, float(args[0].min())), max(1e-3, float(args[0].max())))

        return hook

    handles = [net.get_submodule(n).register_forward_pre_hook(note(n)) for s in table.activations for n in s.layers]
    with torch.no_grad():
        net(*inputs)
    for handle in handles:
        handle.remove()
    chosen = [
        PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, widths[i % len(widths)], code)
        for i, s in enumerate(table.weights)
    ]
    for i, s in enumerate(table.activations):
        low, high = min(seen[n][0] for n in s.layers), max(seen[n][1] for n in s.layers)
        bits = grids[i % len(grids)]
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step)
        chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, "affine", step, zero))
    return Plan(tuple(chosen), table.layers)


def types_of(path) -> set[str]:
    """Of every tensor in a file, inputs and outputs of the network too."""
    proto = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True)
    name = onnx.TensorProto.DataType.Name
    tensors = {o for n in proto.graph.node for o in n.output}
    known = {v.name: v for v in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)}
    assert tensors <= set(known), "a tensor's type is not known"
    stored = {name(t.data_type) for t in proto.graph.initializer}
    return stored | {name(v.type.tensor_type.elem_type) for v in known.values()}


def agree(net: nn.Module, plan: Plan, x, path, **how):
    """Write, run in numpy, onnxruntime and onnx's evaluator, compare to the bit; outputs beside the network's."""
    made = to_integer_only(net, plan, x, path, batches=[x], **how)
    assert types_of(path) <= INTEGERS
    xs = {"input": x} if isinstance(x, torch.Tensor) else {f"input_{i}": y for i, y in enumerate(x)}
    run, feed = session(path), made.network.codes({k: y.numpy() for k, y in xs.items()})
    ours, theirs = made.network.run(feed), run.run(None, feed)
    evaluated = ReferenceEvaluator(onnx.load(str(path))).run(None, feed)
    assert len(theirs) == len(made.network.outputs)
    for port, a, b in zip(made.network.outputs, theirs, evaluated):
        assert ours[port.name].dtype == a.dtype == b.dtype == np.dtype(port.dtype)
        assert np.array_equal(ours[port.name], a) and np.array_equal(a, b)
    return made, made.network.outputs[0].values(theirs[0])


PARTS = [
    (("residual", "depthwise", "concat", "pool"), (8, 3, 5), (8, 8, 5)),
    (("product", "swish"), (8, 4), (8, 6)),
    (("shortcut", "largest"), (2, 8), (4, 3)),
    (("nearest", "leaky", "groups"), (6, 7), (8, 5)),
]


@pytest.mark.parametrize(
    ("seed", "parts", "widths", "grids"),
    [pytest.param(i, *p, marks=[pytest.mark.stress] if i else []) for i, p in enumerate(PARTS)],
)
def test_generated_networks_are_the_same_everywhere_and_close_to_the_kernels(tmp_path, seed, parts, widths, grids):
    net = Member(seed, parts).eval()
    x = torch.randn(6, 3, 8, 8) * torch.linspace(0.2, 3, 6).reshape(-1, 1, 1, 1)
    plan = planned(net, x, widths, grids)
    quantize(net, plan)
    made, outputs = agree(net, plan, x, tmp_path / "m.onnx")
    with torch.no_grad():
        wanted = net(x).numpy()
    (kernels,) = session(made.kernels).run(None, {"input": x.numpy()})
    assert wanted.std(0).min() > 1e-3 and len(made.network.steps) > 6
    assert np.abs(outputs - kernels).max() < 0.05 * np.abs(kernels).max()
    found = kernel_differences(made, [x])
    assert found.images == 6 and {"stem", *(f"layers.{p}" for p in parts)} <= set(found.layers)
    if vector_instructions() or max(widths) < 8:  # else the kernels' sums of products of 8-bit weights saturate
        assert sum(v.one_step for v in found.layers.values()) <= 2
        assert max(v.largest for v in found.layers.values()) <= 4
    about = {e.key: e.value for e in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    assert about["hawq_lightning.form"] == "integer_only", "the file alone says what its integers stand for"
    assert json.loads(about["hawq_lightning.inputs"])[0]["scale"] == made.network.inputs[0].scale
    compared = compare(net, tmp_path / "m.onnx", [x])
    assert compared.images == 6 and abs(compared.difference - np.abs(outputs - wanted).max()) < 1e-6
    with pytest.raises(HawqError, match="reads UINT8 codes under the name 'input'"):
        made.network.run({"input": x.numpy()})
    with pytest.raises(HawqError, match="no images"):
        kernel_differences(made, [])


@pytest.mark.stress
@pytest.mark.parametrize("code", ["affine", "midrise"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_people_deploy_are_the_same_everywhere_or_are_refused(tmp_path, name, code):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(4, *shape)
    lacking = {"gru": "GRU", "lstm": "LSTM", "attention": "Softmax", "encoder_layer": "Softmax", "transformer_block":
               "Softmax", "upsample_bilinear": "Resize"}  # fmt: skip
    operator = lacking.get(name)
    plan = plain_plan(net, x, code, lambda i: 7) if operator else planned(net, x, (7, 3, 5), code=code)
    quantize(net, plan)
    if operator:
        with pytest.raises(HawqError, match=rf"{operator}.* no integer form"):
            to_integer_only(net, plan, x, tmp_path / "m.onnx")
        assert not list(tmp_path.iterdir())
        return
    _, outputs = agree(net, plan, x, tmp_path / "m.onnx")
    with torch.no_grad():
        wanted = net(x).numpy()
    assert wanted.std() > 1e-3 and np.abs(outputs - wanted).mean() < 0.15 * wanted.std()


@pytest.mark.stress
def test_eight_odd_bits_and_several_inputs_take_integers_too(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            a = F.relu(self.a(x))
            return self.c(a), a + self.b(y)

    net, x = Two().eval(), (torch.randn(7, 6), torch.randn(7, 4))
    plan = planned(net, x, (8,), code="midrise")
    quantize(net, plan)
    with torch.no_grad():
        wanted = net(*x)[0].numpy()
    made, outputs = agree(net, plan, x, tmp_path / "m.onnx", multiplier_bits=16)
    assert len(made.network.inputs) == 2 and len(made.network.outputs) == 2
    assert np.abs(outputs - wanted).max() < 0.1
    _, fixed = agree(net, plan, x, tmp_path / "fixed.onnx", multiplier_bits=16, free_batch=False)
    assert np.array_equal(fixed, outputs) and session(tmp_path / "fixed.onnx").get_inputs()[0].shape == [7, 6]
    with pytest.raises(HawqError, match="networks with one input"):
        kernel_differences(made, [x[0]])


def test_what_has_no_integer_form_is_said_before_anything_is_written(tmp_path):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.softmax(self.b(self.norm(self.a(x))), 1)

    net, x = Normed().eval(), torch.randn(4, 6)
    plan = planned(net, x)
    quantize(net, plan)
    path = tmp_path / "folder" / "m.onnx"
    with pytest.raises(HawqError, match="LayerNormalization and Softmax have no integer form"):
        export(net, plan, tmp_path / "m.onnx", "integer_only", example_input=x)
    for bits in (7, 32, 8.0, True):
        with pytest.raises(HawqError, match="multiplier_bits=.* must be a whole number from 8 to 31"):
            to_integer_only(net, plan, x, path, multiplier_bits=bits)
    assert not list(tmp_path.iterdir())


def test_a_dyadic_number_rounds_like_the_real_one_and_never_leaves_64_bits():
    dyadic = internal("export.onnx.integer_only._dyadic").dyadic
    rng = np.random.default_rng(0)
    for _ in range(200):
        count, bits = int(rng.integers(1, 4)), int(rng.integers(8, 32))
        ratios = [rng.normal(size=5) * 10.0 ** rng.uniform(-12, 1) for _ in range(count)]
        ratios[0][0] = 0
        zeros = [int(z) for z in rng.integers(0, 256, count)]
        reach = int(10 ** rng.uniform(2, 9.3))
        constant = rng.normal(size=5) * 100
        numbers = dyadic(ratios, zeros, [reach] * count, constant, 256, bits)
        assert (numbers.shift >= 0).all() and (numbers.shift < 62).all()
        xs = [np.concatenate([rng.integers(-reach, reach + 1, 5), [reach] * 5, [-reach] * 5]).reshape(3, 5)
              for _ in range(count)]  # fmt: skip
        exact = [sum(int(b[j]) * int(x[i, j]) for b, x in zip(numbers.multipliers, xs)) + int(numbers.offset[j])
                 for i in range(3) for j in range(5)]  # fmt: skip
        assert max(map(abs, exact)) < 2**63 and all((np.abs(b) < 2**bits + 1).all() for b in numbers.multipliers)
        real = sum(r * (x - z) for r, x, z in zip(ratios, xs, zeros)) + constant
        found = np.asarray([e >> int(numbers.shift[k % 5]) for k, e in enumerate(exact)]).reshape(3, 5)
        # half a step, and what each rounded multiplier can be off
        allowed = 0.5 + (sum(np.abs(x - z) for x, z in zip(xs, zeros)) + 1) * 0.5 / 2.0**numbers.shift + 1e-6
        assert (np.abs(found - real) <= allowed * (1 + 1e-9)).all()
    with pytest.raises(HawqError, match="no dyadic number holds their ratio"):
        dyadic([np.asarray(1e12)], [0], [1 << 30], np.zeros(()), 256)


@pytest.mark.stress
def test_trained_resnet20_is_the_same_on_a_thousand_images_and_gives_the_kernels_classes(tmp_path):
    if not (WEIGHTS.exists() and (CIFAR / "val").is_dir()):
        pytest.skip("needs CIFAR-10 and trained weights")
    command = [sys.executable, ROOT / "benchmarks" / "integer_only.py", "--weights", WEIGHTS, "--root", CIFAR,
               "--cases", "1", "--out", tmp_path / "found.md"]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1000 of 1000" in (tmp_path / "found.md").read_text()
