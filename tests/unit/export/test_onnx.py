"""ONNX files: standard operators, real low-bit weights, the trained network's outputs; errors; torch.export."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hawq_lightning import (
    HawqError,
    Plan,
    PlanSite,
    candidates,
    load_packed,
    measure,
    quantize,
    save_packed,
    select,
    sites,
)
from hawq_lightning.export import compare, export, network_of, to_onnx, to_program
from hawq_lightning.export.onnx import float_onnx, session
from hawq_lightning.models import resnet20
from hawq_lightning.selection import Problem
from tests.unit.export.test_folding import enabled
from tests.unit.export.test_packed import enable, random_plan

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
WEIGHTS = Path(__file__).resolve().parents[4] / "shared" / "data" / "resnet20_cifar10.pt"
CIFAR = Path("/tmp/data/cifar10")


class Widths(nn.Module):
    """One layer for every width."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = F.relu(layer(x)) + 0.5 * x
        return x.mean((2, 3))


def planned(model: nn.Module, x: torch.Tensor, code: str, weight_bits, activation_bits=8) -> Plan:
    table = sites(model, x)
    chosen = []
    for i, s in enumerate(table.weights):
        chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, weight_bits(i), code))
    for i, s in enumerate(table.activations):
        bits = activation_bits(i) if callable(activation_bits) else activation_bits
        zero = 1 << (bits - 1)
        chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, "affine", 6 / 2**bits, zero))
    return Plan(tuple(chosen), table.layers, budget="8x")


def initializers(path) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in onnx.load(str(path)).graph.initializer}


@pytest.mark.parametrize(
    ("code", "types"),
    [
        ("affine", ["INT2", "INT2", "INT4", "INT4", "INT8", "INT8", "INT8", "INT8"]),
        ("midrise", ["INT2", "INT2", "INT4", "INT8", "INT8", "INT8", "INT8", "INT16"]),
    ],
)
def test_every_width_gets_its_type_and_its_exact_values(tmp_path, code, types):
    torch.manual_seed(0)
    net, x = Widths().eval(), torch.randn(3, 4, 6, 6)
    plan = planned(net, x, code, lambda i: max(i + 1, 2) if code == "affine" else i + 1, lambda i: i % 7 + 2)
    quantize(net, plan)
    to_onnx(net, plan, x, tmp_path / "a.onnx", storage="native")
    stored = initializers(tmp_path / "a.onnx")
    for i, layer in enumerate(net.layers):
        name = f"layers.{i}.weight_quantizer"
        tensor = stored[f"{name}.codes"]
        assert onnx.TensorProto.DataType.Name(tensor.data_type) == types[i]
        assert len(tensor.raw_data) == layer.weight.numel() * int(types[i][3:]) // 8
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        half = f"{name}.scale.half" in stored  # two midrise bits
        assert half is (code == "midrise" and i == 1)
        scale = onnx.numpy_helper.to_array(stored[f"{name}.scale{'.doubled' if half else ''}"]).reshape(-1, 1, 1, 1)
        added = onnx.numpy_helper.to_array(stored[f"{name}.scale.half"]) if half else 0
        assert np.array_equal(values * scale + added, layer.quantized_weight.detach().numpy())
    proto = onnx.load(str(tmp_path / "a.onnx"))
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert proto.opset_import[0].version == 25
    tops = {int(onnx.numpy_helper.to_array(stored[n.input[2]])) for n in proto.graph.node if n.op_type == "Clip"}
    assert tops == {2**b - 1 for b in range(2, 8)}, "a grid narrower than UINT8 needs its clip"
    found = compare(net, tmp_path / "a.onnx", [torch.randn(5, 4, 6, 6) * 3])
    assert found.share == 1 and found.difference < 1e-4 and sum(found.flipped.values()) == 0
    assert set(found.codes) == {f"layers.{i}.input" for i in range(8)}


