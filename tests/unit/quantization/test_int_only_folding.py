"""``int_only`` folds BatchNorm while it trains: one step a tensor once it is folded for good (Jacob et al., 3.2)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hawq_lightning import HAWQ, Plan, PlanSite, load_from_checkpoint, load_packed, quantize, save_packed, sites
from hawq_lightning.export import deploy, stored_layers
from hawq_lightning.export.onnx import to_onnx
from hawq_lightning.quantization import (
    plan_of,
    prepare,
    quantized_layers,
    quantizer_named,
    tie_scales,
    weight_candidates,
    with_quantizer,
)
from hawq_lightning.quantization.post_training import reestimate_batchnorm
from tests.trainers import Classifier, hawq, loader, trainer


class Net(nn.Module):
    """Two convolutions with a BatchNorm, one without, one read by two, a weight shared by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.up, self.bn_up = nn.ConvTranspose2d(6, 5, 2), nn.BatchNorm2d(5)
        self.plain = nn.Conv2d(5, 4, 3)
        self.levels, self.bn_one, self.bn_two = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.tied, self.bn_tied, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.other.weight = self.tied.weight
        self.read, self.bn_read = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn_a(self.a(x)))
        x = torch.relu(self.plain(torch.relu(self.bn_up(self.up(x)))))
        x = torch.relu(self.bn_one(self.levels(x)) + self.bn_two(self.levels(x[:, :, 1:-1, 1:-1])).mean())
        x = torch.relu(self.other(torch.relu(self.bn_tied(self.tied(x)))))
        y = self.read(x)
        return (self.bn_read(y) + y).mean((2, 3))


def planned(net: nn.Module, x: torch.Tensor, bits: int = 4, activations: bool = True) -> Plan:
    table = sites(net, x)
    code = "midrise" if bits == 1 else "affine"
    chosen = [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, code) for s in table.weights]
    if activations:
        chosen += [
            PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 8, "affine", 0.02, 99) for s in table.activations
        ]
    return with_quantizer(Plan(tuple(chosen), table.layers), quantizer_named("int_only"))


def trained(bits: int = 4, seed: int = 0) -> tuple[Net, Plan, torch.Tensor]:
    """A network with gammas of both signs and one of zero, trained for some steps."""
    torch.manual_seed(seed)
    net, x = Net(), torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.normal_()
                m.running_var.uniform_(0.01, 2)
        net.bn_a.weight[2], net.bn_a.weight[0], net.bn_up.weight[0] = 0.0, -0.6, -0.7
    plan = planned(net, x, bits)
    quantize(net, plan)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return net, plan, x


def test_sites_know_which_norm_can_be_folded():
    torch.manual_seed(0)
    found = {x.name: x.norm for x in sites(Net(), torch.randn(2, 3, 8, 8)).layers}
    expected = dict.fromkeys(("plain", "levels", "other", "read")) | {"a": "bn_a", "up": "bn_up", "tied": "bn_tied"}
    assert found == expected
    plan = planned(Net(), torch.randn(2, 3, 8, 8))
    assert Plan.from_dict(plan.to_dict()).layers == plan.layers


def test_codes_are_those_of_the_folded_weight_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.0)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.5, -2.0]).view(2, 1, 1, 1))
        net[1].weight.copy_(torch.tensor([2.0, -1.0]))  # f = 4 and 1/2: folded weights 2 and -1
        net[1].running_var.copy_(torch.tensor([0.25, 4.0]))
    quantize(net, planned(net, torch.ones(1, 1, 2, 2), 3, activations=False))
    q, s = net[0].weight_quantizer, 3 / 7  # seven steps from -1 to 2; zero is code round(-4 + 7 / 3)
    assert q.step.item() == pytest.approx(s) and q.zero_point.item() == -2
    assert q.scale.tolist() == pytest.approx([s / 4, 2 * s])
    assert q.codes(net[0].weight).flatten().tolist() == [3, -4]  # 2 and -1 are 4.7 and -2.3 steps
    assert net[0].quantized_weight.flatten().tolist() == pytest.approx([5 * s / 4, -2 * s * 2])
    # evaluation follows the statistics with the step that it has
    net[1].running_var.copy_(torch.tensor([0.25, 1.0]))
    net(torch.ones(1, 1, 2, 2))
    assert q.scale.tolist() == pytest.approx([s / 4, s]) and q.step.item() == pytest.approx(s)
    # training takes a new range: folded weights 2 and -2
    net[0].train()
    net(torch.ones(1, 1, 2, 2))
    assert q.step.item() == pytest.approx(4 / 7) and q.zero_point.item() in (0, -1)


