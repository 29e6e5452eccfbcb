"""What belongs to the network, by the graph behind the loss: teachers, frozen parts, parts that few batches use."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning.sensitivity import find_sites, isolated_eval
from tests.cases import dense_weight_traces

BATCH = (torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3)


def mlp(inputs=6, width=5, outputs=3):
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def frozen(module):
    return module.requires_grad_(False)


class Parts(nn.Module):
    """Modules side by side, as a LightningModule holds them; the loss says what becomes of them."""

    def __init__(self, parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Adapted(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = frozen(nn.Linear(inputs, outputs))
        self.a, self.b = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class LossInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.judge = mlp(outputs=6), frozen(mlp())

    def forward(self, x):
        return F.mse_loss(self.judge(self.net(x)), self.judge(x))


def only_biases(module):
    for name, parameter in frozen(module).named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return module


def supervised(outputs, batch):
    return F.cross_entropy(outputs, batch[1])


def taught(target):
    return lambda m, b: supervised(m.net(b[0]), b) + F.mse_loss(m.net(b[0]), target(m, b))


def without_gradients(m, b):
    with torch.no_grad():
        target = m.teacher(b[0])
    return taught(lambda m, b: target)(m, b)


# name -> parts, loss, layers that belong
MEMBERS = {
    "a frozen teacher": (
        lambda: Parts({"net": mlp(), "teacher": frozen(mlp())}), taught(lambda m, b: m.teacher(b[0])), ["net"],
    ),
    "a teacher whose output is detached": (
        lambda: Parts({"net": mlp(), "teacher": mlp()}), taught(lambda m, b: m.teacher(b[0]).detach()), ["net"],
    ),
    "a teacher without gradients": (lambda: Parts({"net": mlp(), "teacher": mlp()}), without_gradients, ["net"]),
    "a teacher whose loss has a learned weight": (
        lambda: Parts({"net": mlp(), "teacher": frozen(mlp()), "scale": nn.RMSNorm(2)}),
        lambda m, b: F.mse_loss(m.net(b[0]), m.teacher(b[0])) * m.scale.weight[0].exp() + supervised(m.net(b[0]), b),
        ["net"],
    ),
    "a projector onto a teacher's features": (
        lambda: Parts({"net": mlp(), "teacher": frozen(mlp(6, 16, 5)), "projector": nn.Linear(3, 5)}),
        lambda m, b: supervised(m.net(b[0]), b) + F.mse_loss(m.projector(m.net(b[0])), m.teacher(b[0])),
        ["net", "projector"],
    ),
    "a perceptual loss": (
        lambda: Parts({"net": mlp(outputs=6), "judge": frozen(mlp())}),
        lambda m, b: F.mse_loss(m.judge(m.net(b[0])), m.judge(b[0])), ["net"],
    ),
    "a classifier that guides": (
        lambda: Parts({"net": mlp(outputs=6), "judge": frozen(mlp())}),
        lambda m, b: supervised(m.judge(m.net(b[0])), b), ["net"],
    ),
    "a perceptual loss in one module with its network": (LossInside, lambda m, b: m(b[0]), ["net"]),
    "a frozen backbone": (
        lambda: Parts({"backbone": frozen(mlp(outputs=8)), "head": nn.Linear(8, 3)}),
        lambda m, b: supervised(m.head(m.backbone(b[0])), b), ["backbone", "head"],
    ),
    "a frozen head": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), frozen(nn.Linear(8, 3))),
        lambda m, b: supervised(m(b[0]), b), ["0", "2"],
    ),
    "adapters": (
        lambda: nn.Sequential(Adapted(6, 8), nn.ReLU(), frozen(nn.Linear(8, 3))),
        lambda m, b: supervised(m(b[0]), b), ["0.base", "0.a", "0.b", "2"],
    ),
    "biases alone": (lambda: only_biases(mlp()), lambda m, b: supervised(m(b[0]), b), ["0", "2"]),
    "a network that is frozen as a whole": (lambda: frozen(mlp()), lambda m, b: supervised(m(b[0]), b), ["0", "2"]),
    "a detached branch that nothing reads": (
        lambda: Parts({"net": mlp(), "probe": nn.Linear(3, 2)}),
        lambda m, b: (m.probe(m.net(b[0]).detach()), supervised(m.net(b[0]), b))[1], ["net"],
    ),
    "a detached branch with a loss": (
        lambda: Parts({"net": mlp(), "probe": nn.Linear(3, 3)}),
        lambda m, b: supervised(m.probe(m.net(b[0]).detach()), b) + supervised(m.net(b[0]), b), ["net", "probe"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("member", MEMBERS)
def test_what_belongs(member):
    build, loss, expected = MEMBERS[member]
    torch.manual_seed(0)
    model = build().double()
    batch = (BATCH[0].double(), BATCH[1])
    needed = [p.requires_grad for p in model.parameters()]
    traces = hl.measure(model, [batch], loss, estimator="exact", progress=False)
    assert [p.requires_grad for p in model.parameters()] == needed
    found = [r.name.removesuffix(".weight") for r in traces if r.kind == "weight"]
    assert {n if n in expected else n.split(".")[0] for n in found} == set(expected)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    weights = [
        hl.Site(r.name, "weight", (r.name.removesuffix(".weight"),), (), 0) for r in traces if r.kind == "weight"
    ]
    dense = dense_weight_traces(model, batch, loss, hl.SiteTable(tuple(weights), ()))
    assert dense.keys() and all(traces[n].trace == pytest.approx(v, rel=1e-6) for n, v in dense.items())


def test_frozen_parts_are_quantized_on_request():
    model = Parts({"net": mlp(), "teacher": frozen(mlp()), "rest": frozen(mlp())})
    loss = MEMBERS["a frozen teacher"][1]
    traces = hl.measure(model, [BATCH], loss, include=["net.*", "teacher.*"], estimator="exact", progress=False)
    assert [r.name for r in traces if r.kind == "weight"] == [
        f"{n}.weight" for n in ("net.0", "net.2", "teacher.0", "teacher.2")
    ]
    with torch.no_grad():
        features = model.rest(BATCH[0])
    backbone = Parts({"backbone": frozen(mlp(outputs=8)), "head": nn.Linear(8, 3)})

    def on_features(m, b):
        with torch.no_grad():
            features = m.backbone(b[0])
        return supervised(m.head(features), b)

    table = hl.sites(backbone, BATCH, forward=on_features)
    assert [x.name for x in table.layers] == ["head"]
    traces = hl.measure(backbone, [BATCH], on_features, include="*", estimator="exact", progress=False)
    table = hl.sites(backbone, BATCH, forward=on_features, include="*")
    assert [x.name for x in table.layers] == ["backbone.0", "backbone.2", "head"]
    weighed = hl.candidates(backbone, [BATCH], traces, table, on_features, activation_bits=4)
    plan = hl.select(hl.Problem(table, weighed, traces), "8x")
    hl.quantize(backbone, plan)
    assert plan.bits["backbone.2.input"] == 4 and not torch.equal(backbone.backbone(BATCH[0]), features)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("a frozen teacher", "frozen, and nothing trained follows it, as with teachers and perceptual losses"),
        ("a teacher whose output is detached", "no gradient of the loss comes by it"),
        ("a teacher without gradients", "run without gradients, as teachers are"),
    ],
)
def test_the_table_says_why_a_teacher_stays_float(member, reason):
    build, loss, _ = MEMBERS[member]
    floats = hl.sites(build(), BATCH, forward=loss).floats
    assert {f.name for f in floats} == {"teacher.0", "teacher.2"}
    assert all(f.reason.startswith(reason) for f in floats)


# the same network runs twice: on the same images, on others, on another number of them
def same_images(m, b):
    with torch.no_grad():
        target = m(b[0]).softmax(1)
    return supervised(m(b[0]), b) + F.kl_div(m(b[0]).log_softmax(1), target, reduction="batchmean")


def detached(m, b):
    target = m(b[2]).softmax(1).detach()
    return supervised(m(b[0]), b) + F.cross_entropy(m(b[2] + 0.1), target)


def prototypes(m, b):
    with torch.no_grad():
        centres = m(b[2]).view(3, 4, 3).mean(1)
    return F.cross_entropy(-torch.cdist(m(b[0]), centres), b[1])


def negatives(m, b):
    return F.cross_entropy(m(b[0]) @ torch.cat([m(b[0]).detach(), m(b[2]).detach()]).T, b[1])


@pytest.mark.parametrize("loss", [same_images, detached, prototypes, negatives])
def test_a_network_that_also_makes_its_targets(loss):
    if loss is prototypes and torch.__version__ < torch.torch_version.TorchVersion("2.10"):
        pytest.skip("torch 2.9 has no second derivative of cdist")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    batch = (BATCH[0].double(), BATCH[1], torch.randn(12, 6).double())
    table = hl.sites(net, batch, forward=loss)
    traces = hl.measure(net, [batch], loss, estimator="exact", sites=table, progress=False)
    dense = dense_weight_traces(net, batch, loss, table)
    assert all(traces[n].trace == pytest.approx(v, rel=1e-6) for n, v in dense.items())
    weighed = hl.candidates(net, [batch], traces, table, loss, activation_bits=4)
    assert [[c.bits for c in weighed[n]] for n in ("0.input", "2.input", "4.input")] == [[8], [4], [4]]
    assert all(traces[n].mean_trace for n in ("2.input", "4.input"))


class SecondHead(nn.Module):
    """Its second head runs on the images that have its label."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def loss(self, batch):
        x, y, number = batch
        features, known = F.relu(self.body(x)), ~number.isnan()
        loss = F.cross_entropy(self.first(features), y)
        return loss + F.mse_loss(self.second(features[known])[:, 0], number[known]) if known.any() else loss


