"""Precisions, layouts, compiled steps and CUDA graphs."""

import shutil

import pytest
import torch
from lightning.pytorch import Trainer

import hawq_lightning as hl
from hawq_lightning.quantization import enabled_bits
from tests.gpu.networks import Task, accelerator, batches, hawq, loader, loss_fn, measured, trained


def fitted(device, task, **settings):
    callback = hawq()
    Trainer(max_epochs=2, callbacks=[callback], **accelerator(device), **settings).fit(task, loader())
    known = enabled_bits(task)
    assert all(known[f"{s.layers[0]}.weight"] == s.bits for s in callback.plan.weights)
    assert all(torch.isfinite(p).all() for p in task.parameters())
    return callback.plan


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_precisions_choose_the_plan_of_float32(device, precision):
    if precision == "16-mixed" and device == "cpu":
        pytest.skip("torch scales gradients on GPUs alone")
    plan, wide = fitted(device, Task(), precision=precision), fitted(device, Task())
    assert plan.settings["precision"] == "float32" or precision.endswith("true")
    if not precision.endswith("true"):
        assert [s.bits for s in plan.sites] == [s.bits for s in wide.sites]


def test_channels_last(device):
    plan, contiguous = fitted(device, Task(channels_last=True)), fitted(device, Task())
    for mine, theirs in zip(plan.sites, contiguous.sites):
        assert mine.trace == pytest.approx(theirs.trace, rel=1e-3, abs=1e-9)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_is_the_eager_one(device, mode):
    torch._dynamo.reset()
    data = batches(device)
    _, plan = measured(trained().to(device), data)
    slopes = []
    for compiled in (False, True):
        net = trained().to(device).train()
        hl.quantize(net, plan)
        run = torch.compile(net, mode=mode) if compiled else net
        for _ in range(3):  # reduce-overhead records its graph in the second
            net.zero_grad()
            loss_fn(run, data[0]).backward()
        slopes.append({n: p.grad.clone() for n, p in net.named_parameters()})
    for name, grad in slopes[0].items():
        assert torch.allclose(grad, slopes[1][name], rtol=1e-3, atol=1e-4), name


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph(cuda):
    data = batches(cuda)
    _, plan = measured(trained().to(cuda), data)
    net = trained().to(cuda).train()
    hl.quantize(net, plan)
    x, y = (t.clone() for t in data[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net.zero_grad(set_to_none=True)
            loss_fn(net, (x, y)).backward()
    torch.cuda.current_stream().wait_stream(stream)
    net.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss_fn(net, (x, y)).backward()
    recorded = []
    for batch in data[:2]:
        x.copy_(batch[0]), y.copy_(batch[1])
        graph.replay()
        recorded.append([p.grad.clone() for p in net.parameters()])
    for batch, grads in zip(data, recorded):
        net.zero_grad(set_to_none=True)
        loss_fn(net, batch).backward()
        for mine, p in zip(grads, net.parameters()):
            assert torch.allclose(mine, p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_a_training_step_does_not_wait_for_the_gpu(cuda):
    """tests/unit/quantization/test_no_host_reads.py says it of every quantizer, without a GPU."""
    data = batches(cuda)
    _, plan = measured(trained().to(cuda), data)
    net = trained().to(cuda).train()
    hl.quantize(net, plan)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, foreach=True)
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            optimizer.zero_grad()
            loss_fn(net, data[step]).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_callback_copies_nothing_to_the_host_in_a_step(device):
    """The profiler's events of whole epochs after the plan: no copy from the device, no scalar read."""
    from torch.profiler import ProfilerActivity, profile

    _, plan = measured(Task(), batches())
    counts = []
    for callbacks in ([], [hawq(plan=plan)]):
        events = {}

        class Watched(Task):
            def training_step(self, batch, batch_idx, events=events):
                if batch_idx != 2:
                    return super().training_step(batch, batch_idx)
                kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if batch[0].is_cuda else [])]
                with profile(activities=kinds) as profiler:
                    loss = super().training_step(batch, batch_idx)
                events.update({e.key: e.count for e in profiler.key_averages()})
                return loss

        Trainer(max_epochs=1, callbacks=callbacks, **accelerator(device)).fit(Watched(), loader())
        reads = [k for k in events if "DtoH" in k or (device == "cuda" and k == "aten::_local_scalar_dense")]
        counts.append(sum(events[k] for k in reads))
        assert events
    assert counts[1] == counts[0]