def test_gradients_pass_inside_of_the_folded_range_and_gamma_gets_that_of_batchnorm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3))
    x = torch.randn(4, 2, 6, 6)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -0.3, 2.0]))
    quantize(net, planned(net, x, 3, activations=False))
    net.train()
    float_net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3))
    float_net.load_state_dict(net.state_dict(), strict=False)
    weight = net[0].quantized_weight.detach()
    float_net[0].weight.data.copy_(weight)
    for each in (net, float_net):
        each(x).pow(3).sum().backward()
    # the range is the weights' own, so that nothing is outside of it, but for what nudging moves out
    q = net[0].weight_quantizer
    folded = net[0].weight.detach() * q.factor.view(3, 1, 1, 1)
    low, high = (-4 - q.zero - 0.5) * q.step, (3 - q.zero + 0.5) * q.step
    inside = (folded >= low) & (folded <= high)
    assert torch.allclose(net[0].weight.grad, float_net[0].weight.grad * inside, atol=1e-4)
    assert torch.allclose(net[1].weight.grad, float_net[1].weight.grad, atol=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_folded_for_good_every_channel_has_one_step(tmp_path, bits):
    net, plan, x = trained(bits, seed=bits)
    layers = quantized_layers(net)
    assert {n for n, m in layers.items() if m.weight_quantizer.folding} == {"a", "up"}
    steps = {n: m.weight_quantizer.scale.clone() for n, m in layers.items()}
    size = save_packed(net.eval(), plan, tmp_path / "net")
    with torch.no_grad():
        expected = net(x)
        back = load_packed(tmp_path / "net", Net()).eval()
        assert size and torch.equal(back(x), expected)
        unfolded = deploy(net, plan, x, fold=False)
        assert torch.equal(unfolded.model(x), expected)
        deployed = deploy(net, plan, x)
        assert torch.allclose(deployed.model(x), expected, atol=1e-3 * float(expected.abs().max()))
    assert deployed.folding.folded == {"bn_a": ("a",), "bn_up": ("up",), "bn_tied": ("tied",)}
    if bits == 1:
        return
    for name, layer in stored_layers(deployed.model):
        scale = layer.weight_quantizer.scale
        if name in ("a", "up"):
            live = scale[scale != 0]
            assert len(live) == len(scale) - (name == "a")
            assert torch.allclose(live.abs(), layers[name].weight_quantizer.step.expand_as(live), rtol=1e-6)
            assert (live < 0).any() and steps[name].unique().numel() > 1
            gamma = getattr(net, f"bn_{name}").weight
            assert torch.equal(torch.sign(scale), torch.sign(gamma.detach()))
        elif name in ("plain", "levels"):
            assert scale.unique().numel() == 1


def test_onnx_has_one_step_a_tensor(tmp_path):
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)), torch.randn(8, 3)
    with torch.no_grad():
        net[1].weight.normal_()
    plan = planned(net, x)
    quantize(net, plan)
    net.train()
    net(x)
    to_onnx(net.eval(), plan, x, tmp_path / "net.onnx")
    (scale,) = [
        t for t in onnx.load(tmp_path / "net.onnx").graph.initializer if t.name.endswith("weight_quantizer.scale")
    ]
    folded = torch.from_numpy(onnx.numpy_helper.to_array(scale).copy())
    assert torch.allclose(folded, net[0].weight_quantizer.step * net[1].weight.detach().sign(), rtol=1e-6)


def test_state_dicts_come_back_exactly_whether_norms_are_known_or_not():
    net, plan, x = trained(4)
    state = copy.deepcopy(net.state_dict())
    alone, tied = Net(), Net()
    prepare(alone, quantizer="int_only")
    alone.load_state_dict(state)
    quantize(tied, plan)
    tied.load_state_dict(state)
    net.eval()
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(alone.eval()(x), expected) and torch.equal(tied.eval()(x), expected)
        assert torch.equal(copy.deepcopy(net)(x), expected)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())  # evaluation moves nothing
    assert not quantized_layers(alone)["a"].weight_quantizer.folding
    tie_scales(alone, plan)
    assert quantized_layers(alone)["a"].weight_quantizer.folding
    with torch.no_grad():
        assert torch.equal(alone(x), expected)
    old = {k: v for k, v in state.items() if not k.endswith(("weight_quantizer.factor", "weight_quantizer.step"))}
    alone.load_state_dict(old)  # saved before this quantizer folded
    assert torch.equal(quantized_layers(alone)["a"].weight_quantizer.scale, state["a.weight_quantizer.scale"])


