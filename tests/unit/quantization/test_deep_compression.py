"""Quantizer ``kmeans`` and exporter ``huffman`` against Deep Compression (Han et al. 2016), by hand and by members."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, Plan, PlanSite, QuantizerConfig, load_packed, quantize, save_packed, sites
from hawq_lightning.export import EXPORTERS, export, huffman_size, load_huffman, read_huffman
from hawq_lightning.quantization import quantized_layers, quantizer_named

SIX = torch.tensor([[-1.0, -0.9, 0.0], [0.1, 1.0, 1.2]])


def fitted(weight, bits, **options):
    q = quantizer_named("kmeans", options).weight_quantizer(len(weight))
    q.fit(weight, bits, "table")
    return q


def network(bits, prune=0.0, heavy=1):
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 30)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.sign() * p.abs() ** heavy)
    x = torch.randn(4, 2, 6, 6)
    table = sites(net, x)
    chosen = tuple(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, "table") for s in table.weights)
    plan = Plan(chosen, quantizer="kmeans", quantizer_options={"prune": prune} if prune else {})
    return quantize(net, plan), plan, x


def test_by_hand():
    # starts at -1 and 1.2 part the six at 0.1; the means of both sides stay there
    q = fitted(SIX, 1)
    assert q.table().tolist() == pytest.approx([-0.45, 1.1])
    x = SIX.clone().requires_grad_()
    out = q(x)
    assert out.flatten().tolist() == pytest.approx([-0.45] * 4 + [1.1] * 2)
    out.backward(torch.arange(1.0, 7.0).view(2, 3))
    assert q.centroids.grad[:2].tolist() == [1 + 2 + 3 + 4, 5 + 6] and not q.centroids.grad[2:].any()
    assert torch.equal(x.grad, torch.zeros(2, 3)) and q.codes(SIX).flatten().tolist() == [-1] * 4 + [0] * 2
    # half of them pruned: 0, 0.1 and 0.9 are the least
    q = fitted(SIX, 1, prune=0.5)
    assert q.table().tolist() == pytest.approx([0.0, 0.4])
    assert q(SIX).flatten().tolist() == pytest.approx([0.4, 0, 0, 0, 0.4, 0.4])


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("prune", [0.0, 0.6])
def test_entries_are_the_means_of_the_weights_nearest_to_them(bits, prune):
    torch.manual_seed(bits)
    w = torch.randn(5, 400) ** 3
    q = fitted(w, bits, prune=prune)
    out, kept = q(w).detach(), torch.ones_like(w, dtype=torch.bool)
    if prune:
        kept = w.abs() > w.abs().flatten().kthvalue(round(prune * w.numel())).values
        assert not out[~kept].any() and out[kept].all()
    used = q.centroids[: 2**bits - bool(prune)]
    near = (w[kept][:, None] - used).abs().amin(1)
    assert torch.allclose((w - out)[kept].abs(), near, atol=1e-6)
    for level in out[kept].unique():
        members = w[kept & (out == level)]
        assert float(members.double().mean()) == pytest.approx(float(level), rel=0.05, abs=0.02)
    assert out.unique().numel() <= 2**bits and torch.equal(q.dequantize(q.codes(w)), out)


def test_training_moves_entries_by_their_members_and_no_weight_changes_its_entry():
    net, _, x = network(3, prune=0.5)
    net.train()
    before, weight = copy.deepcopy(net.state_dict()), net[4].weight_quantizer
    codes = weight.codes(net[4].weight)
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.arange(4)).backward()
        optimizer.step()
    now = net.state_dict()
    assert torch.equal(before["4.weight"], now["4.weight"])
    assert not torch.equal(before["4.weight_quantizer.centroids"], now["4.weight_quantizer.centroids"])
    zero = codes == codes.flatten().mode().values
    assert zero.sum() == 1920 and not weight(net[4].weight)[zero].any()
    assert net[4].weight_quantizer(net[4].weight).unique().numel() <= 8


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("prune", "heavy"), [(0.0, 1), (0.0, 5), (0.5, 1), (0.97, 2)])
def test_the_huffman_file_has_the_predicted_size_and_the_same_logits(tmp_path: Path, bits, prune, heavy):
    pytest.importorskip("bitarray")
    torch.manual_seed(bits)
    net, plan, x = network(bits, prune, heavy)
    with torch.no_grad():
        for layer in quantized_layers(net).values():  # as trained: entries out of their order
            layer.weight_quantizer.centroids.neg_()
    path = tmp_path / "m.huffman.safetensors"
    size = export(net, plan, path, "huffman")
    assert size.file_bytes == path.stat().st_size == huffman_size(net, plan).file_bytes
    fresh, packed = copy.deepcopy(network(1)[0]), copy.deepcopy(network(1)[0])
    save_packed(net, plan, tmp_path / "m.safetensors")
    load_packed(tmp_path / "m.safetensors", packed)
    with torch.no_grad():
        assert torch.equal(load_huffman(path, fresh)(x), net(x)) and torch.equal(packed(x), net(x))
    for name, entropy in size.entropy.items():
        numel, tables = plan[name].numel, 2**bits
        dense = 8 * (size.code_bytes[name] - tables)
        if not prune:  # Huffman's bound, with the last byte's padding
            assert max(1.0, entropy) * numel <= dense + 1e-6 and dense < (entropy + 1) * numel + 8
    if prune == 0.97 and bits > 1:  # most of it is left out: far below one bit a weight
        assert 8 * (size.code_bytes["4.weight"] - 256 - 2**bits) < 0.6 * plan["4.weight"].numel
    assert EXPORTERS["huffman"].verify(net, path, [], None).to_dict()["same_state"]
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(HawqError, match="checksum"):
        read_huffman(path)


@pytest.mark.parametrize("quantizer", ["uniform", "lq_nets"])
def test_codes_of_any_quantizer_have_huffman_codes(tmp_path: Path, quantizer):
    pytest.importorskip("bitarray")
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(400, 6, bias=False), nn.ReLU(), nn.Linear(6, 1)).eval()
    net[0].weight.data[1:] = 0  # long ways between the others, and rows that are all the same
    net[0].weight.data[4, 7] = 1.0
    code = "codebook" if quantizer == "lq_nets" else "affine"
    chosen = [PlanSite(f"{n}.weight", "weight", (n,), tuple(m.weight.shape), m.weight.numel(), 4, code)
              for n, m in (("0", net[0]), ("2", net[2]))]  # fmt: skip
    chosen.append(PlanSite("2.input", "activation", ("2",), (), 0, 8, "affine", 0.01, 3))
    plan = Plan(tuple(chosen), quantizer=quantizer)
    quantize(net, plan)
    size = export(net, plan, tmp_path / "m", "huffman")
    x, fresh = torch.randn(3, 400), nn.Sequential(nn.Linear(400, 6, bias=False), nn.ReLU(), nn.Linear(6, 1)).eval()
    assert size.file_bytes == (tmp_path / "m").stat().st_size
    assert torch.equal(load_huffman(tmp_path / "m", fresh)(x), net(x))


def test_what_cannot_be_is_told(tmp_path: Path):
    net, plan, x = network(2)
    for name in ("onnx", "program"):
        with pytest.raises(HawqError, match=f"'table', which '{name}' cannot express; it has affine, midrise"):
            export(net, plan, tmp_path / "m", name, example_input=x)
    with pytest.raises(HawqError, match="prune is 1; it is a share of the weights"):
        QuantizerConfig("kmeans", options={"prune": 1})
    save_packed(net, plan, tmp_path / "p")
    with pytest.raises(HawqError, match=r"no Huffman file of version 1 \(it is 'hawq_lightning.packed', version '4'\)"):
        read_huffman(tmp_path / "p")
