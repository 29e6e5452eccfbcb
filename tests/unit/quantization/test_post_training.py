"""Rounding and corrections without training: exact on small cases, better than nearest on real ones, in the Trainer."""

import itertools

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.nn import functional as F

from hawq_lightning import Distillation, HawqError, Plan, PlanSite, PostTraining, load_packed, save_packed
from hawq_lightning.quantization import enabled_bits, quantizable_layers, quantize, quantized_layers
from hawq_lightning.quantization.post_training import (
    FloatReference,
    Moments,
    adaround,
    bias_correction,
    learn_rounding,
    post_training,
    reestimate_batchnorm,
)
from tests.cases import ConvNet, Sequence1d, SharedHead, Tied, Volume, build
from tests.trainers import Classifier, assert_mixed, blobs, hawq, loader, trainer


def weight_plan(model, bits=3, code="affine", **activations):
    """Every weight at ``bits``, no activation; tied weights once."""
    seen, sites = {}, []
    for name, layer in quantizable_layers(model)[0].items():
        seen.setdefault(id(layer.weight), []).append((name, layer))
    for users in seen.values():
        layer = users[0][1]
        shape = tuple(layer.weight.shape)
        names = tuple(n for n, _ in users)
        sites.append(PlanSite(f"{names[0]}.weight", "weight", names, shape, layer.weight.numel(), bits, code))
    return Plan(sites=tuple(sites))


def inputs(kind, count=3, n=16):
    g = torch.Generator().manual_seed(0)
    shape = {Sequence1d: (n, 2, 4), Volume: (n, 1, 4, 4, 4), Tied: (n, 3, 4)}.get(kind, (n, 2, 8, 8))
    return [torch.randn(*shape, generator=g) for _ in range(count)]


def made(kind, bits=3, code="affine"):
    model = build(kind).float()
    return quantize(model, weight_plan(model, bits, code)), inputs(kind)


# ------------------------------------------------------------ rounding


@pytest.mark.parametrize("zero", [0.0, -0.5])
def test_learned_rounding_against_all_roundings(zero):
    torch.manual_seed(1)
    best_hits = 0
    for _ in range(12):
        weight, step = torch.randn(1, 6), torch.tensor([0.6])
        data = torch.randn(40, 6) @ torch.randn(6, 6)
        own = data.T @ data / 40
        codes, after, before = learn_rounding(weight, step, -4, 3, zero, own, own)
        below = (weight / 0.6 + zero).floor().clamp(-4, 3)
        above = (below + 1).clamp(-4, 3)

        def error(c, own=own, weight=weight):
            d = (c - zero) * 0.6 - weight
            return float((d @ own @ d.T).sum())

        every = [torch.stack([below, above])[list(p), 0, range(6)][None] for p in itertools.product((0, 1), repeat=6)]
        errors = [error(c) for c in every]
        assert float(after) <= float(before) + 1e-5
        assert ((codes == below) | (codes == above)).all()
        best_hits += error(codes) <= min(errors) + 1e-4
    assert best_hits >= 8  # a local search: mostly the best of all 64


def test_saturated_weights_keep_their_only_code():
    weight = torch.tensor([[5.0, -9.0, 0.2]])
    own = torch.eye(3)
    codes, *_ = learn_rounding(weight, torch.ones(1), -4, 3, 0.0, own, own)
    assert codes.tolist() == [[3, -4, 0]]


@pytest.mark.parametrize("kind, bits, code", [
    (ConvNet, 2, "midrise"), (ConvNet, 1, "midrise"), (ConvNet, 3, "affine"), (SharedHead, 3, "affine"),
    (Sequence1d, 2, "affine"), (Volume, 2, "midrise"), (Tied, 3, "affine"),
])  # fmt: skip
def test_codes_are_at_most_one_from_the_nearest_and_stick(kind, bits, code):
    model, batches = made(kind, bits, code)
    layers = quantized_layers(model)
    before = {n: m.weight_quantizer.codes(m.weight) for n, m in layers.items()}
    scales = {n: m.weight_quantizer.scale.clone() for n, m in layers.items()}
    report = adaround(model, batches)
    expected = {n for n, m in layers.items() if "Transpose" not in m.type_name}
    assert set(report) == (expected - {"a", "b"} if kind is Tied else expected)
    for n, m in layers.items():
        after = m.weight_quantizer.codes(m.weight)
        assert (after - before[n]).abs().max() <= 1 and torch.equal(scales[n], m.weight_quantizer.scale)
        if n in report:
            assert torch.equal(m.weight, m.weight_quantizer(m.weight))  # on the grid
            assert report[n]["after"] <= report[n]["before"] + 1e-6
            assert report[n]["moved"] == pytest.approx(float((after != before[n]).float().mean()))
    assert any(r["moved"] > 0 for r in report.values())