def test_two_bits_alone_need_the_newest_opset(tmp_path):
    net, x = Widths().eval(), torch.randn(2, 4, 6, 6)
    plan = planned(net, x, "affine", lambda i: 4)
    to_onnx(quantize(net, plan), plan, x, tmp_path / "a.onnx", storage="native")
    assert onnx.load(str(tmp_path / "a.onnx")).opset_import[0].version == 21


@pytest.mark.parametrize(("bits", "kind"), [(4, "INT4"), (8, "INT8")])
def test_weights_have_zero_points_of_their_type_which_older_runtimes_need(tmp_path, bits, kind):
    net, x = Widths().eval(), torch.randn(2, 4, 6, 6)
    plan = planned(net, x, "affine", lambda i: bits)
    to_onnx(quantize(net, plan), plan, x, tmp_path / "a.onnx", storage="native")
    proto, stored = onnx.load(str(tmp_path / "a.onnx")), initializers(tmp_path / "a.onnx")
    reads = [n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    assert len(reads) == 8
    for node in reads:
        zero = stored[node.input[2]]
        assert onnx.TensorProto.DataType.Name(zero.data_type) == kind
        assert list(zero.dims) == [4] and not onnx.numpy_helper.to_array(zero).astype(int).any()


class Moving(nn.Module):
    """Layers without bias whose values are only moved before they are quantized again; the last has one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(4, 4, 3, padding=1, bias=False, groups=1 + 3 * (i == 3)) for i in range(6)
        )
        self.mix = nn.Linear(6, 6, bias=False)
        self.one = nn.Conv2d(4, 1, 3, padding=1, bias=False)
        self.out = nn.Linear(18, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d, e, f = self.layers
        x = F.max_pool2d(F.relu(a(x)), 2)
        x = c(b(x).transpose(2, 3))
        x = d(x.reshape(x.shape[0], 4, 9, -1))[:, :, 1:7]
        x = F.dropout(e(x), training=self.training)
        x = f(x[..., :3].unsqueeze(0).squeeze(0))
        x = self.mix(x.transpose(2, 3))
        return self.out(self.one(x).flatten(1))


def test_two_bits_run_whatever_moves_their_outputs_to_the_next_grid(tmp_path):
    torch.manual_seed(0)
    net, x = Moving().eval(), torch.randn(3, 4, 12, 12)
    plan = planned(net, x, "affine", lambda i: 2)
    # after a ReLU: a grid from 0 lets onnxruntime drop the ReLU
    chosen = [replace(s, zero_point=0) if s.name == "layers.1.input" else s for s in plan.sites]
    plan = plan.replace(sites=tuple(chosen))
    quantize(net, plan)
    to_onnx(net, plan, x, tmp_path / "a.onnx", storage="native")
    found = compare(net, tmp_path / "a.onnx", [x])
    assert found.difference < 1e-4 and sum(found.flipped.values()) == 0 and len(found.codes) == 9
    stored = initializers(tmp_path / "a.onnx")
    kinds = {s.layers[0]: stored[f"{s.layers[0]}.weight_quantizer.codes"].data_type for s in plan.weights}
    wide = onnx.TensorProto.INT4  # a single zero is no obstacle to onnxruntime
    assert kinds == {n: wide if n == "one" else onnx.TensorProto.INT2 for n in kinds}


def test_weights_alone_are_compared_too(tmp_path):
    net, x = Moving().eval(), torch.randn(3, 4, 12, 12)
    plan = planned(net, x, "affine", lambda i: 2)
    plan = plan.replace(sites=plan.weights)
    quantize(net, plan)
    to_onnx(net, plan, x, tmp_path / "a.onnx")
    found = compare(net, tmp_path / "a.onnx", [x])
    assert found.difference < 1e-4 and not found.codes and found.images == 3


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network of all kinds of layers and norms with its input, plan, what was exported, and its file."""
    path = tmp_path_factory.mktemp("exported") / "a.onnx"
    net, x, plan = enabled(1)
    return net, x, plan, to_onnx(net, plan, x, path), path


@pytest.mark.parametrize("fold", [True, False])
def test_all_kinds_of_layers_and_norms_run_the_same(exported, tmp_path, fold):
    net, x, plan, deployed, path = exported
    if not fold:
        path = tmp_path / "a.onnx"
        deployed = to_onnx(net, plan, x, path, fold=False)
    left = [n.op_type for n in onnx.load(str(path)).graph.node].count("BatchNormalization")
    assert bool(deployed.folding.folded) is fold and left == (14 if not fold else 5), left
    torch.manual_seed(2)
    run = session(path)
    for n in (1, 4, 9):  # the batch size is free
        images = torch.randn(n, 3, 7, 7)
        found = run.run(None, {"input": images.numpy()})[0]
        with torch.no_grad():
            wanted = deployed.model(images).numpy()
        assert found.shape == wanted.shape
        # a code at a rounding boundary may flip; nearly all values are the same
        assert np.median(np.abs(found - wanted)) < 1e-5


def test_a_shared_head_is_stored_once_and_an_activation_quantized_once(tmp_path):
    from tests.cases import SharedHead

    torch.manual_seed(0)
    net, x = SharedHead().eval(), torch.randn(2, 2, 16, 16)
    plan = planned(net, x, "affine", lambda i: 4)
    to_onnx(quantize(net, plan), plan, x, tmp_path / "a.onnx")
    proto = onnx.load(str(tmp_path / "a.onnx"))
    assert sum(t.name.endswith(".codes") for t in proto.graph.initializer) == 6
    assert [o.name for o in proto.graph.output] == ["output_0", "output_1"]
    read = [n.input[0] for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert len(read) == len(set(read)), "two quantizers read one tensor"
    found = compare(net, tmp_path / "a.onnx", [x])
    assert found.difference < 1e-4 and found.codes["score.input"] == 2 * 3 * (256 + 64 + 16)


@pytest.mark.parametrize("width", [4, 16])  # the exporter holds small equal tensors once, large ones twice
def test_layers_that_share_a_weight_are_compared(tmp_path, width):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
            self.head = nn.Linear(width, 5)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))

    torch.manual_seed(0)
    net, x = Tied().eval(), torch.randn(8, width, 8, 8)
    plan = chosen(net, (x, torch.randint(5, (8,))))
    to_onnx(quantize(net, plan), plan, x, tmp_path / "tied.onnx")
    found = compare(net, tmp_path / "tied.onnx", [x])
    assert found.same == 8 and sum(found.codes.values()) == 8 * width * (2 * 64 + 1) and not sum(found.flipped.values())


