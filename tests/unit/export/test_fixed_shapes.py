"""Networks whose inputs have no batch axis in common, or that count their batch: files at the example's own shapes."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hawq_lightning import HawqError, Plan, PlanSite, quantize, sites
from hawq_lightning.export import compare, export, to_onnx, to_torchao
from hawq_lightning.export.onnx import compare_qonnx, float_onnx, measure_file, session
from tests.unit.export.test_other_tools import quant

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class GraphConvolution(nn.Module):
    """What neighbours send, over the square roots of their degrees and one's own (Kipf and Welling 2017)."""

    def __init__(self, width: int, to: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, to)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        one = torch.ones(edges.shape[1])
        degrees = torch.ones(len(x)).index_add(0, edges[1], one).rsqrt()
        sent = self.fc(x) * degrees[:, None]
        return (sent + torch.zeros_like(sent).index_add(0, edges[1], sent[edges[0]])) * degrees[:, None]


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphConvolution(4, 8), GraphConvolution(8, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x, edges)), edges)


class Counts(nn.Module):
    """Knows how many images a batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).reshape(3, 16))


def quantized(net: nn.Module, inputs: tuple[Tensor, ...], attention: bool = False) -> tuple[nn.Module, Plan]:
    table = sites(net.eval(), inputs, forward=lambda m, b: m(*b), attention=attention)
    chosen = [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 4, "affine") for s in table.weights]
    for s in table.activations:
        chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 8, "affine", 8 / 255, 128))
    plan = Plan(tuple(chosen), table.layers)
    return quantize(net, plan), plan


def graph(nodes: int, edges: int, seed: int = 0) -> tuple[nn.Module, Plan, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    inputs = torch.randn(nodes, 4), torch.randint(0, nodes, (2, edges))
    return *quantized(GCN(), inputs), inputs


def run_file(path, inputs: tuple[Tensor, ...]) -> Tensor:
    run = session(path, integers=False)
    given = {i.name: x.numpy() for i, x in zip(run.get_inputs(), inputs)}
    return torch.from_numpy(run.run(None, given)[0])


def check_onnx(path, net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert torch.allclose(run_file(path, inputs), net(*inputs), atol=1e-5)


def check_integer(path, net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert (run_file(path, inputs) - net(*inputs)).abs().max() < 0.1  # sums on grids of 8 bits


def check_qonnx(path, net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Quant(OpRun):
        op_domain = "qonnx.custom_op.general"

        def _run(self, *values, **how):
            return (quant(*values, **how),)

    run = ReferenceEvaluator(str(path), new_ops=[Quant])
    (have,) = run.run(None, {f"input_{i}": x.numpy() for i, x in enumerate(inputs)})
    assert np.allclose(have, net(*inputs).numpy(), atol=1e-5)


def check_aimet(path, net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert run_file(path, inputs).shape == net(*inputs).shape
    form = json.loads(path.with_suffix(".encodings").read_text())
    assert len(form["param_encodings"]) == 2 and len(form["activation_encodings"]) == 2


CHECKS = {"onnx": check_onnx, "onnx_integer": check_integer, "qonnx": check_qonnx, "aimet": check_aimet}


@pytest.mark.stress
@pytest.mark.parametrize("format", CHECKS)
@pytest.mark.parametrize(("nodes", "edges"), [(6, 10), (40, 90), (1, 1)])
@torch.no_grad()
def test_every_exporter_of_graphs_writes_a_graph_at_its_own_size(tmp_path, format, nodes, edges):
    net, plan, inputs = graph(nodes, edges)
    path = tmp_path / f"net.{format}.onnx"
    export(net, plan, path, format, example_input=inputs, free_batch=False)
    CHECKS[format](path, net, inputs)
    shapes = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(str(path)).graph.input]
    assert shapes == [[nodes, 4], [2, edges]]


@pytest.mark.stress
@torch.no_grad()
def test_integer_files_of_graphs_are_calibrated_on_graphs_of_their_size(tmp_path):
    net, plan, inputs = graph(6, 10)
    others = [graph(6, 10, seed)[2] for seed in (1, 2)]
    how = {"example_input": inputs, "free_batch": False}
    export(net, plan, tmp_path / "net.integer.onnx", "onnx_integer", calibration=others, **how)
    with pytest.raises(HawqError, match="no batches"):  # too few nodes for the file
        export(net, plan, tmp_path / "b.integer.onnx", "onnx_integer", calibration=[graph(5, 10)[2]], **how)


@torch.no_grad()
def test_torchao_reads_graphs(tmp_path):
    pytest.importorskip("torchao", minversion="0.18")
    net, plan, inputs = graph(1, 1)
    assert torch.allclose(to_torchao(net, plan, inputs, free_batch=False).model(*inputs), net(*inputs), atol=1e-2)


@pytest.mark.stress
@torch.no_grad()
def test_a_network_that_counts_its_batch_is_exported_compared_and_timed_three_at_a_time(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 2, 4, 4)
    net, plan = quantized(Counts(), (x[:3],))
    with pytest.warns(UserWarning, match="takes 3 samples at a time"):
        to_onnx(net, plan, x[:3], tmp_path / "free.onnx")
    export(net, plan, tmp_path / "net.onnx", example_input=x[:3], free_batch=False)
    agreement = compare(net, tmp_path / "net.onnx", [x, x[:2]])
    assert agreement.images == agreement.same == 6, "what no three images are left of is left out"
    with pytest.raises(HawqError, match="takes 3 at a time"):
        compare(net, tmp_path / "net.onnx", [x[:2]])
    assert measure_file(tmp_path / "net.onnx", (2, 4, 4), seconds=0.02).ms > 0
    float_onnx(Counts(), x[:3], tmp_path / "float.onnx", free_batch=False)
    export(net, plan, tmp_path / "net.qonnx.onnx", "qonnx", example_input=x[:3], free_batch=False)
    pytest.importorskip("qonnx")
    assert compare_qonnx(net, tmp_path / "net.qonnx.onnx", [x]).images == 6
