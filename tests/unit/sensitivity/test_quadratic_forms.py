"""Quadratic forms of rounding errors on their way: drawn samples, parts, interruptions, processes, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import (
    Candidates,
    HawqError,
    MeasureConfig,
    QuantizerConfig,
    Sensitivity,
    candidates,
    measure,
    sites,
)
from hawq_lightning.quantization import rounding_errors
from hawq_lightning.sensitivity import ProcessShard, find_sites
from tests.cases import CASES, ConvNet, batch_for, build
from tests.unit.sensitivity.test_importance_sampling import images, sure_net

_, LOSS = CASES["cross_entropy"]
CONFIG = QuantizerConfig(weight_bits=(2, 4), activation_bits=(3,), input_bits=None)


@pytest.fixture(scope="module")
def trained():
    """A network that is sure of most images; its batches, sites, errors, and the exact forms."""
    net, (x, y) = sure_net(), images(48)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)]
    table = find_sites(net, lambda: LOSS(net, batches[0]), 16)
    rounding = rounding_errors(net, candidates(net, batches, None, table, LOSS, config=CONFIG), table)
    exact = measure(net, batches, LOSS, sites=table, estimator="exact", rounding=rounding, progress=False)
    return net, batches, table, rounding, exact


def values(measured: Sensitivity) -> dict[tuple[str, int], float]:
    return {(site, f.bits): f.value for site, forms in measured.forms.items() for f in forms}


def test_asking_for_forms_moves_no_trace(trained):
    net, batches, table, rounding, _ = trained
    keywords = {"sites": table, "seed": 1, "max_probes": 8, "progress": False}
    plain = measure(net, batches, LOSS, **keywords)
    both = measure(net, batches, LOSS, rounding=rounding, **keywords)
    assert [r.trace for r in both] == pytest.approx([r.trace for r in plain], rel=1e-12) and plain.forms == {}
    assert plain.fingerprint != both.fingerprint


def test_forms_of_drawn_images_are_within_their_errors(trained):
    net, batches, table, rounding, exact = trained
    drawn = measure(net, batches, LOSS, sites=table, sampling="curvature", rounding=rounding, progress=False)
    assert drawn.settings["draw"] == "curvature"
    for site, forms in exact.forms.items():
        for right, found in zip(forms, drawn.forms[site]):
            assert found.stderr > 0
            assert abs(found.value - right.value) <= 4.5 * found.stderr, (site, found, right)
            assert found.stderr_data == pytest.approx(right.stderr_data, rel=0.5)


@pytest.mark.stress
def test_intervals_of_forms_cover(trained):
    net, batches, table, rounding, exact = trained
    for sampling in ("curvature", "all"):
        hits = total = 0
        for seed in range(150):
            found = measure(
                net, batches, LOSS, sites=table, sampling=sampling, seed=seed, rounding=rounding, rtol=0.1,
                max_probes=200, progress=False,
            )  # fmt: skip
            for site, forms in exact.forms.items():
                for right, form in zip(forms, found.forms[site]):
                    hits += abs(form.value - right.value) <= 1.96 * form.stderr
                    total += 1
        assert 0.92 <= hits / total <= 0.98, (sampling, hits / total)


def test_forms_are_the_same_in_parts_and_after_an_interruption(trained, tmp_path):
    net, batches, table, rounding, exact = trained
    keywords = {"sites": table, "rounding": rounding, "progress": False, "sampling": "all", "max_probes": 6, "seed": 2}

    def small(model, batch):
        if len(batch[0]) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return LOSS(model, batch)

    parts = measure(net, batches, small, sites=table, rounding=rounding, estimator="exact", progress=False)
    assert values(parts) == pytest.approx(values(exact), rel=1e-9)

    left = [10**6]

    def cut(model, batch):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("stopped")
        return LOSS(model, batch)

    whole = measure(net, batches, cut, **keywords)
    left[0] = 10**6 - left[0] - 2  # all but the last two calls
    with pytest.raises(RuntimeError, match="stopped"):
        measure(net, batches, cut, resume=tmp_path / "rows", **keywords)
    assert (tmp_path / "rows").is_file()
    assert values(measure(net, batches, LOSS, resume=tmp_path / "rows", **keywords)) == values(whole)


def test_forms_are_summed_over_processes(trained):
    net, batches, table, rounding, exact = trained
    seen: list[list[torch.Tensor]] = []
    for rank in (0, 1):  # each alone: what a process contributes to the sum is what it gives to it
        tables: list[torch.Tensor] = []

        def keep(t: torch.Tensor, tables=tables) -> torch.Tensor:
            tables.append(t.clone())
            return t

        shard = ProcessShard(rank, 2, keep)
        measure(
            net, batches, LOSS, sites=table, estimator="exact", sampling="all", shard=shard, rounding=rounding,
            progress=False,
        )  # fmt: skip
        seen.append(tables)
    counts = {n: rounding.count(n) for n in rounding.candidates}
    size = 2 * 48 * sum(counts.values())
    mine, theirs = (next(t for t in tables if t.numel() == size) for tables in seen)
    means = (mine + theirs)[: size // 2].split([48 * c for c in counts.values()])
    for (site, count), rows in zip(counts.items(), means):
        right = [f.value for f in exact.forms[site]]
        assert rows.reshape(48, count).mean(0).tolist() == pytest.approx(right, rel=1e-9)


def test_files_keep_forms_and_old_files_have_none(trained, tmp_path):
    *_, exact = trained
    exact.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json").forms == exact.forms
    data = exact.to_dict()
    del data["forms"]
    assert Sensitivity.from_dict(data).forms == {}
    for change, said in (
        ({"bits": 9}, "bits"), ({"code": "octal"}, "code"), ({"value": "much"}, "value"), ({"sign": 1}, "sign"),
        ({"stderr": -1.0}, "stderr"),
    ):  # fmt: skip
        broken = json.loads(json.dumps(exact.to_dict()))
        broken["forms"]["fc.weight"][0] |= change
        with pytest.raises(HawqError, match=said):
            Sensitivity.from_dict(broken)
    broken["forms"] = {"nobody": []}
    with pytest.raises(HawqError, match="nobody"):
        Sensitivity.from_dict(broken)


def test_one_batch_that_couples_its_images_has_no_error_of_the_data():
    _, dice = CASES["dice"]
    net, batch = build(ConvNet), batch_for(ConvNet)
    table = find_sites(net, lambda: dice(net, batch), 4)
    rounding = rounding_errors(net, candidates(net, [batch], None, table, dice, config=CONFIG), table)
    measured = measure(net, [batch], dice, sites=table, rounding=rounding, progress=False)
    assert measured.row_unit["fc.weight"] == "batch"
    assert all(math.isinf(f.stderr_data) for forms in measured.forms.values() for f in forms)
    assert Sensitivity.from_dict(measured.to_dict()).forms == measured.forms


def test_an_estimator_without_forms_says_so(trained):
    net, batches, table, rounding, _ = trained
    measured = measure(
        net, batches[:1], LOSS, sites=table, estimator="hutchinson", rounding=rounding, max_probes=2, progress=False
    )
    assert measured.forms == {} and any("quadratic forms" in n and "'ggn'" in n for n in measured.notes)


def test_candidates_carry_the_form_of_their_own_error_only(trained, tmp_path):
    net, batches, table, _, exact = trained
    weighed = candidates(net, batches, exact, table, LOSS, config=CONFIG)
    assert all(c.q == pytest.approx(f.value) for n, cs in weighed.items() for c, f in zip(cs, exact.forms[n]))
    assert " q\n" in str(weighed) and weighed.rows()[0]["q"] == weighed["stem.weight"][0].q
    weighed.save(tmp_path / "c.json")
    assert Candidates.load(tmp_path / "c.json") == weighed
    other = candidates(
        net, batches, exact, table, LOSS, config=CONFIG, weight_bits=(3, 4), options={"ranges": "minmax"}
    )
    assert all(c.q is None for n, cs in other.items() for c in cs if n.endswith("weight"))


@pytest.mark.parametrize("bits", [(1, 8), (2, 8)])
def test_forms_predict_the_loss_of_a_regression_exactly(bits):
    """A linear network with squared error has no third derivative: Q / 2 is the loss change, but for the slope."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(32, 6)
    batch = (x, net(x).detach())  # the loss is zero, and flat, at the float network

    def loss(m, b):
        return F.mse_loss(m(b[0]), b[1])

    table = sites(net, batch)
    weighed = candidates(net, [batch], None, table, loss, weight_bits=bits, activation_bits=bits[1], input_bits=None)
    rounding = rounding_errors(net, weighed, table)
    config = MeasureConfig(estimator="exact")
    measured = measure(net, [batch], loss, sites=table, config=config, rounding=rounding, progress=False)
    for error, form in zip(rounding.weights["0.weight"], measured.forms["0.weight"]):
        moved = nn.Linear(6, 4)
        moved.load_state_dict({"weight": net[0].weight + error, "bias": net[0].bias})
        assert float(loss(moved, batch)) == pytest.approx(form.value / 2, rel=1e-4)
    (error,) = rounding.activations["0.input"](x)
    assert float(loss(net, (x + error, batch[1]))) == pytest.approx(measured.forms["0.input"][0].value / 2, rel=1e-3)


