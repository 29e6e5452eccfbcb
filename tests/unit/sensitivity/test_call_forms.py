"""Functions that are replaced while measuring keep every form of call: positional, by keyword, mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import measure
from hawq_lightning.sensitivity import find_sites, isolated_eval

X = torch.randn(2, 4, 6)
Q, K, V = torch.randn(3, 2, 2, 5, 4)
W, B, W_OUT, B_OUT = torch.randn(12, 4), torch.randn(12), torch.randn(4, 4), torch.randn(4)
T = torch.randn(5, 2, 4)

# function, its arguments in their order, and what is another in evaluation mode
FORMS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (F.scaled_dot_product_attention, {"query": Q, "key": K, "value": V, "attn_mask": None, "dropout_p": 0.5,
                                      "is_causal": True}, {"dropout_p": 0.0}),
    (F.multi_head_attention_forward, {
        "query": T, "key": T, "value": T, "embed_dim_to_check": 4, "num_heads": 2, "in_proj_weight": W,
        "in_proj_bias": B, "bias_k": None, "bias_v": None, "add_zero_attn": False, "dropout_p": 0.5,
        "out_proj_weight": W_OUT, "out_proj_bias": B_OUT, "training": True, "key_padding_mask": None,
        "need_weights": False,
    }, {"training": False}),
    *[(f, {"input": X[None] if f is F.dropout2d else X, "p": 0.5, "training": True, "inplace": False},
       {"training": False})
      for f in (F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout)],
    *[(f, {"input": X, "p": 0.5, "train": True}, {"train": False})
      for f in (torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout)],
    (F.rrelu, {"input": X, "lower": 0.1, "upper": 0.4, "training": True, "inplace": False}, {"training": False}),
    (torch.rrelu, {"input": X, "lower": 0.1, "upper": 0.4, "training": True}, {"training": False}),
]  # fmt: skip


@pytest.mark.parametrize("function, arguments, evaluation", FORMS, ids=[f[0].__name__ for f in FORMS])
def test_chance_is_taken_out_of_every_form_of_call(function, arguments, evaluation):
    names, want = list(arguments), function(**(arguments | evaluation))
    for positional in range(len(names) + 1):
        args = [arguments[n] for n in names[:positional]]
        kwargs = {n: arguments[n] for n in reversed(names[positional:])}
        with isolated_eval(nn.Linear(1, 1)):
            got = function(*args, **kwargs)
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want))):
            assert a is b is None or torch.equal(a, b), positional


class Attended(nn.Module):
    """Attention of a network in training mode, called in one of four forms."""

    def __init__(self, form: int) -> None:
        super().__init__()
        self.qkv, self.out, self.form = nn.Linear(4, 12), nn.Linear(4, 3), form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, -1))
        p = 0.5 if self.training else 0.0
        y = [
            lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=p),
            lambda: F.scaled_dot_product_attention(q, k, v, None, p, False),
            lambda: F.scaled_dot_product_attention(value=v, key=k, query=q, dropout_p=p, attn_mask=None),
            lambda: F.scaled_dot_product_attention(q, k, value=v, is_causal=False, dropout_p=p),
        ][self.form]()
        return self.out(y[:, 0].mean(1))


@pytest.mark.parametrize("estimator", ["auto", "hutchinson"])
def test_a_network_measures_the_same_whatever_the_form(estimator):
    found = []
    for form in range(4):
        torch.manual_seed(0)
        net, batch = Attended(form).train(), (torch.randn(4, 5, 4), torch.tensor([0, 1, 2, 1]))

        def loss(m, b):
            return F.cross_entropy(m(b[0]), b[1])

        table = find_sites(net.eval(), lambda net=net, batch=batch: loss(net, batch), 4)
        result = measure(net.train(), [batch], loss, sites=table, estimator=estimator, rtol=0.5, progress=False)
        found.append([r.trace for r in result])
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize("call", [
    lambda x: F.hardsigmoid(x), lambda x: F.hardsigmoid(x, False), lambda x: F.hardsigmoid(input=x),
    lambda x: F.hardsigmoid(input=x, inplace=False), lambda x: F.hardsigmoid(x * 1, True),
    lambda x: F.hardsigmoid(inplace=True, input=x * 1), lambda x: _as_a_statement(x * 1), nn.Hardsigmoid(),
])  # fmt: skip
def test_hard_sigmoids_in_every_form_have_second_derivatives(call):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 2, 1]))

    def loss(m, b):
        return F.cross_entropy(m[1](call(m[0](b[0]))), b[1])

    def smooth(m, b):
        return F.cross_entropy(m[1](F.relu6(m[0](b[0]) + 3) / 6), b[1])

    a, b = (measure(net, [batch], f, estimator="hutchinson", max_probes=4, progress=False) for f in (loss, smooth))
    assert [r.trace for r in a] == pytest.approx([r.trace for r in b], rel=1e-6)


def _as_a_statement(x: torch.Tensor) -> torch.Tensor:
    F.hardsigmoid(x, inplace=True)
    return x