def test_the_report_is_the_layers_output_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    x, w = torch.randn(64, 6) @ torch.randn(6, 6), model[0].weight.detach().clone()
    quantize(model, weight_plan(model, 2))
    nearest = model[0].weight_quantizer(w)
    report = adaround(model, [x], ridge=0.0)["0"]
    power = (x @ w.T).square().sum()
    assert report["before"] == pytest.approx(float((x @ (nearest - w).detach().T).square().sum() / power), rel=1e-3)
    assert report["after"] == pytest.approx(
        float((x @ (model[0].weight.detach() - w).T).square().sum() / power), rel=1e-3
    )
    assert report["after"] < 0.9 * report["before"]


def test_reconstruction_takes_the_quantized_input():
    """The second layer makes up for the error that the first one passes on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    x = torch.randn(256, 8)
    target = model(x).detach()
    quantize(model, weight_plan(model, 3))

    def error():
        return float((model(x).detach() - target).square().sum())

    nearest = error()
    adaround(model, [x])
    assert error() < 0.7 * nearest


def test_packed_files_hold_the_learned_codes(tmp_path):
    model, batches = made(ConvNet)
    plan = weight_plan(build(ConvNet).float())
    plan = plan.replace(costs={"weight_bytes": 0.0})
    adaround(model, batches)
    save_packed(model, plan, tmp_path / "m.safetensors")
    again = load_packed(tmp_path / "m.safetensors", build(ConvNet).float())
    assert torch.equal(model(batches[0]), again(batches[0]))


# ------------------------------------------------------------ corrections


def output_means(model, name, batches):
    kept = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: kept.append(y.detach().clone()))
    with torch.no_grad():
        for b in batches:
            model(b)
    handle.remove()
    y = torch.cat(kept)
    return y.transpose(0, 1).flatten(1).mean(1)


class Norms(nn.Module):
    """A bias, a BatchNorm, both shared and nothing to correct."""

    def __init__(self):
        super().__init__()
        self.biased = nn.Conv2d(2, 4, 3)
        self.normed = nn.Conv2d(4, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.both = nn.BatchNorm2d(4)
        self.bare = nn.Conv2d(4, 3, 1, bias=False)

    def forward(self, x):
        x = F.relu_(self.bn(self.normed(F.relu(self.biased(x)))))
        return self.bare(self.both(self.left(x)) + self.both(self.right(x)))


def test_means_are_those_of_the_float_network():
    model, batches = build(Norms).float(), inputs(ConvNet)
    wanted = {n: output_means(model, n, batches) for n in ("biased", "bn")}
    bn = model.bn.running_mean.clone()
    quantize(model, weight_plan(model, 2))
    off = {n: (output_means(model, n, batches) - wanted[n]).abs().max() for n in wanted}
    found = bias_correction(model, batches)
    assert set(found) == {"biased", "normed"}  # a shared BatchNorm belongs to none, the last has neither
    for n in wanted:
        now = (output_means(model, n, batches) - wanted[n]).abs().max()
        assert now < 1e-5 < off[n], n
    assert not torch.equal(bn, model.bn.running_mean)
    assert [k for k, _ in model.named_parameters() if k.endswith("bias")] == ["biased.bias", "bn.bias", "both.bias"]


@pytest.mark.parametrize("kind", [ConvNet, SharedHead, Sequence1d, Volume, Tied])
def test_correction_on_every_kind_of_layer(kind):
    model, batches = made(kind, 2)
    float_net = build(kind).float()
    found = bias_correction(model, batches)
    assert found and all(v >= 0 for v in found.values())
    if kind is ConvNet:
        name = "fc"
        mean = [torch.cat([m(b) for b in batches]).mean(0) for m in (model, float_net)]
        assert name in found and torch.allclose(*mean, atol=1e-5)


def test_batchnorm_statistics_of_the_quantized_network():
    model, batches = made(ConvNet, 2)
    with torch.no_grad():
        stem = [model.stem(b) for b in batches]
    momentum = model.bn.momentum
    reestimate_batchnorm(model, batches)
    assert torch.allclose(model.bn.running_mean, torch.stack([s.mean((0, 2, 3)) for s in stem]).mean(0), atol=1e-6)
    variances = torch.stack([s.transpose(0, 1).flatten(1).var(1) for s in stem]).mean(0)
    assert torch.allclose(model.bn.running_var, variances, rtol=1e-4)
    assert model.bn.momentum == momentum and not model.bn.training


def test_the_reference_is_the_float_network_all_along():
    model = build(ConvNet).float()
    x = inputs(ConvNet)[0]
    expected = model(x).detach()
    quantize(model, weight_plan(model, 2))
    reference = FloatReference(model)
    quantized = model(x).detach()
    post_training(model, [x], ["adaround", "bias_correction", "batchnorm"])
    with reference.in_place():
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), quantized)


def test_all_together_and_modes(tmp_path):
    torch.manual_seed(0)
    model, batches = made(ConvNet, 2)
    model.train()
    float_net, state = build(ConvNet).float(), torch.get_rng_state()

    def error():
        with torch.no_grad():
            model.eval()
            out = sum(float((model(b) - float_net(b)).square().mean()) for b in batches)
            model.train()
        return out

    nearest = error()
    found = post_training(model, batches)
    assert list(found) == ["adaround", "bias_correction"] and error() < 0.5 * nearest
    assert all(m.training for m in model.modules()) and torch.equal(state, torch.get_rng_state())


def test_refused():
    model = build(ConvNet).float()
    with pytest.raises(HawqError, match="No quantizer of this model is enabled"):
        post_training(model, inputs(ConvNet))
    quantize(model, weight_plan(model, 2))
    with pytest.raises(HawqError, match="no batches"):
        adaround(model, [])
    with pytest.raises(HawqError, match="post_training='adaruond' is unknown.*adaround"):
        post_training(model, inputs(ConvNet), ["adaruond"])
    with pytest.raises(HawqError, match="post_training='x'"):
        PostTraining(["x"])
    with pytest.raises(HawqError, match="names no method"):
        PostTraining([])


def test_moments_of_rows_add_up():
    rows = torch.randn(1, 3, 5)
    x, q = torch.randn(1, 20, 5), torch.randn(1, 20, 5)
    whole, parts = Moments(rows), Moments(rows)
    whole.add(x, q)
    for i in (0, 12):
        parts.add(x[:, i : i + 12], q[:, i : i + 12])
    for a, b in zip(whole.mean(), parts.mean()):
        assert torch.allclose(a, b, atol=1e-6)


# ------------------------------------------------------------ Trainer


class Blobs(LightningDataModule):
    """Train data only once it was set up for fitting."""

    def __init__(self, train=True):
        super().__init__()
        self.with_train, self.stages = train, []

    def setup(self, stage):
        self.stages.append(stage)
        if stage == "fit" and self.with_train:
            self.train = blobs(64, seed=0)
        self.val = blobs(64, seed=5)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.train, 16)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.val, 32)


def trained(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    trainer(tmp_path, max_epochs=12).fit(model, loader())
    return model


@pytest.mark.parametrize("train", [True, False])
def test_validate_alone_quantizes_and_scores(tmp_path, train, caplog):
    model, data, callback, improving = trained(tmp_path), Blobs(train), hawq(budget="9x"), PostTraining()
    t = trainer(tmp_path, callback, improving)
    with caplog.at_level("INFO"):
        (scores,) = t.validate(model, datamodule=data, verbose=False)
    assert_mixed(model, callback)
    assert ("measures on the validation data" in caplog.text) is not train
    assert "adaround: 3 layers" in caplog.text and set(improving.improved) == {"adaround", "bias_correction"}
    assert not any(p.is_inference() for p in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        model.eval()
        x, y = blobs(64, seed=5).tensors
        assert scores["val_acc"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    (again,) = t.validate(model, datamodule=data, verbose=False)  # it stays
    assert again == scores and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.warns(UserWarning, match="keeps their bits"):
        trainer(tmp_path, hawq(), PostTraining()).fit(model, loader())  # and can be trained on


def test_where_rounding_cannot_be_learned_statistics_are(tmp_path):
    model, callback = trained(tmp_path), PostTraining()
    t = trainer(tmp_path, callback, hawq(quantizer="lq_nets"))
    (scores,) = t.validate(model, loader(shuffle=False), verbose=False)
    assert list(callback.improved) == ["adaround", "batchnorm", "bias_correction"] and scores["val_acc"] > 0.5
    assert not callback.improved["adaround"] and callback.improved["batchnorm"].keys() == {"net.1"}


def test_fit_starts_from_the_improved_network(tmp_path):
    model, callback, improving = trained(tmp_path), hawq(), PostTraining(["adaround"])
    trainer(tmp_path, improving, callback, Distillation(), max_epochs=1, limit_train_batches=1).fit(model, loader())
    assert set(improving.improved) == {"adaround"}
    assert_mixed(model, callback)


def test_without_post_training_validate_leaves_the_network_float(tmp_path):
    model = Classifier()
    trainer(tmp_path, hawq()).validate(model, loader(shuffle=False), verbose=False)
    assert not enabled_bits(model)
    with (
        pytest.warns(UserWarning, match="this network is float: no quantizer is enabled"),
        pytest.warns(UserWarning, match="the network is float here"),
    ):
        trainer(tmp_path, hawq(), PostTraining()).test(model, loader(shuffle=False), verbose=False)


def test_corrections_agree_in_any_order():
    batches = inputs(ConvNet)
    means = []
    for methods in (["bias_correction"], ["batchnorm", "bias_correction"], ["bias_correction"] * 2):
        model = build(Norms).float()
        quantize(model, weight_plan(model, 2))
        post_training(model, batches, methods)
        means.append(model.bn.running_mean)
    assert torch.allclose(means[0], means[1], atol=1e-6) and torch.allclose(means[0], means[2], atol=1e-6)


def test_a_norm_whose_input_something_else_reads_is_left_alone():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
            self.norm_a, self.norm_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.a(x)
            return self.norm_b(self.b(torch.relu(self.norm_a(y) + y)))  # a's outputs go on past the norm, too

    torch.manual_seed(0)
    model, x = Skip().eval(), torch.randn(8, 3, 6, 6)
    quantize(model, weight_plan(model, 2))
    assert set(bias_correction(model, [x])) == {"b"}