def test_a_layer_may_be_called_as_the_graphs_output(tmp_path):
    net, x = nn.Sequential(nn.Flatten()), torch.randn(2, 6)
    net.add_module("output", nn.Linear(6, 3))
    plan = planned(net.eval(), x, "affine", lambda i: 4)
    to_onnx(quantize(net, plan), plan, x, tmp_path / "a.onnx")
    assert compare(net, tmp_path / "a.onnx", [x]).difference < 1e-5


def test_metadata_says_what_it_is_and_nothing_about_this_machine(exported):
    path = exported[-1]
    proto = onnx.load(str(path))
    about = {e.key: e.value for e in proto.metadata_props}
    assert proto.producer_name == "hawq_lightning" and '"plain.weight"' in about["hawq_lightning.bits"]
    assert "share their scales" in about["hawq_lightning.not_folded"]
    raw = path.read_bytes()
    assert b".py" not in raw and b"/work" not in raw and b"/home" not in raw


def test_the_same_model_gives_the_same_file(exported, tmp_path):
    net, x, plan, _, path = exported
    to_onnx(net, plan, x, tmp_path / "b.onnx")
    assert path.read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_program_runs_in_a_process_without_this_package(tmp_path):
    net, x, plan = enabled(1)
    to_program(net, plan, x, tmp_path / "a.pt2", fold=False)
    with torch.no_grad():
        torch.save((x, net(x)), tmp_path / "io.pt")
    program = (
        "import sys, torch\nsys.modules['hawq_lightning'] = None\n"
        "run = torch.export.load('a.pt2').module()\nx, y = torch.load('io.pt')\n"
        "assert torch.equal(run(x), y), (run(x) - y).abs().max()\n"
        "assert len(run(torch.cat([x, x, x]))) == 12\n"
        "assert {t.dtype for n, t in run.named_buffers() if n.endswith('codes')} <= {torch.int8, torch.int16}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    folded = to_program(net, plan, x)
    assert folded.module()(x).shape == (4, 5)


class Odd(nn.Module):
    """Uses an operation that ONNX has not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.fc(x))


class Branchy(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize(("kind", "words"), [(Odd, "bessel_j0"), (Branchy, "cannot be exported to ONNX")])
def test_what_onnx_cannot_express_is_one_sentence(tmp_path, kind, words):
    net, x = kind().eval(), torch.randn(2, 4)
    plan = planned(net, x, "affine", lambda i: 4)
    quantize(net, plan)
    with pytest.raises(HawqError, match=words) as caught:
        to_onnx(net, plan, x, tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Graph(nn.Module):
    """Adds what neighbours send: nodes and edges have no batch axis in common."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        return torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])


def graph(nodes: int) -> tuple[nn.Module, Plan, tuple[torch.Tensor, torch.Tensor]]:
    weights = PlanSite("fc.weight", "weight", ("fc",), (3, 4), 12, 4, "affine")
    plan = Plan((weights, PlanSite("fc.input", "activation", ("fc",), (4,), 4, 8, "affine", 0.05, 128)))
    inputs = torch.randn(nodes, 4), torch.randint(0, nodes, (2, 7))
    return quantize(Graph().eval(), plan), plan, inputs


@pytest.mark.parametrize("nodes", [1, 5])
def test_a_graph_is_exported_at_its_own_size(tmp_path, nodes):
    net, plan, inputs = graph(nodes)
    program = export(net, plan, tmp_path / "net.pt2", "program", example_input=inputs, free_batch=False)
    assert torch.allclose(program.module()(*inputs), net(*inputs), atol=1e-5)


@pytest.mark.stress
def test_onnx_has_a_graph_at_its_own_size_and_says_how(tmp_path):
    net, plan, inputs = graph(5)
    with pytest.raises(HawqError, match="free_batch=False"):
        to_onnx(net, plan, inputs, tmp_path / "free.onnx")
    to_onnx(net, plan, inputs, tmp_path / "net.onnx", free_batch=False)
    given = {f"input_{i}": x.numpy() for i, x in enumerate(inputs)}
    (have,) = session(tmp_path / "net.onnx").run(None, given)
    assert torch.allclose(torch.from_numpy(have), net(*inputs), atol=1e-5)


def test_errors_leave_nothing_behind(tmp_path):
    net, x, plan = enabled(0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(HawqError, match="Cannot write"):
        to_onnx(net, plan, x, tmp_path / "file" / "a.onnx")
    with pytest.raises(HawqError, match="is a folder"):
        to_onnx(net, plan, x, tmp_path)
    with pytest.raises(HawqError, match="Cannot write"):
        to_program(net, plan, x, tmp_path / "file" / "a.pt2")
    (tmp_path / "old.onnx").write_bytes(b"old")
    with pytest.raises(HawqError, match="float"):
        to_onnx(resnet20(depth=8), None, torch.rand(2, 3, 8, 8), tmp_path / "old.onnx")
    books = plan.replace(sites=tuple(type(s)(**{**vars(s), "code": "codebook"}) for s in plan.sites))
    with pytest.raises(HawqError, match="codebook"):
        to_onnx(net, books, x, tmp_path / "old.onnx")
    assert (tmp_path / "old.onnx").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "old.onnx"]
    with pytest.raises(HawqError, match="cannot run"):
        session(tmp_path / "old.onnx")


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    net, x = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(50, 3)).eval(), torch.rand(2, 3, 7, 7)
    floats = copy.deepcopy(net)
    plan = planned(net, x, "affine", lambda i: 4)
    with pytest.raises(HawqError, match="must be a Plan"):
        to_onnx(quantize(net, plan), "plan.json", x, tmp_path / "a.onnx")
    to_onnx(net, plan, x, tmp_path / "a.onnx")
    with pytest.raises(HawqError, match=r"takes images \[N, 3, 7, 7\], not \[2, 3, 9, 9\]"):
        compare(net, tmp_path / "a.onnx", [torch.rand(2, 3, 9, 9)])
    with pytest.raises(HawqError, match="input of '0' otherwise than"):
        compare(floats, tmp_path / "a.onnx", [x])
    with pytest.raises(HawqError, match="another network's file"):
        compare(floats[:3], tmp_path / "a.onnx", [x])
    with pytest.raises(HawqError, match="no images"):
        compare(net, tmp_path / "a.onnx", [])
    with pytest.raises(HawqError, match="null byte"):
        to_onnx(net, plan, x, f"{tmp_path}/a\0.onnx")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HawqError, match="pipe: it is no ordinary file"):
        to_onnx(net, plan, x, tmp_path / "pipe")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "pipe"]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, missing):
    net, x, plan = enabled(0)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(HawqError, match=r"hawq-lightning\[export\]"):
        to_onnx(net, plan, x, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def chosen(net: nn.Module, batch, weight_bits=(2, 4, 8), budget="8x") -> Plan:
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    table = sites(net, batch)
    traces = measure(net, [batch], loss, sites=table, rtol=9, progress=False)
    found = candidates(net, [batch], traces, table, loss, weight_bits=weight_bits)
    return select(Problem(table, found, traces), budget=budget)


def trained_digits():
    """ResNet8 on the real digits, a few steps, quantized."""
    from hawq_lightning.data import DigitsDataModule

    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=64)
    data.setup("fit")
    net = resnet20(channels=8, in_channels=1, depth=8)
    tune = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    for _ in range(3):
        for x, y in data.train_dataloader():
            tune.zero_grad()
            F.cross_entropy(net(x), y).backward()
            tune.step()
    net.eval()
    plan = chosen(net, next(iter(data.train_dataloader())))
    return quantize(net, plan).eval(), plan, data


