"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells: weight matrices as sites, hidden states float."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from hawq_lightning.layers import kind_of
from tests.layer_checks import check_quantized, check_traces

LENGTHS = torch.tensor([3, 4, 2, 1])

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Sequences(nn.Module):
    """A recurrent network and a linear head on its last step or, packed, on the mean of all."""

    def __init__(self, make: Any, packed: bool = False) -> None:
        super().__init__()
        self.rnn, self.packed = make(), packed
        directions = 2 if self.rnn.bidirectional else 1
        self.head = nn.Linear(directions * (self.rnn.proj_size or self.rnn.hidden_size), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            rows = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
            y, _ = pad_packed_sequence(self.rnn(rows)[0], batch_first=True)
            return self.head(y.mean(1))
        y, _ = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))
        return self.head(y.mean(1 if self.rnn.batch_first else 0))


class Steps(nn.Module):
    """A cell, called once a step."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = cell(3, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


NETS = {
    "lstm": lambda: Sequences(lambda: nn.LSTM(3, 4, 2, batch_first=True)),
    "lstm_projected": lambda: Sequences(lambda: nn.LSTM(3, 4, proj_size=2, bias=False)),
    "lstm_packed": lambda: Sequences(lambda: nn.LSTM(3, 4, bidirectional=True, batch_first=True), packed=True),
    "gru": lambda: Sequences(lambda: nn.GRU(3, 4, bidirectional=True, batch_first=True)),
    "rnn": lambda: Sequences(lambda: nn.RNN(3, 4, nonlinearity="tanh")),
    "lstm_cell": lambda: Steps(nn.LSTMCell),
    "gru_cell": lambda: Steps(nn.GRUCell),
    "rnn_cell": lambda: Steps(nn.RNNCell),
}


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _case(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return NETS[name]().to(dtype).eval(), (torch.randn(4, 4, 3, dtype=dtype), torch.tensor([0, 1, 2, 1]))


@pytest.mark.parametrize("name", NETS)
def test_traces_are_the_dense_ones(name):
    net, batch = _case(name, torch.float64)
    table = check_traces(net, batch, _loss, exact=("head",))
    assert {s.name for s in table.weights} == {n for n, p in net.named_parameters() if "weight" in n}
    read = [s.name for s in table.activations if s.name != "head.input"]
    assert read == (["cell.weight_ih.input"] if "cell" in name else ["rnn.weight_ih_l0.input"])
    assert not any(f.type in ("LSTM", "GRU", "RNN") for f in table.floats)
    macs = {x.name: x.macs for x in table.layers}
    for n, p in net.named_parameters():
        if "weight" in n and not n.startswith("head"):
            steps = LENGTHS.max() if name == "lstm_packed" else 4
            assert macs[n] == p.numel() * steps


@pytest.mark.parametrize("name", NETS)
def test_it_is_quantized_trained_and_packed(name, tmp_path):
    _, batch = _case(name, torch.float32)
    check_quantized(lambda: _case(name, torch.float32)[0], batch, _loss, tmp_path)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, PackedSequence):
        a, b = a.data, b.data
    if isinstance(a, tuple):
        return all(map(_alike, a, b))
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_steps_written_out_are_the_fused_function(kind):
    torch.manual_seed(0)
    for layers, bias, first, both, form in itertools.product((1, 2), *[(True, False)] * 3, range(4)):
        options: dict[str, Any] = {"proj_size": 2} if kind is nn.LSTM and form % 2 else {}
        options |= {"nonlinearity": "relu"} if kind is nn.RNN and bias else {}
        options |= {"num_layers": layers, "bias": bias, "batch_first": first, "bidirectional": both}
        layer = kind(3, 4, **options).double()
        x = torch.randn(3, 5, 3).double()
        x = x if first else x.transpose(0, 1)
        states = layers * (2 if both else 1)
        h, c = torch.randn(states, 3, options.get("proj_size", 4)), torch.randn(states, 3, 4)
        state: Any = tuple(s.double() for s in (h, c)) if kind is nn.LSTM else h.double()
        if form == 1:
            x = pack_padded_sequence(x, torch.tensor([3, 5, 2]), batch_first=first, enforce_sorted=False)
        elif form == 2:
            x = pack_padded_sequence(x, torch.tensor([5, 5, 2]), batch_first=first)
            state = None
        elif form == 3:
            x, state = (x[0] if first else x[:, 0]), None
        assert _alike(layer(x, state), kind_of(layer).explicit_forward(layer, x, state)), (layers, bias, first, both)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_with_and_without_a_state_and_samples(kind):
    torch.manual_seed(0)
    for bias, batched, given in itertools.product((True, False), repeat=3):
        cell = kind(3, 4, bias).double()
        x, h, c = (torch.randn(2, n).double() for n in (3, 4, 4))
        x, h, c = (x, h, c) if batched else (x[0], h[0], c[0])
        state: Any = None if not given else (h, c) if kind is nn.LSTMCell else h
        assert _alike(cell(x, state), kind_of(cell).explicit_forward(cell, x, state))
