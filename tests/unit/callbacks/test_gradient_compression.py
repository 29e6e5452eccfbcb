"""Gradients in few bits: codes by hand and bit by bit, bits by trace under a budget, a hook on one process and two."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hawq_lightning import HawqError
from hawq_lightning.callbacks import CompressGradients, GradientCompression, compressed_gradients
from tests.internals import internal
from tests.trainers import Classifier, loader, trainer

codes = internal("callbacks._gradient_codes")


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_levels_by_hand():
    # two bits: a step of 2/3 of the largest magnitude, levels at 1/2 and 3/2 of it on either side
    x = torch.tensor([3.0, 0.9, -0.1, -2.1])
    assert codes.rounded(x, 2).tolist() == pytest.approx([3.0, 1.0, -1.0, -3.0])
    # one bit: sign times mean magnitude
    assert codes.rounded(x, 1).tolist() == pytest.approx([1.525, 1.525, -1.525, -1.525])
    assert codes.rounded(torch.zeros(3), 4).tolist() == [0.0] * 3
    # codes 3, 2, 1 and 0 fill one byte from below, behind four of scale
    assert codes.encode(x, 2).tolist()[4:] == [3 + (2 << 2) + (1 << 4) + (0 << 6)]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("elements", [0, 1, 7, 256, 257, 1000])
def test_messages_have_the_bytes_that_are_counted_and_give_the_nearest_levels(bits, elements):
    torch.manual_seed(elements)
    x = torch.randn(elements) * torch.logspace(-20, 5, elements)
    message = codes.encode(x, bits)
    assert message.dtype == torch.uint8 and len(message) == codes.message_bytes(elements, bits)
    out = codes.decode(message, elements, bits)
    if bits == 32:
        assert torch.equal(out, x)
        return
    for block in range(0, elements, 256):
        a, b = x[block : block + 256], out[block : block + 256]
        step = 2 * (a.abs().mean() if bits == 1 else a.abs().max() / (2**bits - 1))
        assert b.unique().numel() <= 2**bits
        if bits > 1:
            assert bool(((a - b).abs() <= step / 2 * (1 + 1e-4)).all())


def ready(budget, traces=(5.0, 0.01)):
    net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    state = GradientCompression(net, dict(zip(("0.weight", "2.weight"), traces)), budget, warmup=1)
    gradients = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    for n, g in gradients.items():
        state.observe(n, g)
    state.stepped()
    return net, state, gradients


@pytest.mark.parametrize("budget", [3.0, 6.0, 9.0])
def test_bits_are_those_of_least_error_by_trace_within_the_bytes(budget):
    torch.manual_seed(int(budget))
    net, state, gradients = ready(budget)
    sizes, traces = {n: p.numel() for n, p in net.named_parameters()}, state.traces
    floats, whole = 4 * (30 + 20), 4 * sum(sizes.values())  # biases have no trace
    best = min(
        (sum(traces[n] * float((codes.rounded(gradients[n].flatten(), b) - gradients[n].flatten()).square().sum())
             for n, b in zip(traces, bits)), bits)
        for bits in itertools.product((1, 2, 4, 8), repeat=2)
        if floats + sum(codes.message_bytes(sizes[n], b) for n, b in zip(traces, bits)) <= whole / budget
    )  # fmt: skip
    assert tuple(state.bits[n] for n in traces) == best[1] and state.bits["0.weight"] >= state.bits["2.weight"]


def test_what_rounding_leaves_comes_with_the_next_gradient():
    torch.manual_seed(0)
    _, state, gradients = ready(8.0)
    g, sent = gradients["2.weight"], torch.zeros(600)
    for _ in range(200):
        sent += codes.decode(state.send("2.weight", g), 600, state.bits["2.weight"])
    state.error_feedback = False
    once = codes.decode(state.send("2.weight", g), 600, state.bits["2.weight"])
    # what was sent is what there was, but for the rest that is still here
    assert (sent / 200 - g.flatten()).abs().mean() < 0.1 * (once - g.flatten()).abs().mean()


def test_the_hook_counts_bytes_and_trains(one_process):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    ddp = DistributedDataParallel(net)
    state = GradientCompression(ddp, {"0.weight": 1.0, "2.weight": 3.0}, 8.0, warmup=2)
    ddp.register_comm_hook(state, compressed_gradients)
    x, y = torch.randn(64, 20), torch.arange(64) % 4
    optimizer, losses, floats = torch.optim.SGD(net.parameters(), 0.5), [], 4 * sum(p.numel() for p in net.parameters())
    for step in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(ddp(x), y)
        loss.backward()
        losses.append(float(loss))
        if step == 1:
            assert state.bytes_sent == state.bytes_float == 2 * floats and set(state.bits) == {"0.weight", "2.weight"}
        optimizer.step()
    each = (state.bytes_sent - 2 * floats) / 38
    assert each <= floats / 8 and state.bytes_float == 40 * floats and losses[-1] < 0.5 * losses[0]


def test_what_cannot_be_is_told(tmp_path):
    net = nn.Linear(3, 2)
    for given, words in (
        ({"budget": 0.5}, "budget is 0.5; it is how many times fewer bytes"),
        ({"widths": [3]}, r"widths are \[3\]; gradients are sent in 1, 2, 4, 8 bits"),
        ({"warmup": 0}, "warmup is 0"),
        ({"traces": {"bias2": 1.0}}, "trace for 'bias2', which is no parameter"),
    ):
        with pytest.raises(HawqError, match=words):
            GradientCompression(net, **given)
    with pytest.raises(HawqError, match=r"cannot be sent 32x smaller; 2\.46x is the most"):
        _tiny()
    with pytest.raises(HawqError, match="CompressGradients needs traces"):
        trainer(tmp_path, CompressGradients(), max_epochs=1).fit(Classifier(), loader())


def _tiny():
    state = GradientCompression(nn.Linear(3, 2), {"weight": 1.0}, 32.0, warmup=1)
    state.observe("weight", torch.randn(2, 3))
    state.stepped()


@pytest.mark.stress
def test_two_processes_hold_the_same_weights_and_bits(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], cwd=Path(__file__).parents[3], capture_output=True, text=True,
        timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert first["bits"] == second["bits"] and first["sent"] < first["float"] / 2.5
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


SCRIPT = """
import sys

import torch

from hawq_lightning.callbacks import CompressGradients
from tests.trainer.ddp_script import Plain
from tests.trainers import hawq, loader, trainer

if __name__ == "__main__":
    torch.manual_seed(1)
    folder, compress = sys.argv[1], CompressGradients(4.0, warmup=2)
    model = Plain()
    run = trainer(folder, hawq(dirpath=folder), compress, strategy="ddp", devices=2, max_epochs=6)
    run.fit(model, loader())
    told = {"state": model.state_dict(), "bits": compress.state.bits, "sent": compress.state.bytes_sent,
            "float": compress.state.bytes_float}
    torch.save(told, f"{folder}/rank{run.global_rank}.pt")
"""
