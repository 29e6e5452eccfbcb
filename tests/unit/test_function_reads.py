"""A weight that a function reads past its layer stays float, is told, and the packed file returns the very network."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning.quantization import fake_quant_disabled
from hawq_lightning.sensitivity import top_eigenvalues

READS = {
    "transposed": lambda x, w: F.linear(x, w.t()),
    "matmul": lambda x, w: x @ w,
    "bmm": lambda x, w: torch.bmm(x[None], w[None])[0],
    "einsum": lambda x, w: torch.einsum("ni,io->no", x, w),
    "a row": lambda x, w: x * w[0],
    "normalised": lambda x, w: F.linear(x, F.normalize(w, dim=1)),
    "its norm": lambda x, w: x / w.norm(),
    "detached": lambda x, w: F.linear(x, w.detach()),
    "data": lambda x, w: F.linear(x, w.data.clone()),
    "written into a buffer": lambda x, w: F.linear(x, torch.zeros(5, 5).copy_(w)),
    "concatenated": lambda x, w: x @ torch.cat([w, w])[:5],
    "as a bias": lambda x, w: x + w.mean(0),
}
UNREAD = {
    "its shape": lambda x, w: x * w.shape[0] + x.new_zeros(w.shape[1]) + torch.zeros_like(w)[0],
    "without gradients": lambda x, w: x * float(_quiet_norm(w) > -1),
    "nothing": lambda x, w: x,
}


@torch.no_grad()
def _quiet_norm(w):
    return w.norm()


class Net(nn.Module):
    """``layer`` is called or not; ``read`` combines its weight with data."""

    def __init__(self, read, called=True, kind="linear"):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.out, self.read, self.called = nn.Linear(5, 5), nn.Linear(5, 3), read, called
        self.layer = nn.Linear(5, 5) if kind == "linear" else nn.Conv1d(5, 5, 1)
        self.kind = kind

    def forward(self, x):
        x = F.relu(self.stem(x))
        if self.kind == "conv":
            y = self.layer(x[:, :, None])[:, :, 0] if self.called else x
            return self.out(F.relu(self.read(y, self.layer.weight[:, :, 0])))
        y = self.layer(x) if self.called else x
        return self.out(F.relu(self.read(F.relu(y), self.layer.weight)))


def cross_entropy(m, b):
    return F.cross_entropy(m(b[0]), b[1])


BATCH = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


@pytest.mark.parametrize("kind, called", list(itertools.product(["linear", "conv"], [True, False])))
@pytest.mark.parametrize("form", READS)
def test_every_form_of_read_is_seen(form, called, kind):
    net = Net(READS[form], called, kind)
    table = hl.sites(net, BATCH)
    reasons = {f.name: f.reason for f in table.floats}
    assert "function reads" in reasons["layer"]
    assert ("not called" in reasons["layer"]) is not called
    assert [s.name for s in table.weights] == ["stem.weight", "out.weight"]


@pytest.mark.parametrize("form", UNREAD)
def test_what_does_not_use_the_values_is_no_read(form):
    assert "layer.weight" in {s.name for s in hl.sites(Net(UNREAD[form]), BATCH)}


def test_a_weight_that_is_read_is_told_and_packed_as_it_is(tmp_path):
    net = Net(READS["transposed"]).eval()
    measured = hl.measure(net, [BATCH], cross_entropy, progress=False, rtol=0.5)
    assert "layer.weight" not in {r.name for r in measured}
    assert any(n.startswith("layer stays float: a function reads") for n in measured.notes)
    table = hl.sites(net, BATCH)
    choices = hl.candidates(net, [BATCH], measured, table, cross_entropy)
    plan = hl.select(hl.Problem(table, choices, measured), "8x")
    hl.quantize(net, plan)
    hl.save_packed(net, plan, tmp_path / "model.safetensors")
    again = hl.load_packed(tmp_path / "model.safetensors", Net(READS["transposed"]).eval())
    assert torch.equal(again(BATCH[0]), net(BATCH[0]))


def test_sites_of_no_forward_pass_are_refused_where_a_function_reads():
    net = Net(READS["matmul"])
    with pytest.raises(hl.HawqError, match="function reads the weight of layer as well.*exclude="):
        hl.measure(net, [BATCH], cross_entropy, sites=hl.sites(net), progress=False)
    left_out = hl.sites(net, exclude="layer")
    assert len(hl.measure(net, [BATCH], cross_entropy, sites=left_out, progress=False, rtol=0.5).records) == 2


def test_a_loss_that_reads_a_weight_is_noted():
    def loss_fn(m, b):
        return cross_entropy(m, b) + 0.1 * F.linear(b[0], m.layer.weight).square().mean()

    net = Net(UNREAD["nothing"])
    measured = hl.measure(net, [BATCH], loss_fn, sites=hl.sites(net, BATCH), progress=False, rtol=0.5)
    assert any("reads the weights of layer outside of their layers" in n for n in measured.notes)
    assert "layer.weight" not in {r.name for r in hl.measure(net, [BATCH], loss_fn, progress=False, rtol=0.5)}


def test_penalties_and_learned_queries_are_no_reads():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.project = nn.Parameter(torch.randn(2, 5)), nn.Linear(5, 5)
            self.key, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.out(F.relu(self.project(self.queries)[None] + self.key(x)[:, None]).mean(1))

    def penalised(m, b):
        w = m.key.weight
        return cross_entropy(m, b) + 0.1 * w.square().sum() + (w @ w.t() - torch.eye(5)).norm()

    measured = hl.measure(Queries(), [BATCH], penalised, progress=False, rtol=0.5)
    assert {"project.weight", "key.weight", "out.weight"} <= {r.name for r in measured}
    assert any("penalty" in n for n in measured.notes)


def test_gradients_that_a_loss_takes_are_no_reads():
    def adversarial(m, b):
        x = b[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(m, (x, b[1])), x)
        return cross_entropy(m, (b[0] + 0.1 * slope.sign(), b[1]))

    names = {r.name for r in hl.measure(Net(UNREAD["nothing"]), [BATCH], adversarial, progress=False, rtol=0.5)}
    assert {"stem.weight", "layer.weight", "out.weight"} <= names


def test_a_weight_that_is_an_embeddings_as_well_is_told():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.mid = nn.Embedding(7, 5, sparse=True), nn.Linear(5, 5)  # sparse tables stay float
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(F.relu(self.mid(self.embed(x)))).mean(1)

    batch = torch.arange(12).reshape(4, 3) % 7, torch.arange(4)
    measured = hl.measure(Tied(), [batch], cross_entropy, progress=False, rtol=0.5)
    assert any(n.startswith("The weight of head is also that of another module (Embedding)") for n in measured.notes)


def test_a_quantized_network_is_refused_and_its_float_weights_are_measured():
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    table = hl.sites(net, BATCH)
    before = hl.measure(net, [BATCH], cross_entropy, sites=table, progress=False)
    plan = hl.select(hl.Problem(table, hl.candidates(net, [BATCH], before, table, cross_entropy), before), "6x")
    hl.quantize(net, plan)
    with pytest.raises(hl.HawqError, match="Layer '0' is quantized.*fake_quant_disabled"):
        hl.measure(net, [BATCH], cross_entropy, sites=table, progress=False)
    with pytest.raises(hl.HawqError, match="Layer '0' is quantized"):
        top_eigenvalues(net, [BATCH], cross_entropy, sites=table)
    with fake_quant_disabled(net):
        again = hl.measure(net, [BATCH], cross_entropy, sites=table, progress=False)
    assert [r.trace for r in again] == [r.trace for r in before]


def _new_data(t, s):
    t.data = t.data * 0.9 + s.data * 0.1


def _new_from_one(t, s):
    t.data = s.data.clone()


def _new_lerp(t, s):
    t.data = torch.lerp(t.data, s.data, 0.1)


def _in_place(t, s):
    t.data.mul_(0.9).add_(s.data, alpha=0.1)


@pytest.mark.parametrize("update", [_new_data, _new_from_one, _new_lerp, _in_place])
@pytest.mark.parametrize("how", ["called", "no_grad", "frozen"])
def test_a_target_whose_parameters_get_new_memory_in_the_step_reads_no_weight_of_the_network(update, how):
    torch.manual_seed(0)
    net = nn.Module()
    net.student, net.teacher = (nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2))
    if how == "frozen":
        net.teacher.requires_grad_(False)

    def loss(model, batch):
        for t, s in zip(model.teacher.parameters(), model.student.parameters()):
            update(t, s)
        with torch.set_grad_enabled(how != "no_grad"):
            target = model.teacher(batch)
        return F.mse_loss(model.student(batch), target.detach())

    traces = hl.measure(net, [torch.randn(4, 5)], loss, include=["student.*"], max_probes=2, rtol=9.0, progress=False)
    assert {r.name for r in traces} >= {"student.0.weight", "student.2.weight"}
    assert not [note for note in traces.notes if "function reads" in note]
