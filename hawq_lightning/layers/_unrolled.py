"""Recurrent networks step by step, in operations that show their products and can be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.layers._products import recorded

State = tuple[torch.Tensor, ...]
_Step = Callable[[torch.Tensor, torch.Tensor, State], State]


def _lstm(x: torch.Tensor, y: torch.Tensor, state: State) -> State:
    i, f, g, o = (x + y).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: torch.Tensor, y: torch.Tensor, state: State) -> State:
    (r, z, n), (r_h, z_h, n_h) = x.chunk(3, -1), y.chunk(3, -1)
    z = (z + z_h).sigmoid()
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return ((1 - z) * n + z * state[0],)


def _tanh(x: torch.Tensor, y: torch.Tensor, state: State) -> State:
    return ((x + y).tanh(),)


def _relu(x: torch.Tensor, y: torch.Tensor, state: State) -> State:
    return ((x + y).relu(),)


@dataclass(frozen=True)
class Fused:
    """A fused function of torch: its step, and whether it makes a single one."""

    step: _Step
    cell: bool = False


FUSED: dict[Callable[..., object], Fused] = {
    torch.lstm: Fused(_lstm),
    torch.gru: Fused(_gru),
    torch.rnn_tanh: Fused(_tanh),
    torch.rnn_relu: Fused(_relu),
    torch.lstm_cell: Fused(_lstm, cell=True),
    torch.gru_cell: Fused(_gru, cell=True),
    torch.rnn_tanh_cell: Fused(_tanh, cell=True),
    torch.rnn_relu_cell: Fused(_relu, cell=True),
}


def unrolled(module: nn.Module, reads: Mapping[str, torch.Tensor], fused: Fused, args: Sequence[Any]) -> object:
    """What a fused function returns.

    Args:
        module: whose products are shown; it is no longer asked for weights.
        reads: parameter of the first layer -> what it reads in the place of the function's input.
        fused: the function.
        args: with which it was called.
    """
    if fused.cell:
        input, hx, w_ih, w_hh, b_ih, b_hh = args
        x = reads["weight_ih"].reshape(input.shape)
        state: State = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        gates = _shown(module, "weight_ih", x, w_ih, b_ih)
        state = fused.step(gates, _shown(module, "weight_hh", state[0], w_hh, b_hh), state)
        return state if len(state) > 1 else state[0]
    if isinstance(args[3], (list, tuple)):
        input, sizes, hx, weights, has_bias, layers, dropout, train, bidirectional = args
        layout: _Layout = _Packed(sizes, input.device)
    else:
        input, hx, weights, has_bias, layers, dropout, train, bidirectional, batch_first = args
        layout = _Padded(batch_first, input.shape)
    states: State = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    x, last = layout.samples_first(input), []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            suffix = f"l{layer}" + ("_reverse" if direction else "")
            own = weights[number * each : (number + 1) * each]
            parameters = _Parameters(module, suffix, *own[:2], *(own[2:4] if has_bias else (None, None)))
            parameters.w_hr = own[-1] if each in (3, 5) else None
            name = f"weight_ih_{suffix}"
            read = layout.samples_first(reads[name]) if name in reads else x
            steps, state = _run(
                fused.step, parameters, read, tuple(s[number] for s in states), layout.there, bool(direction)
            )
            outputs.append(steps)
            last.append(state)
        x = torch.cat(outputs, -1)
        if layer < layers - 1:
            x = F.dropout(x, dropout, train)
    return layout.as_called(x), *(torch.stack(s) for s in zip(*last))


@dataclass
class _Parameters:
    """Of one layer and direction."""

    module: nn.Module
    suffix: str
    w_ih: torch.Tensor
    w_hh: torch.Tensor
    b_ih: torch.Tensor | None
    b_hh: torch.Tensor | None
    w_hr: torch.Tensor | None = None


def _run(
    step: _Step, p: _Parameters, x: torch.Tensor, state: State, there: torch.Tensor | None, backwards: bool
) -> tuple[torch.Tensor, State]:
    """States ``[N, T, hidden]``, zero behind the end of a sequence, and the last ones."""
    gates = _shown(p.module, f"weight_ih_{p.suffix}", x, p.w_ih, p.b_ih)
    out: list[torch.Tensor] = []
    for t in reversed(range(x.shape[1])) if backwards else range(x.shape[1]):
        new = step(gates[:, t], _shown(p.module, f"weight_hh_{p.suffix}", state[0], p.w_hh, p.b_hh), state)
        if p.w_hr is not None:
            new = (_shown(p.module, f"weight_hr_{p.suffix}", new[0], p.w_hr, None), *new[1:])
        if there is None:
            state = new
            out.append(state[0])
        else:
            here = there[:, t, None]
            state = tuple(a.where(here, b) for a, b in zip(new, state))
            out.append(state[0] * here)
    return torch.stack(out[::-1] if backwards else out, 1), state


def _shown(
    module: nn.Module, parameter: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return recorded(module, parameter, x, F.linear(x, weight, bias))


class _Padded:
    """Sequences of one length, samples first or time first."""

    there: torch.Tensor | None = None

    def __init__(self, batch_first: bool, shape: torch.Size) -> None:
        self._batch_first, self._shape = batch_first, shape

    def samples_first(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, T, features]``; a single sequence, which has lost its axis, as one sample."""
        x = x.reshape(self._shape)
        return x if self._batch_first else x.transpose(0, 1)

    def as_called(self, x: torch.Tensor) -> torch.Tensor:
        """The layout of the call."""
        return x if self._batch_first else x.transpose(0, 1)


class _Packed:
    """Sequences of their own lengths, the longest first, side by side in time."""

    def __init__(self, sizes: torch.Tensor, device: torch.device) -> None:
        samples = torch.arange(int(sizes[0]), device=device)
        sizes = sizes.to(device)
        self.there: torch.Tensor | None = samples[:, None] < sizes
        self._at = ((sizes.cumsum(0) - sizes) + samples[:, None]).where(self.there, sizes.new_zeros(()))
        self._steps, self._rows = self.there.T.nonzero(as_tuple=True)

    def samples_first(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, T, features]``, zero behind the end of a sequence."""
        assert self.there is not None
        return x[self._at] * self.there.unsqueeze(-1)

    def as_called(self, x: torch.Tensor) -> torch.Tensor:
        """Packed again."""
        return x[self._rows, self._steps]


_Layout = _Padded | _Packed
