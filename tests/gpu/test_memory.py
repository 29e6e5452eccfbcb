"""Memory that runs out at any stage: measuring goes on with fewer images, the rest leaves the network as it was."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hawq_lightning as hl
from tests.gpu.networks import Net, batches, loss_fn, measured, trained
from tests.unit.sensitivity.test_batches_on_device import Moves, Rows


class RunsOut(TorchDispatchMode):
    """Raises what the allocator raises, at the n-th operation."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))


def limited(most):
    def small(model, batch):
        if len(batch[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss_fn(model, batch)

    return small


@pytest.mark.parametrize("most", [5, 2])
def test_measuring_goes_on_with_fewer_images(device, most):
    net = trained().to(device)
    whole = hl.measure(net, batches(device), loss_fn, progress=False, rtol=0.3)
    parts = hl.measure(net, batches(device), limited(most), progress=False, rtol=0.3)
    assert any("images at a time" in n for n in parts.notes)
    for mine, theirs in zip(parts, whole):
        assert mine.trace == pytest.approx(theirs.trace, rel=0.5, abs=1e-6), mine.name


STAGES = ["sites", "candidates", "quantize", "train", "pack", "load"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [1, 7, 40])
def test_a_stage_that_ran_out_leaves_the_network_as_it_was(device, tmp_path, stage, number):
    data = batches(device)
    traces, plan = measured(trained().to(device), data)
    net = trained().to(device)
    if stage in ("train", "pack"):
        hl.quantize(net, plan)
    if stage == "load":
        full = trained().to(device)
        hl.quantize(full, plan)
        hl.save_packed(full, plan, tmp_path / "given.safetensors")

    def train():
        net.zero_grad()
        loss_fn(net, data[0]).backward()

    runs = {
        "sites": lambda: hl.sites(net, data[0]),
        "candidates": lambda: hl.candidates(net, data, traces, hl.sites(net, data[0]), loss_fn),
        "quantize": lambda: hl.quantize(net, plan),
        "train": train,
        "pack": lambda: hl.save_packed(net, plan, tmp_path / "made.safetensors"),
        "load": lambda: hl.load_packed(tmp_path / "given.safetensors", net),
    }
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mode = RunsOut(number)
    try:
        with mode:
            runs[stage]()
    except (torch.OutOfMemoryError, hl.HawqError) as error:
        assert "emory" in str(error)
        assert not list(tmp_path.glob("made*"))
    else:
        assert mode.left > 0, "it went on with half of it"
    if stage not in ("quantize", "load") or mode.left <= 0:
        after = net.state_dict()
        weights = {n: v for n, v in before.items() if n in after and "quantizer" not in n}
        assert len(weights) >= len(Net().state_dict()) and all(torch.equal(v, after[n]) for n, v in weights.items())
    runs[stage]()  # again, with memory
    assert torch.isfinite(copy.deepcopy(net).eval()(data[0][0])).all()


@pytest.mark.gpu
def test_the_allocators_own_error(cuda):
    """With a limit under which a whole batch does not fit, traces come from parts of it."""
    net = trained().to(cuda)
    x, y = (t.repeat(64, *[1] * (t.ndim - 1)) for t in batches(cuda, size=32)[0])
    torch.cuda.reset_peak_memory_stats()
    whole = hl.measure(net, [(x, y)], loss_fn, progress=False, rtol=0.5)
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5 * peak / total)
    try:
        parts = hl.measure(net, [(x, y)], loss_fn, progress=False, rtol=0.5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("images at a time" in n for n in parts.notes)
    for mine, theirs in zip(parts, whole):
        assert mine.trace == pytest.approx(theirs.trace, rel=0.5, abs=1e-6), mine.name


def test_pinned_batches_are_moved_one_at_a_time(device):
    moves, net = Moves(), trained().to(device)
    data = [Rows(*(t.pin_memory() if device == "cuda" else t for t in batch), moves) for batch in batches()]
    found = hl.measure(
        net, data, lambda model, batch: loss_fn(model, (batch.x, batch.y)), batch_size_fn=lambda b: len(b.x),
        progress=False, rtol=0.3,
    )  # fmt: skip
    assert len(list(found)) > 4 and moves.count >= len(data) and moves.peak <= 2  # the next, as the last goes
    assert all(row.x.device.type == "cpu" and row.x.is_pinned() == (device == "cuda") for row in data)
