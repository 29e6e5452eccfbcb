"""A measurement is taken again only for the same loss, backward pass and batches."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, measure
from hawq_lightning.sensitivity import Sensitivity
from tests.console import Program


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class Net(nn.Module):
    def __init__(self, reverse=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.domain = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 2)
        self.reverse = reverse

    def forward(self, x):
        x = F.relu(self.body(x))
        return self.head(x), self.domain(Reverse.apply(x) if self.reverse else x)


def batches(count=4, dtype=torch.int64):
    draw = torch.Generator().manual_seed(3)
    return [
        (torch.randn(6, 5, generator=draw), torch.randint(0, 2, (6,), generator=draw).to(dtype)) for _ in range(count)
    ]


def focal(detach):
    def loss(net, batch):
        a, b = net(batch[0])
        y = batch[1].long()
        p = a.log_softmax(1).gather(1, y[:, None])[:, 0]
        weight = (1 - p.exp()) ** 2
        return -((weight.detach() if detach else weight) * p).mean() + 0.1 * F.cross_entropy(b, y)

    return loss


def plain(net, batch):
    a, b = net(batch[0])
    return F.cross_entropy(a, batch[1].long()) + F.cross_entropy(b, batch[1].long())


class Key(Exception):
    pass


def key(loss, net=None, data=None):
    def stop(fingerprint):
        raise Key(fingerprint)

    with pytest.raises(Key) as raised:
        measure(net or Net(), data or batches(), loss, progress=False, reuse=stop)
    return str(raised.value)


def test_the_same_loss_has_the_same_key():
    assert key(plain) == key(plain) == key(lambda n, b: plain(n, b) * 1)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_loss_that_changes_from_a_later_batch_on_has_another_key(first):
    def later(net, batch):
        late = any(torch.equal(batch[0], b[0]) for b in batches()[first:])
        return plain(net, batch) * (3.0 if late else 1.0)

    assert key(later) != key(plain)


def test_a_detached_factor_has_another_key():
    assert key(focal(True)) != key(focal(False))


def test_a_reversed_gradient_has_another_key():
    assert key(plain, Net(reverse=True)) != key(plain)


@pytest.mark.parametrize(
    "change", [lambda b: (b[0], b[1].int()), lambda b: (b[0][:, None], b[1]), lambda b: [b[0], b[1]]]
)
def test_shapes_types_and_containers_of_batches_are_in_the_key(change):
    def loss(net, batch):
        return plain(net, (batch[0].reshape(6, 5), batch[1]))

    assert key(loss, data=[change(b) for b in batches()]) != key(loss)


def test_looking_changes_nothing_that_the_measurement_draws_or_reads():
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x + 0 * torch.rand(()))

    net = Counts()
    state = torch.get_rng_state()
    assert isinstance(measure(net, batches(), plain, progress=False, max_probes=2), Sensitivity)
    assert net.calls == 0 and torch.equal(torch.get_rng_state(), state)


def print_key(threads):
    torch.set_num_threads(threads)
    print(key(plain))


def test_other_thread_counts_give_the_same_key(tmp_path):
    one, two = (Program(print_key, threads, cwd=tmp_path).end() for threads in (1, 2))
    assert one.returncode == 0 and one.stdout.startswith("sha256:"), one.stderr
    assert one == two


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 2 * x / x.numel()


def ctc(net, b):
    x = net(b[0])[0].log_softmax(-1)[:, None].expand(6, 2, 3)
    return F.ctc_loss(x, torch.ones(2, 2, dtype=torch.long), torch.full((2,), 6), torch.full((2,), 2))


ONCE = [
    (ctc, "ctc_loss"),
    (lambda n, b: F.multi_margin_loss(n(b[0])[0], b[1], p=2), "multi_margin_loss"),
    (lambda n, b: F.multilabel_margin_loss(n(b[0])[0], F.pad(b[1][:, None], (0, 2), value=-1)), "multilabel"),
    (lambda n, b: Once.apply(n(b[0])[0]), "once_differentiable"),
]  # fmt: skip


@pytest.mark.parametrize("loss, name", ONCE)
def test_double_backward_of_a_loss_without_a_second_derivative_is_refused_in_one_sentence(loss, name):
    with pytest.raises(HawqError, match=f"no second derivative.*{name}.*loss_fn="):
        measure(Net(), batches(1), loss, estimator="hutchinson", progress=False)


@pytest.mark.parametrize("estimator", ["auto", "ggn", "hessian", "exact"])
@pytest.mark.parametrize("loss, name", ONCE)
def test_a_loss_without_a_second_derivative_is_measured_by_differences_of_gradients(loss, name, estimator):
    traces = measure(Net(), batches(1), loss, estimator=estimator, max_probes=4, progress=False)
    assert traces.settings["loss_hessian"] == "finite differences"
    assert sum(name in note and "central differences" in note for note in traces.notes) == 1