def test_digits_agree_with_the_trained_network(tmp_path):
    net, plan, data = trained_digits()
    batches = list(data.val_dataloader())
    to_onnx(net, plan, batches[0][0], tmp_path / "a.onnx", storage="native")
    found = compare(net, tmp_path / "a.onnx", batches)
    assert found.images == 540 and found.share >= 0.998
    assert sum(found.codes.values()) == 540 * (64 + 8 * 64 * 3 + 16 * 16 * 1 + 16 * 16 + 32 * 4 + 32)
    assert sum(found.flipped.values()) < 0.005 * sum(found.codes.values())
    for d in found.disagreements:
        assert d.margin <= d.difference
    stored = initializers(tmp_path / "a.onnx")
    names = {s.name: s.bits for s in plan.weights}
    for name, bits in names.items():
        kind = stored[name.replace(".weight", ".weight_quantizer.codes")].data_type
        assert kind == {2: onnx.TensorProto.INT2, 4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}[bits]


def test_a_disagreement_is_found_and_explained(tmp_path):
    """The comparison must be able to fail: another network's file does not agree."""
    net, plan, data = trained_digits()
    batch = next(iter(data.val_dataloader()))
    to_onnx(net, plan, batch[0], tmp_path / "a.onnx")
    with torch.no_grad():
        net.linear.bias[3] += 4.0
    found = compare(net, tmp_path / "a.onnx", [batch])
    assert found.same < found.images and found.difference == pytest.approx(4, abs=0.5)
    assert all(d.margin <= d.difference for d in found.disagreements)
    assert found.to_dict()["same_top1"] == found.same


