"""``lq_nets`` puts activations on a learned basis as well (Zhang et al., ECCV 2018)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, Plan, PlanSite, load_packed, quantize, save_packed, sites
from hawq_lightning.export import deploy, packed_overhead, read_packed
from hawq_lightning.quantization import fake_quantize_tensor, prepare, quantized_layers, quantizer_named, with_quantizer
from hawq_lightning.quantization.methods import ActivationLQ
from tests.internals import internal


def enabled(bits: int, scale: float = 0.5, zero: int = 0) -> ActivationLQ:
    q = ActivationLQ().eval()
    q.enable(bits, scale, zero)
    return q


def net_and_plan(bits: int, seed: int = 0) -> tuple[nn.Sequential, Plan, torch.Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))  # fmt: skip
    x = torch.randn(8, 2, 6, 6)
    table = sites(net, x)
    chosen = [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 3, "affine") for s in table.weights]
    for s, zero in zip(table.activations, (3, 0, 0)):
        chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, max(bits, 2), "affine", 0.2, zero))
    return net, with_quantizer(Plan(tuple(chosen), table.layers), quantizer_named("lq_nets")), x


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_are_sums_of_the_basis_and_the_nearest_is_taken(bits):
    torch.manual_seed(bits)
    q, x = enabled(bits), torch.randn(1000).abs() * 2
    even = fake_quantize_tensor(x, torch.tensor(0.5), torch.tensor(0.0), 2**bits - 1)
    assert torch.allclose(q(x), even, atol=1e-6)  # it starts from even steps
    assert q.learned == (bits <= 4)
    if not q.learned:
        assert torch.equal(q(x), even)
        return
    basis = torch.rand(bits) + 0.1
    q.enable_basis(basis)
    levels = torch.stack([sum(b for k, b in enumerate(basis) if i >> k & 1) + torch.zeros(()) for i in range(2**bits)])
    assert torch.allclose(q.levels(), levels, atol=1e-6) and q.levels()[0] == 0
    taken = q(x)
    assert torch.isin(taken, q.levels()).all() and taken.unique().numel() <= 2**bits
    assert torch.allclose((taken - x).abs(), (levels - x[:, None]).abs().amin(1), atol=1e-5)
    assert torch.equal(q(x.double()), taken.double()) and q(x.bfloat16()).dtype == torch.bfloat16
    searched = q.levels().sort().values  # the search that other devices use
    assert torch.equal(taken, searched[torch.bucketize(x, searched[1:] / 2 + searched[:-1] / 2)])


def test_gradients_pass_between_the_lowest_and_the_highest_level():
    q = enabled(2, 1.0)
    q.enable_basis(torch.tensor([1.0, 1.5]))  # levels 0, 1, 1.5, 2.5
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-0.4, 0.3, 1.3, 2.4, 2.6, 9.0], dtype=dtype, requires_grad=True)
        y = q(x)
        assert y.tolist() == [0, 0, 1.5, 2.5, 2.5, 2.5]
        y.backward(torch.arange(1.0, 7.0, dtype=dtype))
        assert x.grad.tolist() == [0, 2, 3, 4, 0, 0]


def test_the_basis_follows_the_batches_of_training_by_a_moving_average():
    # codes 0, 1, 2, 3 by even steps; least squares: v0 = 1.2, v1 = 2.0 fit 1.2, 2.0 and 3.2 exactly
    x = torch.tensor([0.0, 1.2, 2.0, 3.2])
    q = enabled(2, 1.0).train()
    q(x)
    assert q.basis.tolist() == pytest.approx([1 + 0.1 * 0.2, 2, 0, 0])
    for _ in range(100):
        q(x)
    assert q.basis[:2].tolist() == pytest.approx([1.2, 2.0], abs=1e-4) and q.scale == 1.0
    held = q.basis.clone()
    q.eval()
    q(5 * x)
    q.train().range_updates_enabled = False
    q(5 * x)
    assert torch.equal(q.basis, held)


def test_a_learned_basis_beats_even_steps_on_what_a_relu_gives():
    torch.manual_seed(0)
    for bits in (2, 3, 4):
        x = torch.randn(64, 8, 8, 8).relu() ** 1.5
        q = ActivationLQ().eval()
        scale, zero = q.calibrate(x.flatten()[:4096], 0.0, float(x.max()), bits)
        q.enable(bits, scale, zero)
        before = float((q(x) - x).square().mean())
        q.train()
        for _ in range(150):
            q(x)
        assert float((q(x) - x).square().mean()) < 0.98 * before


@pytest.mark.parametrize("value", [0.0, 1e-40, 3e38, float("inf"), float("nan"), -3e38])
def test_no_basis_becomes_anything_but_finite(value):
    q = enabled(3).train()
    for x in (torch.full((64,), value), torch.full((1,), value), torch.empty(0), torch.tensor([0.0, value, 1.0])):
        y = q(x.requires_grad_())
        y.sum().backward()
        assert torch.isfinite(q.basis).all() and torch.isfinite(y).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_training_packing_and_integer_arithmetic(tmp_path, bits):
    net, plan, x = net_and_plan(bits)
    quantize(net, plan)
    layers = quantized_layers(net)
    start = layers["2"].input_quantizer.basis.clone()
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.arange(8) % 4).backward()
        optimizer.step()
    learned = {n: m.input_quantizer.learned for n, m in layers.items()}
    assert learned == {"0": False, "2": bits < 8, "6": bits < 8}  # the first reads negative values
    for n, m in layers.items():
        assert learned[n] or not m.input_quantizer.basis.any()
    assert torch.equal(layers["2"].input_quantizer.basis, start) == (bits == 8)
    size = save_packed(net.eval(), plan, tmp_path / "net")
    variable = sum((s.numel * 3 + 7) // 8 + 12 * s.shape[0] for s in plan.weights)
    assert size == packed_overhead(net, plan.sites, "lq_nets") + variable
    back = load_packed(tmp_path / "net", net_and_plan(bits)[0].eval())
    with torch.no_grad():
        assert torch.equal(back(x), net(x))
    assert abs(save_packed(back, plan, tmp_path / "again") - size) == 0
    file = read_packed(tmp_path / "net")
    if bits < 8:  # products of bits alone, one for every pair of members
        image = torch.rand(2, 4, 5, 5) * 2
        q, layer = layers["2"].input_quantizer, layers["2"].module
        codes = (q(image)[..., None] == q.levels()).int().argmax(-1)
        stored = file.codes["2.weight"] + 4
        out = layer.bias.detach().double().view(-1, 1, 1)
        for j, v in enumerate(file["2.input"].storage.tensors["basis"][:bits].double()):
            for k, w in enumerate(file["2.weight"].storage.tensors["basis"].double().T):
                sign = ((stored >> k) & 1) * 2 - 1
                whole = F.conv2d(((codes >> j) & 1).double(), sign.double(), padding=1)
                out = out + v * w.view(-1, 1, 1) * whole
        with torch.no_grad():
            assert torch.allclose(layer(image).double(), out, atol=1e-5)


def test_states_come_back_and_layers_of_one_tensor_share_a_basis():
    net, plan, x = net_and_plan(3)
    quantize(net, plan).train()
    net(x)
    state = copy.deepcopy(net.state_dict())
    fresh = net_and_plan(3)[0]
    prepare(fresh, quantizer="lq_nets")
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), net.eval()(x))
    old = {k: v for k, v in state.items() if not k.endswith("input_quantizer.basis")}
    fresh.load_state_dict(old)  # of a version with even steps
    assert not any(m.input_quantizer.learned for m in quantized_layers(fresh).values())
    leader, other = enabled(3).train(), enabled(3).train()
    other.tie_to(leader)
    leader(torch.rand(100)), other(torch.rand(100))
    other.refresh()
    assert torch.equal(other.basis, leader.basis) and other.learned


def test_files_of_an_earlier_version_have_even_steps_and_damage_is_told(tmp_path):
    net, plan, x = net_and_plan(3)
    quantize(net, plan).eval()
    for layer in quantized_layers(net).values():
        layer.input_quantizer.basis.zero_()
        layer.input_quantizer.refresh()
    save_packed(net, plan, tmp_path / "net")
    safetensors = internal("export._safetensors")
    tensors, metadata = safetensors.read(tmp_path / "net")
    kept = {k: v for k, v in tensors.items() if not k.endswith(".input.basis")}
    safetensors.write(tmp_path / "old", kept, metadata)
    back = load_packed(tmp_path / "old", net_and_plan(3)[0].eval())
    with torch.no_grad():
        assert torch.equal(back(x), net(x))
    damaged = {k: v + 1 if k.endswith(".input.basis") else v for k, v in tensors.items()}
    safetensors.write(tmp_path / "damaged", damaged, metadata)
    with pytest.raises(HawqError, match=r"'0.input' basis is \[1.*, which codes of 3 bits and zero point .* lack"):
        read_packed(tmp_path / "damaged")


def test_onnx_is_refused_in_one_sentence():
    net, plan, x = net_and_plan(3)
    plan = plan.replace(sites=plan.activations)
    layers = prepare(net, quantizer="lq_nets")
    for s in plan.sites:
        layers[s.layers[0]].input_quantizer.enable(s.bits, s.scale, s.zero_point)
    with pytest.raises(HawqError, match="'2' reads an activation whose levels are no even steps, for which ONNX"):
        deploy(net.eval(), plan, x)
