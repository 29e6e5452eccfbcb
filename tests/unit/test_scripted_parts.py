"""TorchScript inside of a network stays float and is measured through; exports refuse it in a sentence."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning.export import to_program


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        part = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU()).eval()
        if kind == "attention":
            part = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 4, batch_first=True), nn.Conv1d(2, 3, 3)).eval()
        self.before = torch.jit.trace(part, torch.randn(2, 2, 6)) if kind == "traced" else torch.jit.script(part)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.before(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore:.*TorchScript.*")
@pytest.mark.parametrize("kind", ["scripted", "traced", "attention"])
def test_a_scripted_part_stays_float(tmp_path, kind):
    net, batch = Net(kind).eval(), (torch.randn(4, 2, 6), torch.arange(4) % 3)

    def loss(model, given):
        return F.cross_entropy(model(given[0]), given[1])

    table = hl.sites(net, batch[0])
    assert {s.name for s in table.weights} == {"net.1.weight", "net.3.weight"}
    traces = hl.measure(net, [batch], loss, sites=table, estimator="exact", progress=False)
    alone = hl.measure(net.net, [(net.before(batch[0]).detach(), batch[1])], loss, estimator="exact", progress=False)
    assert traces["net.1.weight"].trace == pytest.approx(alone["1.weight"].trace, rel=1e-4)
    plan = hl.select(hl.Problem(table, hl.candidates(net, [batch], traces, table, loss), traces), "7x")
    hl.quantize(net, plan)
    hl.save_packed(net, plan, tmp_path / "net.safetensors")
    assert torch.equal(hl.load_packed(tmp_path / "net.safetensors", Net(kind).eval())(batch[0]), net(batch[0]))
    with pytest.raises(hl.HawqError, match="before is TorchScript"):
        to_program(net, plan, batch[0])