def test_a_channel_whose_gamma_is_zero_can_come_back():
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3))
    x = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for gamma in ([1.0, 0.0, -1.0], [0.0, 0.0, 0.0]):
        with torch.no_grad():
            net[1].weight.copy_(torch.tensor(gamma))
        quantize(net, planned(net, x, 4, activations=False))
        net.train()
        net.zero_grad()
        (net(x) - x[:, :1]).square().sum().backward()
        assert net[0].quantized_weight[1].abs().max() > 0 and net[1].weight.grad[1] != 0
        assert all(torch.isfinite(v).all() for v in net.state_dict().values())
    for broken in (float("inf"), float("nan"), 3e38, 1e-40):
        net[1].running_var.fill_(broken)
        assert torch.isfinite(net[0].quantized_weight).all()


def test_a_layer_without_norm_is_as_before_and_errors_are_weighed_folded():
    torch.manual_seed(0)
    w, norm = torch.randn(4, 6), nn.BatchNorm1d(4).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([4.0, 0.1, 1.0, -1.0]))
    (plain,), (folded,) = (weight_candidates(w, 0, (4,), 1.0, "auto", "int_only", n) for n in (None, norm))
    low, high = w.min(), w.max()
    step = (high - low) / 15
    zero = torch.round(-8 - low / step)
    even = (torch.clamp(torch.round(w / step) + zero, -8, 7) - zero) * step
    assert plain.perturbation == pytest.approx(float((even - w).square().sum()), rel=1e-4)
    f = norm.weight.detach()[:, None] / (1 + norm.eps) ** 0.5
    inner = w * f.abs()
    step = (inner.max() - inner.min()) / 15
    zero = torch.round(-8 - inner.min() / step)
    error = (torch.clamp(torch.round(inner / step) + zero, -8, 7) - zero) * step / f.abs() - w
    assert folded.perturbation == pytest.approx(float(error.square().sum()), rel=1e-4)
    assert folded.perturbation > plain.perturbation


def test_new_statistics_bring_new_ranges():
    net, _, x = trained(4)
    q = quantized_layers(net)["up"].weight_quantizer
    net.bn_a.running_var.fill_(1e-4)
    net.bn_up.running_var.fill_(1e-4)
    before = float(q.step)
    reestimate_batchnorm(net.eval(), [x, -x])
    assert torch.allclose(q.factor, net.bn_up.weight.abs() / (net.bn_up.running_var + 1e-5).sqrt(), rtol=1e-5)
    folded = net.up.weight.detach() * q.factor.view(1, -1, 1, 1)
    assert float(q.step) == pytest.approx(float(folded.max().clamp_min(0) - folded.min().clamp_max(0)) / 15, rel=1e-5)
    assert float(q.step) != pytest.approx(before, rel=1e-2)


def test_in_the_trainer_and_after_a_restart(tmp_path):
    torch.manual_seed(0)

    def callback() -> HAWQ:
        return hawq(
            weight_bits=(4,), budget="8x", selector="uniform", quantizer="int_only", rtol=0.05, max_probes=2,
            dirpath=tmp_path,
        )  # fmt: skip

    first = callback()
    model, run = Classifier(), trainer(tmp_path, first, max_epochs=1)
    run.fit(model, loader())
    q = quantized_layers(model)["net.0"].weight_quantizer
    assert {x.name: x.norm for x in first.plan.layers} == {"net.0": "net.1", "net.4": None, "net.6": None} and q.folding
    model.eval()
    x = next(iter(loader()))[0]
    with torch.no_grad():
        expected = model(x)
    norm = model.net[1]
    f = norm.weight.abs() / (norm.running_var + norm.eps).sqrt()
    assert torch.allclose(q.scale * f, q.step.expand(16)) and q.scale.unique().numel() > 1
    run.save_checkpoint(tmp_path / "last.ckpt")
    back = load_from_checkpoint(Classifier, tmp_path / "last.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(back(x), expected)
    assert plan_of(back).quantizer == "int_only"
    again = Classifier()
    trainer(tmp_path, callback(), max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert quantized_layers(again)["net.0"].weight_quantizer.folding