class TwoTasks(SecondHead):
    """A batch is of one task."""

    def loss(self, batch):
        x, y, number = batch
        features = F.relu(self.body(x))
        return F.cross_entropy(self.first(features), y) if number[0].isnan() else self.second(features).square().mean()


class Experts(nn.Module):
    """Each token goes to one of four experts."""

    def __init__(self):
        super().__init__()
        self.body, self.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.out = nn.Linear(4, 3)

    def loss(self, batch):
        x = F.relu(self.body(batch[0]))
        expert, out = (batch[0][:, 0] > 0).long() * 2 + (batch[0][:, 1] > 0).long(), torch.zeros_like(x)
        for i in expert.unique().tolist():
            out[expert == i] = F.relu(self.experts[i](x[expert == i]))
        return F.cross_entropy(self.out(out), batch[1])


NONE = float("nan")


USES = [(k, u) for k in (SecondHead, TwoTasks) for u in ([], range(8), range(8, 16), [1, 9, 10])] + [(Experts, [])]


@pytest.mark.parametrize(("kind", "unlabelled"), USES)
def test_layers_that_few_batches_use(kind, unlabelled):
    torch.manual_seed(0)
    model = kind().double()
    x, y, number = torch.randn(16, 6).double(), torch.arange(16) % 3, torch.randn(16).double()
    number[list(unlabelled)] = NONE
    batches = [(x[:8], y[:8], number[:8]), (x[8:], y[8:], number[8:])]
    loss = type(model).loss
    traces = hl.measure(model, batches, loss, estimator="exact", progress=False)
    names = [n for n, _ in model.named_parameters() if n.endswith("weight")]
    used = [n for n in names if n in traces]
    dense = dict.fromkeys(used, 0.0)
    for batch in batches:
        for name in used:
            weight = dict(model.named_parameters())[name]
            (slope,) = torch.autograd.grad(loss(model, batch), weight, create_graph=True, allow_unused=True)
            for i in range(0 if slope is None or not slope.requires_grad else slope.numel()):
                (row,) = torch.autograd.grad(slope.flatten()[i], weight, retain_graph=True)
                dense[name] += float(row.flatten()[i]) / len(batches)
    assert all(traces[n].trace == pytest.approx(v, rel=1e-6) for n, v in dense.items())
    assert set(names) == set(used) or kind is TwoTasks
    table = _sites_over(model, batches, loss)
    weighed = hl.candidates(model, batches, traces, table, loss)
    plan = hl.select(hl.Problem(table, weighed, traces), "8x")
    hl.quantize(copy.deepcopy(model), plan)


