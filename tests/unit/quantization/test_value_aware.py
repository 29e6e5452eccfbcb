"""Quantizer ``rvq`` against value-aware quantization (Park et al. 2018): by hand, by members, and in every size."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning import HawqError, Plan, PlanSite, load_packed, quantize, save_packed, sites
from hawq_lightning.export import export, load_huffman, packed_overhead, read_packed
from hawq_lightning.quantization import plan_of, prepare, quantizer_named, with_quantizer

SHARES = (0.005, 0.01, 0.02, 0.03, 0.05)


def built():
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 520)).eval()
    with torch.no_grad():
        net[0].weight.pow_(3), net[4].weight.pow_(3)
    return net


def quantized(bits, share, activations=4):
    torch.manual_seed(bits)
    net, x = built(), torch.randn(4, 2, 6, 6)
    table, code = sites(net, x), f"outliers{round(1000 * share)}"
    chosen = [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, code) for s in table.weights]
    for s, zero in zip(table.activations, (7, 0)):
        chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, activations, code, 0.1, zero))
    plan = Plan(tuple(chosen), table.layers, quantizer="rvq", quantizer_options={"share": share})
    return quantize(net, plan), plan, x


def test_weights_by_hand():
    # 50 weights, one of them an outlier at 2 %; 3 bits of the others, from -0.4 to 0.3, hold them exactly
    w = torch.arange(50).remainder(8).sub(4.0).mul(0.1).view(1, 50)
    w[0, 17] = 9.0
    q = quantizer_named("rvq", {"share": 0.02}).weight_quantizer(1)
    assert q.fit(w, 3, "outliers20") == pytest.approx(0.0, abs=1e-9)
    assert q.scale.item() == pytest.approx(0.1) and q.outliers().tolist() == [17]
    x = (2 * w).requires_grad_()
    out = q(x)
    assert out[0, 17] == 18.0 and out[0].detach().abs().sort().values[-2] == pytest.approx(0.4)
    out.sum().backward()
    inside = (x.detach() / 0.1).round().clamp(-4, 3) == (x.detach() / 0.1).round()
    inside[0, 17] = True
    assert torch.equal(x.grad, inside.float())
    assert q.codes(w)[0, 17] == 0 and torch.equal(q.dequantize(q.codes(w)), q(w))


def test_activations_by_hand():
    # 3 % of 100 values lie beyond 0.7, which the grid of 3 bits ends with
    x = torch.cat([torch.arange(97).remainder(8) * 0.1, torch.tensor([5.0, 6.0, 7.0])])
    q = quantizer_named("rvq").activation_quantizer().eval()
    q.enable(3, *q.calibrate(x, 0.0, 7.0, 3))
    assert q.scale.item() == pytest.approx(0.1) and q.zero == 0
    seen = torch.tensor([0.04, 0.06, 0.74, 0.76, 6.5, -0.04, -0.2]).requires_grad_()
    out = q(seen)
    assert out.tolist() == pytest.approx([0.0, 0.1, 0.7, 0.76, 6.5, 0.0, -0.2])
    out.sum().backward()
    assert torch.equal(seen.grad, torch.ones(7)) and not q.even_steps
    assert torch.equal(q.levels_at(seen.detach(), float(q.scale), 0, 3), out.detach())
    signed = torch.randn(5000)
    q.enable(4, *q.calibrate(signed, float(signed.min()), float(signed.max()), 4))
    share = float((q(signed) == signed).float().mean())
    assert 0.01 < share <= 0.03 and q(signed).unique().numel() <= 16 + 150


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("share", SHARES)
def test_the_largest_stay_and_the_error_shrinks(bits, share):
    torch.manual_seed(bits)
    w = torch.randn(4, 6, 3, 5) ** 3
    q = quantizer_named("rvq", {"share": share}).weight_quantizer(6, 1)
    error = q.fit(w, bits, q.code_formats(bits)[0])
    kept = round(share * w.numel())
    out = q(w)
    assert error == pytest.approx(float((out - w).double().square().sum()), rel=1e-5)
    large = w.abs().flatten().topk(kept).indices
    assert torch.equal(out.flatten()[large], w.flatten()[large]) and q.outliers().tolist() == sorted(large.tolist())
    for channel in range(6):
        rest = torch.ones(w.numel(), dtype=torch.bool).index_fill(0, large, False).view(w.shape)[:, channel]
        assert out[:, channel][rest].unique().numel() <= 2**bits
    plain = quantizer_named("uniform").weight_quantizer(6, 1)
    assert error < plain.fit(w, bits, "midrise" if bits <= 2 else "affine")


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("share", [0.005, 0.03])
def test_packed_bit_exact_and_of_the_predicted_size(tmp_path: Path, bits, share):
    net, plan, x = quantized(bits, share)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net.train()(x), torch.arange(4)).backward()
        optimizer.step()
    net.eval()
    before = copy.deepcopy(net.state_dict())
    size = save_packed(net, plan, tmp_path / "m")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    numel = {s.name: s.numel for s in plan.weights}
    kept = {n: round(share * k) for n, k in numel.items()}
    blocks = {n: -(-k // 65536) for n, k in numel.items()}
    assert numel["4.weight"] > 65536  # two blocks
    codes = sum((k * bits + 7) // 8 + 6 * kept[n] + 4 * blocks[n] for n, k in numel.items()) + 4 * (8 + 520)
    assert size == packed_overhead(net, plan.sites, quantizer_named("rvq", {"share": share})) + codes
    back = load_packed(tmp_path / "m", built())
    with torch.no_grad():
        assert torch.equal(back(x), net(x))
    assert {s.name: s.code for s in plan_of(back).sites} == {s.name: s.code for s in plan.sites} or share != 0.03
    again = save_packed(back, plan_of(back), tmp_path / "again") if share == 0.03 else size
    assert abs(again - size) < 600
    pytest.importorskip("bitarray")
    export(net, plan, tmp_path / "h", "huffman")
    assert torch.equal(load_huffman(tmp_path / "h", built())(x), net(x))


def test_every_size_counts_the_share():
    torch.manual_seed(0)
    net, batch = built(), (torch.randn(6, 2, 6, 6), torch.randint(4, (6,)))
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    table = sites(net, batch)
    choices = hl.candidates(net, [batch], None, table, loss, quantizer="rvq", weight_bits=(3, 4), activation_bits=4)
    overhead = packed_overhead(net, table, "rvq")
    problem = hl.Problem(table, choices, file_overhead=overhead)
    plan = hl.select(problem, "7x").replace(quantizer="rvq")
    weights = sum(s.numel * s.bits / 8 + 6 * round(0.03 * s.numel) + 4 * -(-s.numel // 65536) for s in plan.weights)
    assert plan.costs["weight_bytes"] == pytest.approx(weights)
    assert plan.costs["w_comp"] == pytest.approx(4 * sum(s.numel for s in plan.weights) / weights)
    assert plan.costs["w_comp"] > 6.0 and set(plan.bits.values()) - {8, 4} == {3}
    acts = sum(s.numel * s.bits / 8 + 6 * round(0.03 * s.numel) + 4 for s in plan.activations)
    assert plan.costs["act_bytes"] == pytest.approx(acts)
    quantize(net, plan)
    with_file = hl.select(problem, "1MB").costs["file_bytes"]
    assert with_file > 4 * 66704 / 8


def test_state_dicts_hold_the_places():
    net, plan, x = quantized(3, 0.03)
    fresh = prepare_rvq()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x)) and plan_of(fresh).bits == plan.bits
    averaged = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for _ in range(30):
        averaged.update_parameters(net)
    assert torch.equal(averaged.module[4].weight_quantizer.outliers(), net[4].weight_quantizer.outliers())


def prepare_rvq():
    fresh = built()
    prepare(fresh, quantizer=quantizer_named("rvq"))
    return fresh


def test_what_cannot_be_is_told(tmp_path: Path):
    net, plan, x = quantized(3, 0.03)
    for name in ("onnx", "program"):
        with pytest.raises(HawqError, match=f"'outliers30', which '{name}' cannot express; it has affine, midrise"):
            export(net, plan, tmp_path / "m", name, example_input=x)
    with pytest.raises(HawqError, match=r"share is 0.04; use one of 0.005, .*the nearest is 0.0[35]"):
        quantizer_named("rvq", {"share": 0.04})
    even = Plan(tuple(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 4, "affine", s.scale, s.zero_point)
                      for s in plan.sites))  # fmt: skip
    moved = with_quantizer(even, quantizer_named("rvq"))
    assert {s.code for s in moved.sites} == {"outliers30"}
    quantize(built(), moved)
    save_packed(net, plan, tmp_path / "m")
    assert {s.code for s in read_packed(tmp_path / "m").plan.sites} == {"outliers30"}
