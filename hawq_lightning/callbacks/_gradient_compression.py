"""Gradients that processes exchange in few bits, chosen by Hessian trace under a budget of bytes; for torch's DDP.

A gradient that is off by ``e`` moves the weights by a learning rate times ``e``, and the loss, in expectation, by
``Tr(H) / (2 n) |e|^2`` times its square: the form of the paper's eq. 10, with the rounding error of the gradient in the
place of the weight's. So one selection serves both. What rounding leaves is added to the next step's gradient (error
feedback: Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019).
"""

# no annotations of the future: DDP compares those of a hook with its own types

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from hawq_lightning._errors import HawqError
from hawq_lightning.callbacks._gradient_codes import WIDTHS, decode, encode, message_bytes, rounded
from hawq_lightning.selection import Problem, select

_FLOAT = 32


@dataclass
class GradientCompression:
    """What the hook keeps: bits by parameter, what rounding left, and how much was sent.

    Args:
        model: whose parameters' gradients are exchanged, as it is or within ``DistributedDataParallel``.
        traces: parameter name -> mean Hessian trace; parameters without one are sent as float32, and counted. Empty:
            all are float until :meth:`start`.
        budget: how many times fewer bytes than float32 a step may send.
        widths: of 1, 2, 4 and 8 bits those that gradients may take.
        warmup: steps that send float32, over which rounding errors are averaged before bits are chosen.
        error_feedback: whether what rounding leaves is added to the next gradient.

    Attributes:
        bits: parameter name -> bits; empty before they are chosen.
        bytes_sent: by this process, all steps together: its messages, as handed to the collective.
        bytes_float: what float32 would have taken.

    Raises:
        HawqError: a budget or width that makes no sense, or a trace of a parameter that the model lacks.
    """

    model: nn.Module
    traces: Mapping[str, float] = field(default_factory=dict)
    budget: float = 8.0
    widths: Sequence[int] = WIDTHS
    warmup: int = 5
    error_feedback: bool = True
    bits: dict[str, int] = field(default_factory=dict, init=False)
    bytes_sent: int = field(default=0, init=False)
    bytes_float: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)) or not 1 <= self.budget <= 32:
            raise HawqError(f"budget is {self.budget!r}; it is how many times fewer bytes are sent, such as 8.")
        self.widths = tuple(sorted(set(self.widths)))
        if not self.widths or not set(self.widths) <= set(WIDTHS):
            raise HawqError(
                f"widths are {list(self.widths)}; gradients are sent in {', '.join(map(str, WIDTHS))} bits."
            )
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 1:
            raise HawqError(f"warmup is {self.warmup!r}; it is a number of steps, 1 or more.")
        self._names = {id(p): n.removeprefix("module.") for n, p in self.model.named_parameters()}
        self._residual: dict[str, torch.Tensor] = {}
        self._errors: dict[str, dict[int, float]] = {}
        self._sizes = {
            n.removeprefix("module."): p.numel() for n, p in self.model.named_parameters() if p.requires_grad
        }
        self._seen = 0
        self.start(self.traces)

    def start(self, traces: Mapping[str, float]) -> None:
        """Compress by these traces from now on, after :attr:`warmup` steps; what was chosen before is chosen anew.

        Args:
            traces: parameter name -> mean trace.

        Raises:
            HawqError: the model has no such parameter.
        """
        if missing := sorted(set(traces) - set(self._names.values())):
            raise HawqError(f"There is a trace for {missing[0]!r}, which is no parameter of the model.")
        self.traces = {n: max(0.0, float(t)) for n, t in traces.items()}
        self.bits, self._errors, self._seen = {}, {}, 0

    def name_of(self, parameter: torch.Tensor) -> str:
        """The parameter's name in the model."""
        return self._names[id(parameter)]

    def observe(self, name: str, gradient: torch.Tensor) -> None:
        """Note what rounding an averaged gradient would lose; it is the same on every process."""
        if name in self.traces:
            sums = self._errors.setdefault(name, dict.fromkeys(self.widths, 0.0))
            flat = gradient.detach().reshape(-1).float()
            for bits in self.widths:
                sums[bits] += float((rounded(flat, bits) - flat).double().square().sum())

    def stepped(self) -> None:
        """A step's last bucket is through; after the warm-up bits are chosen."""
        if not self.traces or self.bits:
            return
        self._seen += 1
        if self._seen >= self.warmup and self._errors:
            self.bits = self._choose()

    def send(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The message of one gradient; what rounding leaves stays here."""
        bits, flat = self.bits.get(name, _FLOAT), gradient.reshape(-1).float()
        if bits == _FLOAT:
            return encode(flat, bits)
        if self.error_feedback and name in self._residual:
            flat = flat + self._residual[name]
        message = encode(flat, bits)
        if self.error_feedback:
            self._residual[name] = flat - decode(message, len(flat), bits)
        return message

    def _choose(self) -> dict[str, int]:
        """Least sum of trace times rounding error with all messages of a step within the budget."""
        names = [n for n in self._sizes if n in self._errors]
        fixed = sum(message_bytes(k, _FLOAT) for n, k in self._sizes.items() if n not in self._errors)
        limit = message_bytes(sum(self._sizes.values()), _FLOAT) / self.budget - fixed
        cost = {n: {b: float(message_bytes(self._sizes[n], b)) for b in self.widths} for n in names}
        least = sum(min(row.values()) for row in cost.values())
        if least > limit:
            most = message_bytes(sum(self._sizes.values()), _FLOAT) / (least + fixed)
            raise HawqError(f"Gradients cannot be sent {self.budget:g}x smaller; {most:.2f}x is the most here.")
        omega = [[self.traces[n] * self._errors[n][b] for b in self.widths] for n in names]
        numel = [self._sizes[n] for n in names]
        problem = Problem.from_arrays(names, self.widths, omega, numel, extra_costs={"message": cost})
        return dict(select(problem, {"message": limit}).bits)


def compressed_gradients(state: GradientCompression, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook: ``ddp.register_comm_hook(GradientCompression(model, traces), compressed_gradients)``.

    Every process sends its gradients as codes, receives everybody's, and averages what they stand for; all hold the
    same afterwards. During the warm-up gradients are averaged as they are.

    Args:
        state: of this process.
        bucket: gradients of some parameters, flat.
    """
    group = dist.group.WORLD
    assert group is not None
    world, buffer = group.size(), bucket.buffer()
    named = [(state.name_of(p), g) for p, g in zip(bucket.parameters(), bucket.gradients())]
    state.bytes_float += message_bytes(buffer.numel(), _FLOAT)
    if not state.bits:
        state.bytes_sent += message_bytes(buffer.numel(), _FLOAT)
        future = dist.all_reduce(buffer.div_(world), group=group, async_op=True).get_future()

        def averaged(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            total = done.value()[0]
            for name, gradient in named:  # views of the buffer
                state.observe(name, gradient)
            if bucket.is_last():
                state.stepped()
            return total

        return future.then(averaged)
    messages = [state.send(name, g) for name, g in named]
    widths = [(state.bits.get(name, _FLOAT), g.numel(), len(m)) for (name, g), m in zip(named, messages)]
    message = torch.cat(messages)
    state.bytes_sent += len(message)
    received = [torch.empty_like(message) for _ in range(world)]
    gathered = dist.all_gather(received, message, group=group, async_op=True).get_future()

    def decoded(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        done.wait()
        total = torch.zeros_like(buffer, dtype=torch.float32)
        for one in received:
            start, at = 0, 0
            for bits, elements, size in widths:
                total[at : at + elements] += decode(one[start : start + size], elements, bits)
                start, at = start + size, at + elements
        return total.div_(world).to(buffer.dtype)

    return gathered.then(decoded)