def _sites_over(model, batches, loss):
    with isolated_eval(model):
        passes = [(lambda b=b: loss(model, b), 8) for b in batches]
        return find_sites(model, *passes[0], later=passes[1:])


class OfIdentity(nn.Module):
    """Weights are read by way of the identity matrix, as in DoRA."""

    def __init__(self, form):
        super().__init__()
        self.form, self.base = form, nn.Linear(6, 4, bias=False)
        self.a, self.b, self.out = nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        eye = torch.eye(6, dtype=x.dtype)
        low_rank = self.b(self.a(eye)).T
        if self.form == "norm":
            y = self.base(x) * (1 + low_rank.detach().norm(dim=1)) + self.b(self.a(x))
        elif self.form == "merged":
            y = F.linear(x, self.base(eye).T + low_rank)
        else:
            y = self.base(x) + F.linear(x, low_rank)
        return self.out(F.relu(y))


@pytest.mark.parametrize(
    ("form", "read"),
    [("norm", {"base", "a", "b", "out"}), ("merged", {"b", "out"}), ("branch", {"base", "b", "out"})],
)
def test_an_identity_matrix_is_no_activation(form, read):
    torch.manual_seed(0)
    model, batch = OfIdentity(form).double(), (BATCH[0].double(), BATCH[1])
    table = hl.sites(model, batch)
    assert {n for s in table.activations for n in s.layers} == read
    assert {x.name for x in table.layers} == {"base", "a", "b", "out"}

    def loss(m, b):
        return supervised(m(b[0]), b)

    traces = hl.measure(model, [batch], loss, estimator="exact", sites=table, progress=False)
    dense = dense_weight_traces(model, batch, loss, table)
    assert all(traces[n].trace == pytest.approx(v, rel=1e-6) for n, v in dense.items())
    weighed = hl.candidates(model, [batch], traces, table, loss)
    hl.quantize(model, hl.select(hl.Problem(table, weighed, traces), "8x"))
    assert model(batch[0]).shape == (8, 3)
