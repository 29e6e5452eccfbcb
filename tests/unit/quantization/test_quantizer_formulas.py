"""Every quantizer against its paper: forward values, levels, gradients, odd tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hawq_lightning import Plan, PlanSite
from hawq_lightning.quantization import CODE_FORMATS, quantize, quantizer_named, quantizer_names, reestimate

NAMES = [n for n in quantizer_names() if not n.startswith("test_")]
ODD = {
    "zero": torch.zeros(2, 3),
    "constant": torch.full((2, 3), 0.7),
    "denormal": torch.tensor([[1e-40, -1e-41, 0.0]]),
    "huge": torch.tensor([[3e38, -1e38, 1.0]]),
    "one": torch.tensor([[5.0]]),
    "negative": torch.tensor([[-5.0]]),
    "mixed": torch.tensor([[0.0, 1e-3], [1e3, 0.0]]),
    "vast": torch.full((1, 4), 3e38),
}


def weights(name, weight, bits, code=None, axis=0, **options):
    q = quantizer_named(name, options).weight_quantizer(weight.shape[axis], axis)
    error = q.eval().fit(weight, bits, code or q.code_formats(bits)[0])
    return q, error


def activations(name, bits, sample, **options):
    q = quantizer_named(name, options).activation_quantizer().eval()
    q.enable(bits, *q.calibrate(sample.flatten(), float(sample.min()), float(sample.max()), bits))
    return q


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_codes_error_and_dequantization(name, bits):
    torch.manual_seed(bits)
    for shape, axis in (((3, 700), 0), ((2, 3, 5, 5), 1)):
        w = torch.randn(shape) * torch.tensor([0.1, 1.0, 4.0]).view([-1 if i == axis else 1 for i in range(len(shape))])
        for code in quantizer_named(name).weight_quantizer(1).code_formats(bits):
            q, error = weights(name, w, bits, code, axis)
            out, codes = q(w).detach(), q.codes(w)
            assert q.code == code and q.bits == bits
            assert -(2 ** (bits - 1)) <= codes.min() and codes.max() <= 2 ** (bits - 1) - 1
            assert torch.equal(q.dequantize(codes), out)
            for channel in out.unbind(axis):
                assert channel.unique().numel() <= 2**bits + CODE_FORMATS[code].kept(w.numel())
            assert error == pytest.approx(float((out - w).double().square().sum()), rel=1e-4)
            assert error < float(w.double().square().sum())  # better than nothing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("odd", ODD)
def test_odd_weights_give_numbers(name, odd):
    w = ODD[odd]
    for bits in range(1, 9):
        for code in quantizer_named(name).weight_quantizer(1).code_formats(bits):
            q, error = weights(name, w, bits, code)
            x = w.clone().requires_grad_()
            q.train()
            out = q(x)
            out.backward(torch.full_like(w, 0.5))
            assert torch.isfinite(out).all() and not math.isnan(error), (bits, code)
            assert torch.isfinite(x.grad).all()
            assert all(not p.grad.isnan().any() for p in q.parameters())
            assert torch.equal(q.dequantize(q.codes(w)), q(w))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("odd", ODD)
def test_odd_activations_give_numbers(name, odd):
    x = ODD[odd]
    for bits in range(2, 9):
        q = activations(name, bits, x).train()
        leaf = x.clone().requires_grad_()
        q(leaf).backward(torch.full_like(x, 0.5))
        assert torch.isfinite(q(x)).all() and torch.isfinite(leaf.grad).all()
        assert all(not p.grad.isnan().any() for p in q.parameters())


@pytest.mark.parametrize("name", [n for n in NAMES if n != "rvq"])  # whose outliers have no level: test_value_aware.py
@pytest.mark.parametrize("signed", [False, True])
def test_activation_levels(name, signed):
    torch.manual_seed(0)
    x = torch.randn(64, 200) if signed else torch.randn(64, 200).relu()
    for bits in range(2, 9):
        q = activations(name, bits, x)
        out = q(x)
        assert out.unique().numel() <= 2**bits and q(torch.zeros(1, 1)).item() == 0
        codes = torch.round(out / q.scale) + q.zero_point
        assert codes.min() >= 0 and codes.max() < 2**bits
        assert torch.equal((codes - q.zero_point) * q.scale, out)
        assert (out - x).square().mean() < x.square().mean() * (0.7 if bits < 4 else 0.1)


def test_random_values_and_updates_never_give_nan():
    generator = torch.Generator().manual_seed(7)
    for trial in range(60):
        name = NAMES[trial % len(NAMES)]
        scale = 10.0 ** float(torch.empty(1).uniform_(-38, 37, generator=generator))
        w = torch.randn(4, 9, generator=generator) * scale
        bits = 1 + trial % 8
        q, _ = weights(name, w, bits)
        a = activations(name, max(2, bits), w)
        q.train(), a.train()
        steps = [*q.parameters(), *a.parameters()]
        for _ in range(3):
            x = w.clone().requires_grad_()
            (q(x) / scale + a(x) / scale).square().sum().backward()
            assert torch.isfinite(x.grad).all() or scale < 1e-30
            with torch.no_grad():
                for p in steps:
                    move, peak = p.grad.nan_to_num() * 0.1 * p.abs().max(), p.abs().max()
                    # levels themselves, unlike steps, go where updates take them: to infinity, if these are so long
                    p.sub_(move.clamp(-peak, peak) if name == "kmeans" else move)
                    p.grad = None
            assert bool((q.scale > 0).all()) and bool(a.scale > 0)
            assert torch.isfinite(q(w)).all() and torch.isfinite(a(w)).all()


def test_uniform_ranges():
    torch.manual_seed(0)
    w = torch.randn(2, 10_000)
    w[:, 0] = torch.tensor([9.0, -9.0])
    errors = {}
    for ranges in ("mse", "minmax", "percentile"):
        q, errors[ranges] = weights("uniform", w, 4, "affine", ranges=ranges)
        if ranges == "minmax":
            assert q.scale.tolist() == pytest.approx([9 / 7, 9 / 7])
        if ranges == "percentile":
            top = (q.scale * 7)[:, None]
            assert ((w.abs() > top).sum(1) <= 11).all() and ((w.abs() > 0.99 * top).sum(1) >= 10).all()
    assert errors["mse"] < errors["percentile"] < errors["minmax"]
    x = w.flatten()
    assert activations("uniform", 8, x, ranges="minmax").scale.item() == pytest.approx(18 / 255, rel=1e-3)
    assert activations("uniform", 8, x, ranges="percentile").scale.item() == pytest.approx(2 * 3.09 / 255, rel=0.1)


def test_uniform_reestimates_after_so_many_steps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 3, bias=False))
    site = PlanSite("0.weight", "weight", ("0",), (3, 50), 150, 3, "affine")
    quantize(net, Plan(sites=(site,), quantizer_options={"reestimate": 2}))
    q, before = net[0].weight_quantizer, net[0].weight_quantizer.scale.clone()
    with torch.no_grad():
        net[0].weight.mul_(2)
    for step in (0, 1, 3):
        net(torch.randn(4, 50)), reestimate(net, step)
    assert torch.equal(q.scale, before)
    reestimate(net, 4)
    assert torch.allclose(q.scale, 2 * before, rtol=1e-5)
    q.range_updates_enabled = False
    with torch.no_grad():
        net[0].weight.mul_(2)
    reestimate(net, 6)
    assert torch.allclose(q.scale, 2 * before, rtol=1e-5)


def test_lsq_by_hand():
    # eq. 1 and 2 with s = 0.5, 3 bits: Qn = 4, Qp = 3; eq. 3 and 5
    w = torch.tensor([[-3.0, -0.6, 0.2, 1.0, 1.49, 2.0]], requires_grad=True)
    q, _ = weights("lsq", w.detach(), 3, "affine")
    with torch.no_grad():
        q.step.fill_(0.5)
    out = q(w)
    assert out.tolist() == [[-2.0, -0.5, 0.0, 1.0, 1.5, 1.5]]
    g = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    out.backward(g)
    assert w.grad.tolist() == [[0.0, 2.0, 3.0, 4.0, 5.0, 0.0]]
    by_hand = 1 * -4 + 2 * (-1 + 1.2) + 3 * (0 - 0.4) + 4 * (2 - 2) + 5 * (3 - 2.98) + 6 * 3
    assert q.step.grad.item() == pytest.approx(by_hand / math.sqrt(6 * 3), rel=1e-5)


def test_lsq_at_one_bit_and_with_midrise_codes():
    w = torch.tensor([[-0.9, 0.1]], requires_grad=True)
    q, _ = weights("lsq", w.detach(), 1)
    with torch.no_grad():
        q.step.fill_(1.0)
    out = q(w)
    assert out.tolist() == [[-0.5, 0.5]]
    out.backward(torch.ones(1, 2))
    # levels of v are -1/2 and 1/2: the first is clipped, the second moves by 0.5 - 0.1
    assert w.grad.tolist() == [[0.0, 1.0]]
    assert q.step.grad.item() == pytest.approx((-0.5 + 0.4) / math.sqrt(2 * 0.5), rel=1e-5)


def test_lsq_activations_by_hand():
    q = quantizer_named("lsq").activation_quantizer()
    q.enable(2, 0.5, 0)
    x = torch.tensor([[-1.0, 0.2, 0.6, 5.0]], requires_grad=True)
    out = q(x)
    assert out.tolist() == [[0.0, 0.0, 0.5, 1.5]]
    out.sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert q.step.grad.item() == pytest.approx((0 + (0 - 0.4) + (1 - 1.2) + 3) / math.sqrt(4 * 3), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_agrees_with_torchs_learnable_kernels(bits):
    torch.manual_seed(0)
    w, g = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    q, _ = weights("lsq", w, bits, "affine")
    mine = w.clone().requires_grad_()
    out = q(mine)
    out.backward(g)
    half = 1 << (bits - 1)
    theirs, s = w.clone().requires_grad_(), q.step.detach().clone().requires_grad_()
    ref = torch._fake_quantize_learnable_per_channel_affine(theirs, s, torch.zeros(4), 0, -half, half - 1, 1.0)
    ref.backward(g)
    assert torch.equal(out, ref)
    # the kernel passes gradients up to half a step further than the paper
    beyond = ((w / s.detach().view(4, 1, 1, 1)) >= half - 1) | ((w / s.detach().view(4, 1, 1, 1)) <= -half)
    assert torch.equal(mine.grad[~beyond], theirs.grad[~beyond]) and not mine.grad[beyond].any()
    x = torch.randn(4, 100).relu()
    a = activations("lsq", bits, x)
    a(x).sum().backward()
    s1 = a.step.detach().clone().view(1).requires_grad_()
    torch._fake_quantize_learnable_per_tensor_affine(x, s1, torch.zeros(1), 0, 2**bits - 1, 1.0).sum().backward()
    v = x / s1.detach()
    edge = ((v >= 2**bits - 1) & (v <= 2**bits - 0.5)) * v  # the kernel counts these as inside, round(v) - v
    expected = (float(s1.grad) + float(edge.sum())) / math.sqrt(100 * (2**bits - 1))
    assert a.step.grad.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_lsq_steps_stay_positive_whatever_the_optimizer_does():
    torch.manual_seed(0)
    w = torch.randn(3, 20)
    q, _ = weights("lsq", w, 4, "affine")
    with torch.no_grad():
        q.step.copy_(torch.tensor([-0.3, 0.0, 0.2]))
    assert (q.scale > 0).all() and q.scale[0] == pytest.approx(0.3)
    assert torch.isfinite(q(w)).all() and torch.equal(q.dequantize(q.codes(w)), q(w).detach())


@pytest.mark.parametrize("bits", range(2, 9))
def test_dorefa_is_the_papers_formula(bits):
    torch.manual_seed(bits)
    w = torch.randn(4, 3, 3, 3)
    q, _ = weights("dorefa", w, bits)
    n = 2**bits - 1
    t = torch.tanh(w)
    paper = 2 * torch.round((t / (2 * t.abs().max()) + 0.5) * n) / n - 1
    out = q(w) / q.gain
    assert (out - paper).abs().max() < 1e-6 and out.abs().max() == pytest.approx(1.0, abs=1e-6)
    # the gradient passes through rounding
    x = w.clone().requires_grad_()
    q(x).sum().backward()
    y = w.clone().requires_grad_()
    (q.gain * torch.tanh(y) / torch.tanh(y).abs().max()).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-6)


def test_dorefa_at_one_bit_follows_the_weights():
    w = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    q, error = weights("dorefa", w, 1)
    assert q(w).tolist() == [[2.5, -2.5], [2.5, -2.5]] and error == pytest.approx(5.0)
    x = (2 * w).requires_grad_()
    out = q(x)
    assert out.tolist() == [[5.0, -5.0], [5.0, -5.0]]
    out.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert x.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_pact_by_hand():
    q = quantizer_named("pact").activation_quantizer()
    q.enable(2, 0.5, 0)  # alpha = 1.5
    assert q.alpha.item() == pytest.approx(1.5)
    x = torch.tensor([[-1.0, 0.3, 1.2, 1.6, 9.0]], requires_grad=True)
    out = q(x)
    alpha, n = 1.5, 3
    paper = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    paper = torch.round(paper * n / alpha) * alpha / n
    assert torch.allclose(out, paper)
    out.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
    assert x.grad.tolist() == [[0.0, 2.0, 3.0, 0.0, 0.0]]
    assert q.alpha.grad.item() == 9.0  # what lies above alpha, and nothing else
    signed = quantizer_named("pact").activation_quantizer()
    signed.enable(2, 0.5, 1)  # levels -0.5, 0, 0.5, 1: two thirds of the range above zero
    y = torch.tensor([-3.0, 0.1, 3.0], requires_grad=True)
    assert signed(y).tolist() == pytest.approx([-0.5, 0.0, 1.0])
    signed(y).backward(torch.tensor([1.0, 1.0, 1.0]))
    assert signed.alpha.grad.item() == pytest.approx(2 / 3 - 1 / 3)


def test_fqn_takes_extremes_and_percentiles():
    torch.manual_seed(0)
    w = torch.randn(3, 500)
    q, _ = weights("fqn", w, 4)
    assert torch.allclose(q.scale, w.abs().amax(1) / 7)
    x = torch.randn(20_000).relu()
    x[0] = 1000.0
    assert activations("fqn", 4, x).scale.item() < 5 / 15
    assert quantizer_named("fqn").freezes_norms


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lq_nets_levels_are_signed_sums_of_a_basis_that_fits(bits):
    torch.manual_seed(bits)
    w = torch.randn(3, 4000)
    w[0] = w[0].abs().pow(3) * w[0].sign()  # far from even
    q, error = weights("lq_nets", w, bits)
    signs = torch.tensor([[(i >> k & 1) * 2 - 1 for k in range(bits)] for i in range(2**bits)]).float()
    levels = q.basis[:, :bits] @ signs.T
    assert torch.allclose(q.levels(), levels, atol=1e-6) and not q.basis[:, bits:].any()
    nearest = levels.gather(1, (w[:, :, None] - levels[:, None]).abs().argmin(2))
    assert torch.allclose((q(w) - w).abs(), (nearest - w).abs(), atol=1e-5)  # two levels may be equally near
    _, even_error = weights("uniform", w, bits, "midrise")
    assert error <= even_error * (1.0001 if bits == 1 else 0.98)  # bits of their own size beat even steps
    # at a fixed point the basis is that of least squares for its codes
    code = (q.codes(w) + 2 ** (bits - 1)).long()
    for channel in range(3):
        best = torch.linalg.lstsq(signs[code[channel]].double(), w[channel].double()[:, None]).solution[:, 0]
        assert torch.allclose(q.basis[channel, :bits].double(), best, rtol=0.02, atol=0.02)


def test_lq_nets_basis_follows_in_training_only_and_gradients_pass_through():
    torch.manual_seed(0)
    w = torch.randn(2, 500)
    q, _ = weights("lq_nets", w, 2)
    before = q.basis.clone()
    x = (2 * w).requires_grad_()
    q(x)
    assert torch.equal(q.basis, before)
    q.train()
    q(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and not torch.equal(q.basis, before)
    for _ in range(200):
        q(x)
    assert torch.allclose(q.basis, 2 * before, rtol=0.1)
    q.range_updates_enabled = False
    held = q.basis.clone()
    q(w)
    assert torch.equal(q.basis, held)


def test_int_only_by_hand():
    # 3 bits from -0.5 to 1: seven steps of 1.5 / 7, zero is code round(-4 + 7 / 3)
    w = torch.tensor([[-0.5, 0.0], [0.4, 1.0]])
    q, _ = weights("int_only", w, 3)
    step = 1.5 / 7
    assert q.scale.tolist() == pytest.approx([step, step]) and q.zero_point.item() == -2
    assert q(w).flatten().tolist() == pytest.approx([-2 * step, 0.0, 2 * step, 5 * step])
    narrow, _ = weights("int_only", torch.randn(4, 50), 8)
    assert narrow.codes(torch.randn(4, 50) * 100).min() >= -128
    assert narrow.scale.unique().numel() == 1
    q.train()
    q(2 * w)
    assert q.scale[0].item() == pytest.approx(2 * step)


def test_int_only_activations_follow_the_batches_of_training():
    q = activations("int_only", 8, torch.tensor([0.0, 1.0]), momentum=0.5)
    q.eval()
    q(torch.tensor([8.0]))
    assert q.scale.item() == pytest.approx(1 / 255)
    q.train()
    q(torch.tensor([-1.0, 3.0]))
    assert (q.low.item(), q.high.item()) == pytest.approx((-0.5, 2.0))
    assert q.scale.item() == pytest.approx(2.5 / 255) and q.zero_point.item() == 51
    q.range_updates_enabled = False
    q(torch.tensor([9.0]))
    assert q.scale.item() == pytest.approx(2.5 / 255)
