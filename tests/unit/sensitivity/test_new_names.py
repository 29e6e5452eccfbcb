"""A step that puts new tensors under the names of buffers and parameters: centres, codebooks, memories."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning.sensitivity import isolated_eval


class Net(nn.Module):
    """A centre, a codebook, something that is made in the first pass, in a module inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
        self.inner = nn.Module()
        self.inner.register_buffer("centre", torch.randn(1, 4))
        self.inner.codebook = nn.Parameter(torch.randn(3, 4), requires_grad=False)
        self.inner.register_buffer("memory", None)


def centre(m: Net, z: torch.Tensor) -> None:
    m.inner.centre = 0.5 * m.inner.centre + z.detach().mean(0, keepdim=True)


def codebook(m: Net, z: torch.Tensor) -> None:
    m.inner.codebook = nn.Parameter(0.5 * m.inner.codebook + z.detach()[:3], requires_grad=False)


def memory(m: Net, z: torch.Tensor) -> None:
    m.inner.memory = z.detach().mean(0) if m.inner.memory is None else 2 * m.inner.memory


def anew(m: Net, z: torch.Tensor) -> None:
    del m.inner.centre
    m.inner.register_buffer("centre", z.detach()[:1])
    m.inner.register_buffer("more", z.detach())


def nothing(m: Net, z: torch.Tensor) -> None:
    pass


def loss_with(move, before: bool):
    def loss(m: Net, batch: torch.Tensor) -> torch.Tensor:
        z = m.net(batch)
        if before:
            move(m, z)
        far = (z - m.inner.centre).square().sum(1) + torch.cdist(z, m.inner.codebook).square().sum(1)
        out = far.mean() + (0 if m.inner.memory is None else (z * m.inner.memory).square().mean())
        if not before:
            move(m, z)
        return out

    return loss


def tensors(m: Net) -> dict[str, torch.Tensor | None]:
    return {**m.inner._buffers, **m.inner._parameters}


@pytest.mark.parametrize("move", [centre, codebook, memory, anew])
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_a_step_that_names_tensors_anew_is_measured_as_if_it_did_not(move, estimator):
    if estimator == "hutchinson" and torch.__version__ < torch.torch_version.TorchVersion("2.10"):
        pytest.skip("torch 2.9 has no second derivative of cdist")
    batches, traces = [torch.randn(4, 5) for _ in range(3)], {}
    for how in (nothing, move):
        net = Net()
        held, values = tensors(net), {n: t if t is None else t.clone() for n, t in tensors(net).items()}
        measured = hl.measure(
            net, batches, loss_with(how, False), estimator=estimator, max_probes=4, rtol=9.0, progress=False
        )
        traces[how] = {r.name: r.trace for r in measured}
        assert tensors(net).keys() == held.keys() and all(tensors(net)[n] is t for n, t in held.items())
        assert all(t is None or torch.equal(t, values[n]) for n, t in held.items())
    assert traces[move] == traces[nothing]


@pytest.mark.parametrize("move", [centre, codebook, memory, anew])
def test_passes_of_one_batch_are_alike_when_names_move_before_their_use(move):
    net, batch = Net(), torch.randn(4, 5)
    once = hl.measure(net, [batch], loss_with(move, True), estimator="exact", progress=False)
    again = hl.measure(net, [batch], loss_with(move, True), estimator="exact", progress=False)
    assert [r.trace for r in once] == [r.trace for r in again]


def test_an_isolated_pass_leaves_names_as_they_were():
    net = Net()
    held = tensors(net)
    with isolated_eval(net):
        for move in (centre, codebook, memory, anew):
            move(net, torch.randn(4, 4))
    assert tensors(net).keys() == held.keys() and all(tensors(net)[n] is t for n, t in held.items())
    assert isinstance(net.inner.codebook, nn.Parameter) and F.relu(net.inner.centre).shape == (1, 4)