class Normed(nn.Module):
    """Layers with a BatchNorm of their own, one with a bias, a grouped one, one over positions; and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.grouped, self.bn2 = nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4)
        self.lin, self.bn3 = nn.Linear(16, 5), nn.BatchNorm1d(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn2(self.grouped(F.relu(self.bn1(self.conv(x))))))
        return self.fc(F.relu(self.bn3(self.lin(x.flatten(1)))))


@pytest.mark.parametrize("estimator", ["exact", "auto"])
def test_what_batchnorm_takes_back_is_left_out(estimator):
    """Against the second derivative along the change of the layer's output that is left, in float64."""
    torch.manual_seed(0)
    net = Normed().double()
    x = torch.randn(64, 2, 8, 8, dtype=torch.float64)
    for _ in range(30):
        net(x)
    net.eval()
    batches = [(x[:40], torch.arange(40) % 3), (x[40:], torch.arange(24) % 3)]
    table = find_sites(net, lambda: LOSS(net, batches[0]), 40)
    weighed = candidates(net, batches, None, table, LOSS, weight_bits=(1, 2, 4), activation_bits=None)
    rounding = rounding_errors(net, weighed, table, batches, LOSS)
    assert set(rounding.offsets) == {"conv.weight", "grouped.weight", "lin.weight"}
    found = measure(
        net, batches, LOSS, sites=table, estimator=estimator, rounding=rounding, max_probes=40, progress=False
    )
    assert all(f.renormalised is None for f in found.forms["fc.weight"])
    for site in rounding.offsets:
        layer = net.get_submodule(site.removesuffix(".weight"))
        read: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda m, args, read=read: read.append(args[0].detach()))
        net(x)
        handle.remove()
        before = layer(read[0]).detach()
        for error, form in zip(rounding.weights[site], found.forms[site]):
            kept = layer.weight.data
            layer.weight.data = kept + error
            after = layer(read[0]).detach()
            layer.weight.data = kept
            axes = [0, *range(2, before.ndim)]
            bn = {"conv": net.bn1, "grouped": net.bn2, "lin": net.bn3}[site.removesuffix(".weight")]
            moments = [
                (y.mean(axes, keepdim=True), (y.var(axes, correction=0, keepdim=True) + bn.eps).sqrt())
                for y in (before, after)
            ]
            (mu, sd), (mu_q, sd_q) = moments
            left = sd / sd_q * (after - mu_q) + mu - before
            shift = torch.zeros_like(before, requires_grad=True)
            handle = layer.register_forward_hook(lambda m, args, out, shift=shift: out + shift)
            loss = F.cross_entropy(net(x), torch.cat([b[1] for b in batches]))
            handle.remove()
            (slope,) = torch.autograd.grad(loss, shift, create_graph=True)
            (product,) = torch.autograd.grad((slope * left).sum(), shift)
            right = float((product * left).sum())
            assert form.renormalised is not None and form.renormalised_stderr is not None
            assert abs(form.renormalised - right) <= 1e-6 * right + 4.5 * form.renormalised_stderr, (site, form)
    assert Sensitivity.from_dict(found.to_dict()).forms == found.forms
