"""Fake-quantizers, their ranges and their twins."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from hawq_lightning import Candidate, HawqError, Plan, PlanSite, quantize
from hawq_lightning.layers import FakeQuantLayer
from hawq_lightning.quantization import (
    ActivationQuantizer,
    WeightQuantizer,
    activation_step,
    check_bits,
    disable,
    enabled_bits,
    fake_quant_disabled,
    prepare,
    unquantize,
    weight_step,
)
from tests.cases import ConvNet, Sequence1d, Volume, batch_for

KINDS = [(1, "midrise"), *((b, k) for b in range(2, 9) for k in ("affine", "midrise"))]


def enabled(weight, bits, code, axis=0):
    q = WeightQuantizer(weight.shape[axis], axis)
    step, error = weight_step(weight, bits, code, axis)
    q.enable(bits, step, -0.5 if code == "midrise" else 0.0)
    return q, error


@pytest.mark.parametrize(("bits", "code"), KINDS)
def test_levels_codes_and_error(bits, code):
    torch.manual_seed(0)
    w = torch.randn(5, 4000)
    q, error = enabled(w, bits, code)
    out, codes = q(w), q.codes(w)
    assert q.code == code
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
    for row in range(5):
        assert out[row].unique().numel() <= 2**bits
    if bits <= 4:
        assert codes.unique().numel() == 2**bits
    assert torch.equal(q.dequantize(codes), out)
    assert torch.equal(q(out), out)  # what is on the grid stays there
    assert error == pytest.approx(float((out - w).double().square().sum()), rel=1e-4)


@pytest.mark.parametrize(("bits", "code"), [(2, "midrise"), (2, "affine"), (3, "affine"), (4, "affine")])
def test_steps_are_near_the_best_of_a_fine_search(bits, code):
    torch.manual_seed(1)
    w = torch.randn(1, 3000)
    _, error = enabled(w, bits, code)
    zero, half = (-0.5 if code == "midrise" else 0.0), 2 ** (bits - 1)

    def at(step):
        v = torch.round(w / step + zero).clamp(-half, half - 1) - zero
        return float((v * step - w).square().sum())

    best = min(at(s) for s in torch.linspace(0.02, 3, 3000).tolist())
    assert error <= 1.01 * best


def test_one_bit_is_sign_times_mean_magnitude():
    w = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    q, error = enabled(w, 1, "midrise")
    assert torch.allclose(q(w), 2.5 * w.sign())
    assert error == pytest.approx(5.0, rel=1e-5)


def test_known_distortion_of_gaussian_weights():
    torch.manual_seed(0)
    w = torch.randn(1, 400_000)
    # Max (1960): uniform quantizers of a unit Gaussian with 2, 4, 8, 16 levels
    for bits, distortion in ((1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)):
        _, error = enabled(w, bits, "midrise")
        assert error / 400_000 == pytest.approx(distortion, rel=0.02)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("code", ["affine", "midrise"])
@pytest.mark.parametrize(
    "w",
    [
        torch.zeros(2, 3),
        torch.full((2, 3), 0.7),
        torch.tensor([[1e-40, -1e-41, 0.0]]),
        torch.tensor([[3e38, -1e38, 1.0]]),
        torch.tensor([[5.0]]),
        torch.tensor([[-5.0]]),
        torch.tensor([[0.0, 1e-3], [1e3, 0.0]]),
    ],
    ids=["zero", "constant", "denormal", "huge", "one", "negative", "mixed"],
)
def test_odd_tensors_give_no_nan(bits, code, w):
    if bits == 1 and code == "affine":
        pytest.skip("one bit is always midrise")
    q, error = enabled(w, bits, code)
    out = q(w)
    assert torch.isfinite(out).all() and error == error
    assert (out - w).abs().max() <= w.abs().max().clamp_min(1e-29)


def test_nan_weights_are_refused():
    with pytest.raises(HawqError, match="NaN"):
        weight_step(torch.tensor([[float("nan"), 1.0]]), 4, "affine")


def test_straight_through_gradients_are_clipped_to_the_range():
    w = torch.tensor([[-9.0, -0.3, 0.2, 9.0]], requires_grad=True)
    q = WeightQuantizer(1)
    q.enable(2, 0.5)  # levels -1, -.5, 0, .5
    q(w).sum().backward()
    assert w.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    x = torch.tensor([-0.4, 0.1, 0.9, 5.0], requires_grad=True)
    a = ActivationQuantizer()
    a.enable(2, 0.5, 0)
    a(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_activation_ranges(bits):
    torch.manual_seed(0)
    relu = torch.randn(20_000).relu()
    step, zero = activation_step(relu, 0.0, float(relu.max()), bits)
    assert zero == 0
    q = ActivationQuantizer()
    q.enable(bits, step, zero)
    assert q(relu).unique().numel() <= 2**bits and q(torch.zeros(1)).item() == 0
    shifted = torch.randn(20_000) + 0.5
    step, zero = activation_step(shifted, float(shifted.min()), float(shifted.max()), bits)
    assert 0 < zero < 2**bits
    q.enable(bits, step, zero)
    assert q(torch.zeros(1)).item() == 0
    wide = (float(shifted.max()) - float(shifted.min())) / (2**bits - 1)
    naive = torch.fake_quantize_per_tensor_affine(
        shifted, wide, round(-float(shifted.min()) / wide), 0, 2**bits - 1
    )  # fmt: skip
    assert (q(shifted) - shifted).square().sum() <= (naive - shifted).square().sum() * 1.001


def test_constant_and_negative_activations():
    assert activation_step(torch.zeros(5), 0.0, 0.0, 4) == (1.0, 0)
    step, zero = activation_step(-torch.rand(1000), -1.0, 0.0, 8)
    assert zero == 255 and step == pytest.approx(1 / 255, rel=0.1)


@pytest.mark.parametrize("kind", [ConvNet, Sequence1d, Volume])
def test_twins_off_are_the_float_model_and_keep_everything(kind):
    torch.manual_seed(0)
    net = kind().eval()
    x = batch_for(kind)[0].float()
    want, parameters, keys = net(x), list(net.parameters()), set(net.state_dict())
    twins = prepare(net)
    modules = [layer.module for layer in twins.values()]
    assert all(isinstance(m, FakeQuantLayer) and isinstance(m, m.float_type) for m in modules)
    assert torch.equal(net(x), want)
    assert all(a is b for a, b in zip(parameters, net.parameters()))
    assert keys < set(net.state_dict())
    assert prepare(net).keys() == twins.keys()  # again: nothing happens
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), want)
    unquantize(net)
    assert set(net.state_dict()) == keys and torch.equal(net(x), want)


def plan_for(net, bits=3, act=4):
    out = []
    for name, m in prepare(net).items():
        out.append(
            PlanSite(f"{name}.weight", "weight", (name,), tuple(m.weight.shape), m.weight.numel(), bits, "affine")
        )
        out.append(PlanSite(f"{name}.input", "activation", (name,), (), 1, act, "affine", 0.05, 3))
    return Plan(sites=tuple(out))


@pytest.mark.parametrize("kind", [ConvNet, Sequence1d, Volume])
def test_quantize_state_dict_round_trip(kind):
    torch.manual_seed(0)
    net, fresh = kind().eval(), kind().eval()
    x = batch_for(kind)[0].float()
    want = net(x)
    plan = plan_for(net)
    quantize(net, plan)
    got = net(x)
    assert not torch.equal(got, want)
    assert set(enabled_bits(net).values()) == {3, 4}
    state = net.state_dict()
    prepare(fresh)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), got)
    with fake_quant_disabled(net):
        assert torch.equal(net(x), want)
    assert torch.equal(net(x), got)
    float_state = {k: v for k, v in state.items() if "_quantizer." not in k}
    fresh.load_state_dict(float_state, strict=False)
    assert torch.equal(fresh(x), got)  # a float checkpoint does not disarm
    disable(net)
    assert torch.equal(net(x), want)


def test_quantizer_state_stays_float32_and_survives_averaging():
    q = WeightQuantizer(4)
    q.enable(5, torch.full((4,), 0.1234567))
    q.to(torch.bfloat16)
    assert q.scale.dtype == torch.float32 and q.scale[0].item() == pytest.approx(0.1234567, rel=1e-6)
    q.num_bits.mul_(0.999).add_(0.001 * 5 - 0.0003)
    q.refresh()
    assert q.bits == 5


def test_other_models_plans_are_refused_with_the_sites_that_differ():
    net = ConvNet()
    plan = plan_for(ConvNet(5))
    with pytest.raises(HawqError, match=r"another model.*fc\.weight \[3, 4\]|fc\.weight \[5, 4\]"):
        quantize(net, plan)
    with pytest.raises(HawqError, match=r"only in the plan: .*conv"):
        quantize(net, plan_for(Sequence1d()))
    assert not enabled_bits(net)


def test_plans_from_files_are_checked(tmp_path):
    plan = plan_for(ConvNet())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    text = (tmp_path / "plan.json").read_text()
    for old, new, say in (
        ('"bits": 3', '"bits": 11', "out of range"),
        ('"kind": "weight"', '"kind": "wight"', "kind is 'wight'"),
        ('"code": "affine"', '"code": "os.system"', "code format"),
        ('"scale": 0.05', '"scale": -1', "positive"),
        ('"version": 2', '"version": 9', "version 9 is newer"),
        ('"format": "hawq_lightning.plan"', '"format": "x"', "not a plan"),
    ):
        assert old in text
        (tmp_path / "bad.json").write_text(text.replace(old, new, 1))
        with pytest.raises(HawqError, match=say):
            Plan.load(tmp_path / "bad.json")
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    with pytest.raises(HawqError, match="corrupt or cut short"):
        Plan.load(tmp_path / "cut.json")
    with pytest.raises(HawqError, match="No plan at"):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("value", "kind", "near"), [(9, "weight", 8), (0, "weight", 1), (1, "activation", 2), (2.5, "weight", 2)]
)
def test_widths_out_of_range_name_the_nearest(value, kind, near):
    with pytest.raises(HawqError, match=f"nearest is {near}"):
        check_bits([value], kind)


def test_options_hold_the_numbers_of_eq_10():
    from hawq_lightning.quantization import weight_candidates

    w = torch.randn(3, 50)
    options = weight_candidates(w, 0, (1, 2, 4), 2.0)
    assert [o.bits for o in options] == [1, 2, 4]
    assert all(isinstance(o, Candidate) and o.omega == pytest.approx(2 * o.perturbation) for o in options)
    assert options[0].omega > options[1].omega > options[2].omega
