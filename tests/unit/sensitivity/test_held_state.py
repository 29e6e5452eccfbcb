"""Whatever a loss writes to a parameter is undone, by whichever way it writes; who writes nothing pays no copy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.internals import internal

KEPT = internal("sensitivity._held_state")
put_back_at_end = KEPT.put_back_at_end

WRITES = {
    "mul_": lambda p, q: p.mul_(0.5),
    "iadd": lambda p, q: p.__iadd__(1),
    "setitem": lambda p, q: p.__setitem__(0, 7.0),
    "data": lambda p, q: setattr(p, "data", torch.zeros_like(p)),
    "data.copy_": lambda p, q: p.data.copy_(torch.zeros_like(p)),
    "detached view": lambda p, q: p.detach()[1:].zero_(),
    "out": lambda p, q: torch.add(torch.ones_like(p), 1, out=p),
    "foreach": lambda p, q: torch._foreach_lerp_([p, q], [torch.zeros_like(p), torch.zeros_like(q)], 0.3),
    "init": lambda p, q: nn.init.normal_(p),
    "numpy": lambda p, q: np.multiply(p.detach().numpy(), 2, out=p.detach().numpy()),
    "clamp of data": lambda p, q: p.data.clamp_(-0.01, 0.01),
    "embedding": lambda p, q: F.embedding(torch.arange(3), p, max_norm=0.1),
    "embedding_bag": lambda p, q: F.embedding_bag(torch.arange(3), p, torch.tensor([0]), 0.1),
    "relu inplace": lambda p, q: F.relu(p, inplace=True),
    "state dict": lambda p, q: holder(p).load_state_dict({"p": torch.zeros_like(p)}),
    "vector": lambda p, q: nn.utils.vector_to_parameters(torch.zeros(p.numel()), [p]),
    "twice": lambda p, q: (p.mul_(2), p.data.add_(1)),
    "sgd": lambda p, q: sgd(p),
    "adam": lambda p, q: sgd(p, torch.optim.Adam),
}


def holder(p):
    m = nn.Module()
    m.register_parameter("p", p)
    return m


def sgd(p, kind=torch.optim.SGD):
    p.grad = torch.ones_like(p)
    kind([p], lr=0.1).step()


@pytest.mark.parametrize("way", WRITES)
def test_every_way_of_writing_is_undone(way):
    torch.manual_seed(1)
    net = nn.ParameterList([nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 2))])
    before, pointers = [p.detach().clone() for p in net], [p.data_ptr() for p in net]
    with put_back_at_end(), KEPT.KeptParameters(net.parameters()), torch.no_grad():
        WRITES[way](net[0], net[1])
        assert not torch.equal(net[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(net, before)) and [p.data_ptr() for p in net] == pointers


def test_tied_and_viewed_memory_is_put_back_together():
    flat = torch.randn(12)
    a, b = nn.Parameter(flat[:6].view(2, 3)), nn.Parameter(flat[6:].view(2, 3))
    net, before = nn.ParameterList([a, b]), flat.clone()
    with put_back_at_end(), KEPT.KeptParameters(net.parameters()), torch.no_grad():
        flat.mul_(3)
        assert not torch.equal(b.flatten(), before[6:])
    assert torch.equal(flat, before)


def test_who_writes_nothing_pays_no_copy():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.BatchNorm1d(8), nn.Linear(8, 2))
    kept = KEPT.KeptParameters(net.parameters())
    with kept:
        for p in net.parameters():
            p.requires_grad_(True)
        F.cross_entropy(net(torch.randn(4, 8)), torch.zeros(4, dtype=torch.long)).backward()
        net[0].weight.grad.zero_()
        net[0].weight.grad = None
    assert not kept._held
    with kept, torch.no_grad():
        net[3].weight.add_(1)
    assert [len(held.tensors()) for held in kept._held] == [1]


def test_writes_past_torch_are_told():
    import ctypes

    net = nn.Linear(3, 3)
    pointer = net.weight.data_ptr()
    told = pytest.warns(UserWarning, match=r"1 parameters .*\[3, 3\].* changed while measuring")
    with told, put_back_at_end(), KEPT.KeptParameters(net.parameters()):
        ctypes.memset(pointer, 0, 4)


def test_a_late_move_of_the_loss_is_undone_at_the_end():
    net = nn.Linear(4, 3)
    calls = []

    def late(m, batch):
        calls.append(1)
        if len(calls) == 5:
            with torch.no_grad():
                m.weight.mul_(2)
        return F.cross_entropy(m(batch[0]), batch[1])

    before = net.weight.detach().clone()
    loss = internal("sensitivity._repeatable").repeatable(net, late)
    batch = (torch.randn(6, 4), torch.arange(6) % 3)
    with internal("sensitivity._isolate").isolated_eval(net):
        values = [float(loss(net, batch)) for _ in range(7)]
        net.weight.data.copy_(net.weight.data)
    assert torch.equal(net.weight, before) and len({*values[:4], *values[5:]}) == 1


def test_a_graph_without_a_backward_pass_is_freed():
    import gc

    net = nn.Sequential(nn.Linear(4, 61), nn.Sigmoid(), nn.Linear(61, 3))
    loss = internal("sensitivity._repeatable").repeatable(net, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    batch = (torch.randn(6, 4), torch.arange(6) % 3)
    for _ in range(3):  # the first two look at what the loss moves
        loss(net, batch)
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.grad_fn is not None and t.shape[-1:] == (61,)]
    assert not alive


def test_what_was_trained_between_two_measurements_stays():
    net = nn.Linear(4, 3)

    def moving(m, batch):
        value = F.cross_entropy(m(batch[0]), batch[1])
        with torch.no_grad():
            m.weight.mul_(0.5)
        return value

    loss = internal("sensitivity._repeatable").repeatable(net, moving)
    isolated_eval = internal("sensitivity._isolate").isolated_eval
    batch = (torch.randn(6, 4), torch.arange(6) % 3)
    for _ in range(2):
        with torch.no_grad():
            net.weight.add_(1)
            net.bias.add_(1)
        trained = net.weight.detach().clone()
        with isolated_eval(net):
            assert len({float(loss(net, batch)) for _ in range(3)}) == 1
        assert torch.equal(net.weight, trained)
