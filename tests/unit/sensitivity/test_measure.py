"""Measuring on models as they are found: checkpointing, compilation, dropout, frozen and unused layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hawq_lightning import HawqError, Sensitivity, measure
from tests.cases import CASES, ConvNet, batch_for, build

_, CROSS_ENTROPY = CASES["cross_entropy"]


def traces(model, **kwargs):
    kwargs = {"estimator": "exact", "progress": False} | kwargs
    return {
        r.name.replace("_orig_mod.", ""): r.trace for r in measure(model, [batch_for(ConvNet)], CROSS_ENTROPY, **kwargs)
    }


class Checkpointed(ConvNet):
    reentrant = False

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = checkpoint(lambda v: v + self.relu(self.grouped(v)), x, use_reentrant=self.reentrant)
        x = F.max_pool2d(x, 2)
        x = self.relu(self.same(x)) + 0.5 * x
        return self.fc(x.mean((2, 3)))


def test_activation_checkpointing_changes_nothing():
    want = traces(build(ConvNet))
    net = build(Checkpointed)
    got = traces(net)
    assert got == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules_are_measured_eagerly(whole):
    want = traces(build(ConvNet))
    net = build(ConvNet)
    if whole:
        net = torch.compile(net, backend="eager")
    else:
        net.grouped = torch.compile(net.grouped, backend="eager")
    net(batch_for(ConvNet)[0])  # compiled before any hook exists
    got = traces(net)
    assert got == pytest.approx(want, rel=1e-9)


def test_everything_is_put_back_even_after_an_error():
    class Noisy(ConvNet):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.rate = 0.5

        def forward(self, x):
            return super().forward(F.dropout(self.drop(x), self.rate, self.training))

    net = build(Noisy).train()
    net.fc.weight.requires_grad_(False)
    net.stem.weight.grad = torch.ones_like(net.stem.weight)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    torch.manual_seed(7)
    before = torch.get_rng_state()

    def breaks(m, b):
        torch.rand(3)
        raise RuntimeError("the user's own")

    first = traces(net, estimator="ggn", seed=3)
    second = traces(net, estimator="ggn", seed=3)
    assert first == second  # no dropout: nothing random but the seed's probes
    with pytest.raises(RuntimeError, match="the user's own"):
        measure(net, [batch_for(ConvNet)], breaks, progress=False)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.fc.weight.requires_grad and net.stem.weight.requires_grad
    assert torch.equal(net.stem.weight.grad, torch.ones_like(net.stem.weight)) and net.same.weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_frozen_layers_count_and_uncalled_ones_do_not():
    class Spare(ConvNet):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(4, 4)

    net = build(Spare)
    want = traces(net)
    for p in net.stem.parameters():
        p.requires_grad_(False)
    got = traces(net)
    assert got == want and "stem.weight" in got and "spare.weight" not in got


def test_an_input_overwritten_after_it_was_read():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.a(x)
            y = self.b(h)
            h.mul_(2)  # autograd lets this pass: b's weight is not being trained
            return self.c(F.relu(y + h))

    class Plain(Overwrites):
        def forward(self, x):
            h = self.a(x)
            return self.c(F.relu(self.b(h) + 2 * h))

    g = torch.Generator().manual_seed(0)
    batch = (torch.randn(5, 4, generator=g, dtype=torch.float64), torch.arange(5) % 3)
    net = build(Overwrites)
    plain = build(Plain)
    plain.load_state_dict(net.state_dict())
    got = measure(net, [batch], CROSS_ENTROPY, estimator="exact", progress=False)
    want = measure(plain, [batch], CROSS_ENTROPY, estimator="exact", progress=False)
    assert [r.trace for r in got] == pytest.approx([r.trace for r in want], rel=1e-12)


def test_variable_image_sizes_and_lists_of_images():
    net = build(ConvNet)
    g = torch.Generator().manual_seed(0)
    sizes = [(8, 8), (12, 8), (8, 16)]
    pictures = [torch.randn(2, *s, generator=g, dtype=torch.float64) for s in sizes]
    labels = torch.tensor([0, 1, 2])

    def loss(m, b):
        return torch.stack([F.cross_entropy(m(x[None]), y[None]) for x, y in zip(*b)]).mean()

    whole = measure(net, [(pictures, labels)], loss, estimator="exact", progress=False)
    singles = [(pictures[i][None], labels[i : i + 1]) for i in range(3)]
    alone = measure(net, singles, CROSS_ENTROPY, estimator="exact", progress=False)
    for name in ("stem.weight", "fc.weight", "same.weight"):
        assert whole[name].trace == pytest.approx(alone[name].trace, rel=1e-9)
    rows, size = alone.rows["stem.input"], alone.sizes["stem.input"]
    assert alone["stem.input"].mean_trace == pytest.approx(sum(t / n for t, n in zip(rows, size)) / 3)


@pytest.mark.parametrize(
    ("loss", "say"),
    [
        (lambda m, b: m(b[0]).sum() * float("nan"), "loss is nan"),
        (lambda m, b: m(b[0]), "not a scalar"),
        (lambda m, b: float(m(b[0]).sum()), "float, not a tensor"),
        (lambda m, b: (m(b[0]).detach() ** 2).sum(), "does not depend on"),
    ],
)
def test_losses_that_cannot_be_measured(loss, say):
    with pytest.raises(HawqError, match=say):
        measure(build(ConvNet), [batch_for(ConvNet)], loss, progress=False)


def test_bad_weights_batches_and_settings():
    net, batch = build(ConvNet), batch_for(ConvNet)
    with pytest.raises(HawqError, match="No batches"):
        measure(net, [], CROSS_ENTROPY, progress=False)
    with pytest.raises(HawqError, match=r"no estimator 'gnn'.*Did you mean 'ggn'"):
        measure(net, [batch], CROSS_ENTROPY, estimator="gnn", progress=False)
    with pytest.raises(HawqError, match="rtol"):
        measure(net, [batch], CROSS_ENTROPY, rtol=-1, progress=False)
    with torch.no_grad():
        net.same.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(HawqError, match=r"'same'.*weight holds NaN or infinity"):
        measure(net, [batch], CROSS_ENTROPY, progress=False)


def test_files_of_traces_come_back_and_damage_is_told(tmp_path):
    found = measure(build(ConvNet), [batch_for(ConvNet)], CROSS_ENTROPY, progress=False)
    path = tmp_path / "sensitivity.json"
    found.save(path)
    again = Sensitivity.load(path)
    assert again.records == found.records and again.fingerprint == found.fingerprint
    assert list(again.rows["fc.weight"]) == pytest.approx(list(found.rows["fc.weight"]), rel=1e-6)
    text = path.read_text()
    for damaged, say in (
        (text[:200], "corrupt or cut short"),
        (text.replace('"kind": "weight"', '"kind": "x"', 1), "damaged"),
        (text.replace('"version": 1', '"version": 7', 1), "version 7"),
        ("[1, 2]", "not a sensitivity file"),
    ):
        path.write_text(damaged)
        with pytest.raises(HawqError, match=say):
            Sensitivity.load(path)
    with pytest.raises(HawqError, match="No trace was measured for 'stem'"):
        found["stem"]


def test_a_share_of_the_batches_adds_up_to_the_whole():
    from hawq_lightning.sensitivity import ProcessShard

    net = build(ConvNet)
    g = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 2, 8, 8, generator=g, dtype=torch.float64), torch.arange(4) % 3) for _ in range(5)
    ]  # fmt: skip
    whole = measure(net, batches, CROSS_ENTROPY, rtol=9.0, sampling="all", seed=2, progress=False)
    tables: list[torch.Tensor] = []
    for rank in range(2):  # two processes, one after the other: the tables they would add
        measure(
            copy.deepcopy(net), batches, CROSS_ENTROPY, rtol=9.0, sampling="all", seed=2, progress=False, max_probes=2,
            shard=ProcessShard(rank, 2, lambda t: tables.append(t.clone()) or t),
        )  # fmt: skip
    both = measure(
        net, batches, CROSS_ENTROPY, rtol=9.0, sampling="all", seed=2, progress=False, max_probes=2,
        shard=ProcessShard(0, 2, lambda t: tables[0] + tables[1]),
    )  # fmt: skip
    two = measure(net, batches, CROSS_ENTROPY, rtol=9.0, sampling="all", seed=2, progress=False, max_probes=2)
    assert [r.trace for r in both] == pytest.approx([r.trace for r in two], rel=1e-12)
    assert whole.settings["probes"] >= 2


def test_a_penalty_on_weights_is_noted_and_not_counted():
    net, batch = build(ConvNet), batch_for(ConvNet)

    def penalised(m, b):
        return CROSS_ENTROPY(m, b) + 0.1 * m.fc.weight.square().sum()

    found = measure(net, [batch], penalised, estimator="exact", progress=False)
    assert any("weights of fc outside" in note for note in found.notes)
    assert {r.name: r.trace for r in found} == pytest.approx(traces(build(ConvNet)), rel=1e-9)
    assert not measure(net, [batch], CROSS_ENTROPY, estimator="exact", progress=False).notes
