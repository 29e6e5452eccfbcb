"""What reads weights past their layers: the note says whether its curvature is in the traces, and they agree."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import measure

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(24) % 3
PENALTY = 0.5


def net(activation):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 3)).double().eval()


def plain(m, batch):
    return F.cross_entropy(m(batch[0]), batch[1])


def penalised(m, batch):
    return plain(m, batch) + PENALTY * sum(p.square().sum() for p in m.parameters() if p.ndim > 1)


def dense(m, loss_fn, name):
    def of(weight):
        return torch.func.functional_call(m, {name: weight}, (X,))

    weight = dict(m.named_parameters())[name]
    more = PENALTY if loss_fn is penalised else 0.0
    hessian = torch.autograd.functional.hessian(
        lambda w: F.cross_entropy(of(w), Y) + more * w.square().sum(), weight.detach()
    )
    return float(hessian.reshape(weight.numel(), -1).trace())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("estimator", ["auto", "ggn", "exact", "hessian", "hutchinson"])
def test_the_note_is_true(estimator, activation):
    m = net(activation)
    more = {} if estimator == "exact" else {"max_probes": 400, "rtol": 0.01}
    traces = measure(m, [(X, Y)], penalised, estimator=estimator, progress=False, **more)
    (told,) = [n for n in traces.notes if "outside of their layers" in n]
    counted = "is counted as well" in told
    assert counted != ("is not counted" in told)
    assert counted == (estimator == "hutchinson")
    for name in ("0.weight", "2.weight"):
        without, within = dense(m, plain, name), dense(m, penalised, name)
        if activation is nn.ReLU:  # else Gauss-Newton's is another trace
            assert traces[name].trace == pytest.approx(within if counted else without, rel=0.1)
        assert (abs(traces[name].trace - within) < abs(traces[name].trace - without)) == counted


def test_no_claim_of_the_true_hessian_with_a_penalty():
    traces = measure(net(nn.ReLU), [(X, Y)], penalised, estimator="hessian", max_probes=8, progress=False)
    assert not any("true Hessian" in n for n in traces.notes)
