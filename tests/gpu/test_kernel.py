"""The fused kernel: the CPU's levels and gradients to the bit, the present path's training, and the time of both."""

import importlib.util

import pytest
import torch
from lightning.pytorch import Trainer

import hawq_lightning as hl
from hawq_lightning.quantization import fake_quantize_tensor, use_kernel
from tests.gpu.networks import Task, accelerator, batches, loader, loss_fn, measured, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch came without triton"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_levels_and_gradients_are_the_cpus(cuda, dtype, form):
    x = (torch.randn(8, 33, 17, 5) * 2).to(dtype).to(memory_format=form)
    for step, zero, top in ((0.25, 0.0, 15), (0.3, 7.0, 15), (1e-2, 128.0, 255)):
        found = []
        for place, kernel in (("cpu", "torch"), (cuda, "triton")):
            leaf = x.to(place).requires_grad_()
            levels = fake_quantize_tensor(leaf, *torch.tensor([step, zero], device=place), top, kernel)
            levels.backward(torch.ones_like(levels) * 3)
            found.append((levels.detach().cpu(), leaf.grad.cpu()))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def two(cuda):
    """Quantized alike, with torch and with the kernel."""
    data = batches(cuda)
    _, plan = measured(trained().to(cuda), data)
    nets = [hl.quantize(trained().to(cuda).train(), plan) for _ in range(2)]
    return nets[0], use_kernel(nets[1]), data


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_is_that_of_the_present_path(cuda, compiled):
    torch._dynamo.reset()
    torchs, ours, data = two(cuda)
    for net, run in ((torchs, torchs), (ours, torch.compile(ours, fullgraph=True) if compiled else ours)):
        loss_fn(run, data[0]).backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    for (name, mine), theirs in zip(ours.named_parameters(), torchs.parameters()):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5), name


def test_a_training_step_does_not_wait(cuda):
    _, net, data = two(cuda)
    for batch in data[:3]:  # the first compiles
        net.zero_grad()
        loss_fn(net, batch).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_fn(net, data[0]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_callback_switches_it_on(cuda):
    callback, task = hl.HAWQ(quantizer=hl.QuantizerConfig(kernel="triton"), budget="8x", progress=False), Task()
    Trainer(max_epochs=1, callbacks=[callback], **accelerator(cuda)).fit(task, loader())
    assert {m.kernel for m in task.modules() if hasattr(m, "kernel")} == {"triton"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_and_memory_beside_torchs(cuda, dtype, capsys):
    """Forward and backward of ResNet50's largest activation at batch 64."""
    x = torch.randn(64, 256, 56, 56, device=cuda, dtype=dtype, requires_grad=True)
    scale, zero = torch.tensor([0.3, 7.0], device=cuda)
    found = {}
    for kernel in ("torch", "triton"):
        seconds = []
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            x.grad = None
            start.record()
            levels = fake_quantize_tensor(x, scale, zero, 15, kernel)
            levels.backward(levels.detach())
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end))
            del levels
        found[kernel] = min(seconds[2:]), (torch.cuda.max_memory_allocated() - before) / 2**20
    with capsys.disabled():
        print(f"\n{dtype}: " + ", ".join(f"{k} {t:.2f} ms {m:.0f} MiB" for k, (t, m) in found.items()))
    assert found["triton"][0] < 1.1 * found["torch"][0] and found["triton"][1] <= found["torch"][1]