@pytest.mark.skipif(not (WEIGHTS.is_file() and CIFAR.is_dir()), reason="no CIFAR-10 at /tmp/data/cifar10")
def test_resnet20_on_real_images(tmp_path):
    from hawq_lightning.data import ImageFolderDataModule

    data = ImageFolderDataModule(CIFAR, train="val", augment="none", num_classes=10, batch_size=50, subset=250)
    data.setup("fit")
    net = resnet20(weights=WEIGHTS).eval()
    plan = chosen(net, [t[:32] for t in next(iter(data.train_dataloader()))], budget="6x")
    quantize(net, plan)
    deployed = to_onnx(net, plan, torch.rand(2, 3, 32, 32), tmp_path / "a.onnx")
    assert len(deployed.folding.folded) == 19 and not deployed.folding.kept
    found = compare(net, tmp_path / "a.onnx", data.val_dataloader())
    # one flipped code grows from layer to layer; what matters is the class
    assert found.images == 250 and found.same >= 248
    assert 0 < sum(found.flipped.values()) < 0.01 * sum(found.codes.values())
    assert all(d.margin <= d.difference for d in found.disagreements)
    loose = to_onnx(net, plan, torch.rand(2, 3, 32, 32), tmp_path / "b.onnx", exact=False)
    assert loose.plan.bits == plan.bits
    rounded = compare(net, tmp_path / "b.onnx", [next(iter(data.val_dataloader()))])
    assert sum(rounded.flipped.values()) / sum(rounded.codes.values()) > 0.005, "onnxruntime no longer rounds biases"


def test_a_packed_file_reloaded_exports_the_same_bytes(exported, tmp_path):
    net, x, plan, _, path = exported
    save_packed(net, plan, tmp_path / "m.safetensors")
    again = load_packed(tmp_path / "m.safetensors", type(net)()).eval()
    to_onnx(again, plan, x, tmp_path / "b.onnx")
    assert path.read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_float_reference(tmp_path):
    net, x = Widths().eval(), torch.randn(2, 4, 6, 6)
    float_onnx(net, x, tmp_path / "f.onnx")
    found = session(tmp_path / "f.onnx").run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=1e-5)


def paper_models():
    from hawq_lightning.models import inception_v3, resnet50, retinanet_resnet50, squeezenext

    return {
        "resnet50": (lambda: resnet50(10), 64),
        "inception_v3": (lambda: inception_v3(10), 96),
        "squeezenext": (lambda: squeezenext(10), 64),
        "retinanet_resnet50": (lambda: retinanet_resnet50(3), 64),
    }


@pytest.mark.stress
@pytest.mark.parametrize("name", ["resnet50", "inception_v3", "squeezenext", "retinanet_resnet50"])
def test_the_papers_models(tmp_path, name):
    make, size = paper_models()[name]
    torch.manual_seed(0)
    net = network_of(make()).eval()
    x = torch.randn(2, 3, size, size)
    table = sites(net, x)
    assert len(table.weights) > 50
    plan = random_plan(table, 0)
    enable(net, plan)
    deployed = to_onnx(net, plan, x, tmp_path / "a.onnx", storage="native")
    assert deployed.folding.folded and set(deployed.folding.kept.values()) <= {"the forward pass does not call it"}
    proto = onnx.load(str(tmp_path / "a.onnx"))
    kinds = {onnx.TensorProto.DataType.Name(t.data_type) for t in proto.graph.initializer if t.name.endswith("codes")}
    assert {"INT2", "INT4", "INT8"} <= kinds
    packed = save_packed(net, plan, tmp_path / "m.safetensors")
    assert (tmp_path / "a.onnx").stat().st_size < 2 * packed
    found = compare(net, tmp_path / "a.onnx", [x], codes=True)
    first = next(iter(found.flipped))
    assert found.flipped[first] == 0 and sum(found.codes.values()) > 0
    run = session(tmp_path / "a.onnx")
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(deployed.model(x[:1]))
    for output, tensor in zip(run.run(None, {"input": x[:1].numpy()}), wanted):
        assert output.shape == tuple(tensor.shape) and np.isfinite(output).all()
