"""Random networks with random losses, and their dense curvature: an oracle that no list of examples can be fitted to.

A case is drawn from its seed: a few blocks (convolutions of every form, shared layers, in-place changes of every kind,
attention, squeeze-and-excitation, a recurrent layer between, checkpointed blocks), outputs in a tensor, tuple or dict,
and a loss of the kinds that people train with (masked, paired, censored, weighted, with several heads). The network and
the loss are known apart here, so that the dense matrices come from plain autograd and share no code with the package:

* Gauss-Newton: ``tr(J^T H J)`` with the Jacobian ``J`` of all outputs and the dense Hessian ``H`` of the loss in them;
* Hessian: of the loss in the site itself, column by column.

``python -m tests.oracle.generated COUNT FIRST_SEED [--each 2] [--json FILE]`` runs many of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from hawq_lightning import HawqError, Sensitivity, SiteTable, measure
from hawq_lightning.quantization import quantizable_layers
from hawq_lightning.sensitivity import RoundingErrors, find_sites

ESTIMATORS = ("ggn", "exact", "hutchinson", "hessian", "auto")

CHANNELS, SIZE = (
    3,
    4,
)  # of the images behind the stem, and of the batch: a dense Hessian takes a backward pass an element


# ---- blocks over images (N, C, 2, 2) ----


class Conv(nn.Module):
    """A convolution of any form, followed by a non-linearity that may work in place."""

    def __init__(self, rng: random.Random, smooth: bool) -> None:
        super().__init__()
        form = rng.choice(["plain", "depthwise", "dilated", "pointwise", "oblong", "reflect", "transposed"])
        c = CHANNELS
        self.conv: nn.Module = {
            "plain": lambda: nn.Conv2d(c, c, 3, padding=1),
            "depthwise": lambda: nn.Conv2d(c, c, 3, padding=1, groups=c, bias=rng.random() < 0.5),
            "dilated": lambda: nn.Conv2d(c, c, 3, padding=2, dilation=2),
            "pointwise": lambda: nn.Conv2d(c, c, 1),
            "oblong": lambda: nn.Conv2d(c, c, (1, 3), padding="same"),
            "reflect": lambda: nn.Conv2d(c, c, 3, padding=1, padding_mode="reflect"),
            "transposed": lambda: nn.ConvTranspose2d(c, c, 3, padding=1, groups=rng.choice([1, c])),
        }[form]()
        self.act = activation(rng, smooth)
        self.residual = rng.choice(["none", "add", "add_"])
        if self.residual == "add_" and (
            isinstance(self.act, (nn.ReLU, nn.Tanh)) or getattr(self.act, "inplace", False)
        ):
            self.residual = "add"  # the derivative reads the result, which must stay
        self.describe = f"conv:{form}/{self.residual}/{type(self.act).__name__}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.conv(x))
        if self.residual == "add":
            return y + x
        if self.residual == "add_":
            y = y.clone() if y is x else y
            return y.add_(x)
        return y


class SqueezeExcite(nn.Module):
    """Channels weighed by a gate that two 1x1 convolutions compute."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(CHANNELS, 2, 1), nn.Conv2d(2, CHANNELS, 1)
        self.hard = rng.random() < 0.5
        self.describe = f"se:{'hard' if self.hard else 'sigmoid'}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))
        return x * (F.hardsigmoid(s) if self.hard else torch.sigmoid(s))


class ConvReadTwice(nn.Module):
    """A convolution whose weight a function reads as well: it has to stay float, or be quantized for both."""

    read_by_function = ("conv",)

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.form = rng.choice(["both", "function"])
        self.describe = f"conv_weight_read:{self.form}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(F.conv2d(x, self.conv.weight, padding=1))
        return y + self.conv(x) if self.form == "both" else y + x


# ---- blocks over tokens (N, T, D) ----


class Mlp(nn.Module):
    """Two linear layers over tokens; what stands between may change the first one's output, a view, in place."""

    def __init__(self, rng: random.Random, smooth: bool) -> None:
        super().__init__()
        c = CHANNELS
        self.up, self.down = nn.Linear(c, c + 1, bias=rng.random() < 0.8), nn.Linear(c + 1, c)
        self.made = rng.choice(list(WEIGHT_MAKERS)) if rng.random() < 0.3 else "parameter"
        if self.made != "parameter":
            WEIGHT_MAKERS[self.made](self.up)
        self.between = rng.choice(["act", "relu_", "mul_", "masked_fill_", "assign", "div_", "shortcut_"])
        self.act = activation(rng, smooth)
        inplace = bool(getattr(self.act, "inplace", False))
        if inplace and self.between == "relu_":  # ReLU's derivative reads its result
            self.act.inplace = inplace = False
        self.describe = (
            f"mlp:{self.between}/{type(self.act).__name__}{'(inplace)' if getattr(self.act, 'inplace', False) else ''}"
            f"{'' if self.made == 'parameter' else '/' + self.made}"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        if self.between == "relu_":
            h = F.relu_(h)
        elif self.between == "mul_":
            h *= 1.5
        elif self.between == "masked_fill_":
            h.masked_fill_(torch.arange(h.shape[-1]) == 1, 0.0)
        elif self.between == "assign":
            h[:, 0] = 0
        elif self.between == "div_":
            h.div_(1.3)
        h = self.act(h)
        y = self.down(h)
        if self.between == "shortcut_":
            y += x
            return y
        return y + x


class WeightReadByFunction(nn.Module):
    """A linear layer whose weight a function reads: a tied decoder, a projection by hand, a view of the weight."""

    read_by_function = ("lin",)

    def __init__(self, rng: random.Random, smooth: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(CHANNELS, CHANNELS)
        self.act = activation(rng, smooth)
        self.form = rng.choice(["tied", "matmul", "view", "function", "detached"])
        self.describe = f"weight_read:{self.form}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.lin.weight
        if self.form == "function":
            return x + self.act(F.linear(x, w, self.lin.bias))
        h = self.act(self.lin(x))
        if self.form == "tied":
            return F.linear(h, w.t()) + x
        if self.form == "matmul":
            return h @ w + x
        return h * w[0] + x if self.form == "view" else F.linear(h, w.detach().clone())


class Attention(nn.Module):
    """Single-head attention out of linear layers: scaled_dot_product_attention in one of its call forms, or by hand."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))
        self.form = rng.choice(["hand", "sdpa", "sdpa_keywords"])
        self.describe = f"attention:{self.form}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.form == "hand":
            y = torch.softmax(q @ k.transpose(1, 2) / 2.0, -1) @ v
        elif self.form == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(query=q, key=k, value=v, dropout_p=0.0, is_causal=False)
        return x + self.out(y)


class Recurrent(nn.Module):
    """A recurrent layer between linear ones, which torch computes by one function."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.inner = nn.Linear(CHANNELS, CHANNELS)
        self.cell = rng.choice([nn.LSTM, nn.GRU, nn.RNN])(CHANNELS, CHANNELS, batch_first=True)
        self.describe = f"recurrent:{type(self.cell).__name__}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.cell(self.inner(x))
        return x + y


class Checkpointed(nn.Module):
    """A block whose activations are recomputed in the backward pass; in :func:`dense` it is a plain block."""

    plain = False

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant
        self.describe = f"checkpoint{'(reentrant)' if reentrant else ''}[{block.describe}]"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) if Checkpointed.plain else checkpoint(self.block, x, use_reentrant=self.reentrant)


def _pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", amount=0.3)


# what makes a layer's weight before every call
WEIGHT_MAKERS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": weight_norm, "spectral_norm": spectral_norm, "pruned": _pruned,
    "parametrized": parametrizations.weight_norm,
}  # fmt: skip


def activation(rng: random.Random, smooth: bool) -> nn.Module:
    """A non-linearity; without ``smooth`` one that is piecewise linear."""
    kinds: list[Callable[[], nn.Module]] = [
        nn.ReLU, lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.1, inplace=True),
        nn.Identity,
    ]  # fmt: skip
    if smooth:
        kinds += [nn.GELU, nn.SiLU, lambda: nn.SiLU(inplace=True), nn.Tanh]
    return rng.choice(kinds)()


class Net(nn.Module):
    """A stem, blocks over images, blocks over tokens, and one to three heads."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        smooth = rng.random() < 0.4
        self.stem = nn.Conv2d(2, CHANNELS, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        images = [self._image_block(rng, smooth) for _ in range(rng.randint(0, 2))]
        tokens = [self._token_block(rng, smooth) for _ in range(rng.randint(1, 2))]
        self.images = nn.ModuleList(self._wrapped(rng, b) for b in images)
        self.tokens = nn.ModuleList(self._wrapped(rng, b) for b in tokens)
        self.twice = rng.random() < 0.2  # the last token block is called twice: its weights are shared
        names = ("a", "b", "c")[: rng.choice([1, 1, 2, 3])]
        self.heads = nn.ModuleDict({name: nn.Linear(CHANNELS, rng.randint(1, 3)) for name in names})
        self.form = rng.choice(["tensor", "tuple", "dict"]) if len(self.heads) == 1 else rng.choice(["tuple", "dict"])
        self.pool = rng.choice(["mean", "first", "all"])
        self.describe = [b.describe for b in (*self.images, *self.tokens)] + [
            f"twice={self.twice}", f"heads={len(self.heads)}", self.form, self.pool,
        ]  # fmt: skip

    @staticmethod
    def _image_block(rng: random.Random, smooth: bool) -> nn.Module:
        kind = rng.random()
        if kind < 0.15:
            return ConvReadTwice(rng)
        return SqueezeExcite(rng) if smooth and kind < 0.4 else Conv(rng, smooth)

    @staticmethod
    def _token_block(rng: random.Random, smooth: bool) -> nn.Module:
        kind = rng.random()
        if kind < 0.15:
            return WeightReadByFunction(rng, smooth)
        if smooth and kind < 0.4:
            return Attention(rng)
        return Recurrent(rng) if smooth and kind < 0.5 else Mlp(rng, smooth)

    @staticmethod
    def _wrapped(rng: random.Random, block: nn.Module) -> nn.Module:
        return Checkpointed(block, rng.random() < 0.5) if rng.random() < 0.15 else block

    def function_read_layers(self) -> set[str]:
        """Layers whose weights a function reads, past the layer's own call."""
        return {f"{n}.{layer}" for n, m in self.named_modules() for layer in getattr(m, "read_by_function", ())}

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.images:
            x = block(x)
        x = F.adaptive_avg_pool2d(x, (1, 2)).flatten(2).transpose(1, 2)  # (N, 2, CHANNELS)
        for block in self.tokens:
            x = block(x)
        if self.twice:
            x = self.tokens[-1](x)
        if self.pool != "all":
            x = x.mean(1) if self.pool == "mean" else x[:, 0]
        outs = {name: head(x) for name, head in self.heads.items()}
        if self.form == "dict":
            return outs
        return tuple(outs.values()) if self.form == "tuple" else outs["a"]


# ---- losses: functions of the outputs, by head, and of the batch ----


def _labels(o: torch.Tensor) -> torch.Tensor:
    rows = o.reshape(-1, o.shape[-1]).shape[0]
    return (torch.arange(rows) * 7 + 1) % o.shape[-1]


def _targets(o: torch.Tensor) -> torch.Tensor:
    return torch.sin(torch.arange(o.numel(), dtype=o.dtype) * 1.7).reshape(o.shape)


def _rows(o: torch.Tensor) -> torch.Tensor:
    return o.reshape(-1, o.shape[-1])


def cross_entropy(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(_rows(o), _labels(o))


def masked_cross_entropy(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    each = F.cross_entropy(_rows(o), _labels(o), reduction="none").reshape(len(mask), -1).mean(1)
    return (each * mask).sum() / mask.sum()


def weighted_cross_entropy(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weight = torch.tensor([0.3, 1.0, 2.5], dtype=o.dtype)[: o.shape[-1]]
    return F.cross_entropy(_rows(o), _labels(o), weight=weight)


def squared_error(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(o, _targets(o))


def huber(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.huber_loss(o, _targets(o), delta=0.4)


def binary(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(o, (_targets(o) > 0).to(o.dtype))


def dice(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    p, y = torch.sigmoid(o), (_targets(o) > 0).to(o.dtype)
    return 1 - (2 * (p * y).sum() + 1) / ((p + y).sum() + 1)


def masked_dice(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    w = mask.reshape(-1, *[1] * (o.ndim - 1))
    p, y = torch.sigmoid(o), (_targets(o) > 0).to(o.dtype)
    return 1 - (2 * (w * p * y).sum() + 1) / ((w * (p + y)).sum() + 1)


def paired(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last two samples are a pair, which image 0 has no part in."""
    return F.mse_loss(o, _targets(o)) + 0.3 * (o[-1] * o[-2]).sum()


def ranking(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pairwise logistic ranking of the samples by their first output; sample 0 is in no pair."""
    s = o.reshape(len(o), -1)[:, 0]
    pairs = [(i, j) for i in range(1, len(s)) for j in range(1, len(s)) if i < j]
    return torch.stack([F.softplus(s[j] - s[i]) for i, j in pairs]).mean()


def censored(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cox's partial likelihood; the first sample is censored and leaves every risk set."""
    s = o.reshape(len(o), -1).mean(1)
    terms = [torch.logsumexp(s[i:], 0) - s[i] for i in range(1, len(s) - 1)]
    return torch.stack(terms).mean()


def contrast(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Every sample against all others: images are coupled through the softmax over the batch."""
    z = F.normalize(o.reshape(len(o), -1), dim=1)
    logits = z @ z.T / 0.5 - 1e4 * torch.eye(len(z), dtype=z.dtype)
    return F.cross_entropy(logits, (torch.arange(len(z)) + 1) % len(z))


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    f.__name__: f
    for f in (
        cross_entropy, masked_cross_entropy, weighted_cross_entropy, squared_error, huber, binary, dice, masked_dice,
        paired, ranking, censored, contrast,
    )
}  # fmt: skip


# what a loss needs to have any curvature: images, and outputs of a row
NEEDS = {
    "cross_entropy": (1, 2), "masked_cross_entropy": (2, 2), "weighted_cross_entropy": (1, 2), "masked_dice": (2, 1),
    "paired": (2, 1), "ranking": (3, 1), "censored": (3, 1), "contrast": (3, 2),
}  # fmt: skip


@dataclass
class Case:
    """One network with one loss; ``loss(outputs, batch)`` is what ``loss_fn`` computes from the network's outputs."""

    seed: int
    net: Net
    batch: tuple[torch.Tensor, torch.Tensor]
    names: list[str]
    scale: float
    about: str = field(init=False)

    def __post_init__(self) -> None:
        self.about = f"seed {self.seed}: {' '.join(self.net.describe)} | {'+'.join(self.names)} x{self.scale:g}"

    def loss(self, outputs: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The loss from the outputs."""
        values = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
        values = [values] if isinstance(values, torch.Tensor) else list(values)
        return sum((LOSSES[n](self.scale * o, batch[1]) for n, o in zip(self.names, values)), torch.zeros(()).double())

    def loss_fn(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """What a user gives to ``measure``."""
        return self.loss(model(batch[0]), batch)


def make_case(seed: int) -> Case:
    """The case of a seed, in float64 and evaluation mode."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    net = Net(rng).double().eval()
    net.norm.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
    net.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    n = rng.choice([1, 2, 3, 4, 5, 6])
    x = torch.randn(n, 2, SIZE, SIZE, dtype=torch.float64)
    mask = torch.ones(n, dtype=torch.float64)
    mask[0] = 0.0  # image 0 shows nothing: whoever looks at it alone is misled
    losses = []
    for head in net.heads.values():
        possible = [
            name for name in LOSSES if all(a >= b for a, b in zip((n, head.out_features), NEEDS.get(name, (1, 1))))
        ]
        losses.append(rng.choice(possible))
    return Case(seed, net, (x, mask), losses, rng.choice([1.0, 3.0]))


# ---- dense curvature, by plain autograd ----


def flat(outputs: Any) -> torch.Tensor:
    """All outputs in one vector."""
    values = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    values = [values] if isinstance(values, torch.Tensor) else list(values)
    return torch.cat([v.reshape(-1) for v in values])


class Shifts:
    """Adds zeros to what the readers of an activation site read, one tensor for each tensor that is read."""

    def __init__(self, model: nn.Module, readers: tuple[str, ...]) -> None:
        self.points: list[torch.Tensor] = []
        self.read: list[torch.Tensor] = []
        self._of: dict[tuple[int, int], torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []
        layers = quantizable_layers(model)[0]
        modules = dict.fromkeys(layers[r].module for r in readers)  # of a recurrent one several weights read its input
        self._handles = [m.register_forward_pre_hook(self._add) for m in modules]

    def _add(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        key = (id(x), x._version)
        if key not in self._of:
            self._alive.append(x)
            self.read.append(x.detach().clone())
            self._of[key] = torch.zeros_like(x, requires_grad=True)
            self.points.append(self._of[key])
        return (x + self._of[key], *args[1:])

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def _points(case: Case, site: Any) -> tuple[list[torch.Tensor], Any, list[torch.Tensor]]:
    """What can be disturbed, the outputs, and for an activation site what was read at each point."""
    if site.kind == "weight":
        reader = quantizable_layers(case.net)[0][site.layers[0]]
        if not reader.recomputed:
            return [reader.weight], case.net(case.batch[0]), []
        return *_made_weight(case, reader.module), []
    shifts = Shifts(case.net, site.layers)
    try:
        out = case.net(case.batch[0])
    finally:
        shifts.remove()
    return shifts.points, out, shifts.read


def _made_weight(case: Case, module: nn.Module) -> tuple[list[torch.Tensor], Any]:
    """The weight that a hook or a parametrization makes, one tensor for all calls of the layer."""
    case.net(case.batch[0])
    leaf = module.weight.detach().clone().requires_grad_()  # type: ignore[operator]
    if parametrize.is_parametrized(module, "weight"):
        maker = module.parametrizations["weight"]  # type: ignore[index]
        maker.__dict__["forward"] = lambda: leaf
        try:
            return [leaf], case.net(case.batch[0])
        finally:
            del maker.__dict__["forward"]

    def put(m: nn.Module, args: object) -> None:
        m.weight = leaf  # type: ignore[assignment]

    handle = module.register_forward_pre_hook(put)  # behind the hook that makes it
    try:
        return [leaf], case.net(case.batch[0])
    finally:
        handle.remove()


def plain_networks() -> contextlib.ExitStack:
    """Inside, networks can be differentiated as often as :func:`dense` wants."""
    stack = contextlib.ExitStack()
    # neither the fused attention kernels nor the hard sigmoid have a second derivative
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    stack.enter_context(patch.object(F, "hardsigmoid", lambda x: F.relu6(x + 3) / 6))
    stack.enter_context(patch.object(Checkpointed, "plain", True))
    return stack


def _factors(case: Case, points: list[torch.Tensor], outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss's Hessian in the outputs, and the Jacobian of these by the points, (outputs, elements of all points)."""
    f = flat(outputs)
    o = f.detach().requires_grad_()
    shapes = [v.shape for v in ([outputs] if isinstance(outputs, torch.Tensor) else
                                list(outputs.values()) if isinstance(outputs, Mapping) else outputs)]  # fmt: skip
    pieces = [p.reshape(s) for p, s in zip(o.split([math.prod(s) for s in shapes]), shapes)]
    value = case.loss(pieces, case.batch)
    return _hessian(value, [o])[0], torch.cat(_rows_of(f, points), 1)


def dense_forms(case: Case, site: Any, rounding: RoundingErrors) -> list[float]:
    """``D^T J^T H J D`` of the rounding error D of every candidate of a site."""
    points, outputs, read = _points(case, site)
    hessian, jacobian = _factors(case, points, outputs)
    if site.kind == "weight":
        errors = [[d] for d in rounding.weights[site.name]]
    else:
        errors = [list(of_points) for of_points in zip(*(rounding.activations[site.name](x) for x in read))]
    moved = [jacobian @ torch.cat([d.reshape(-1) for d in of_points]) for of_points in errors]
    return [float(x @ hessian @ x) for x in moved]


def dense(case: Case, site: Any) -> tuple[float, float]:
    """Traces of the Gauss-Newton matrix and of the Hessian of the loss at a site, as ``measure`` says."""
    points, outputs, _ = _points(case, site)
    hessian, jacobian = _factors(case, points, outputs)
    gauss_newton = float((jacobian * (hessian @ jacobian)).sum())
    loss = case.loss(outputs, case.batch)
    slopes = torch.autograd.grad(loss, points, create_graph=True, allow_unused=True)
    true = 0.0
    for slope, point in zip(slopes, points):
        if slope is None or not slope.requires_grad:
            continue
        line = slope.reshape(-1)
        true += float(_rows_of(line, [point])[0].diagonal().sum())
    return gauss_newton, true


def _rows_of(values: torch.Tensor, points: list[torch.Tensor]) -> list[torch.Tensor]:
    """Derivatives of a vector by each point, (values, elements of the point): all rows at once where autograd can."""
    eye = torch.eye(len(values), dtype=values.dtype)
    try:
        table = torch.autograd.grad(
            values, points, eye, retain_graph=True, allow_unused=True, is_grads_batched=True, materialize_grads=True
        )
    except RuntimeError:
        each = [
            torch.autograd.grad(values, points, e, retain_graph=True, allow_unused=True, materialize_grads=True)
            for e in eye
        ]
        table = [torch.stack(rows) for rows in zip(*each)]
    return [t.reshape(len(values), -1) for t in table]


def _hessian(value: torch.Tensor, points: list[torch.Tensor]) -> list[torch.Tensor]:
    (slope,) = torch.autograd.grad(value, points[0], create_graph=True)
    out = torch.zeros(len(slope), len(slope), dtype=slope.dtype)
    if slope.requires_grad:
        for i in range(len(slope)):
            out[i] = torch.autograd.grad(slope[i], points[0], retain_graph=True)[0]
    return [out]


# ---- measured against dense ----

PROBES = 24
RTOL = 0.2
REPEATS = 12
SLACK = 0.02


@dataclass(frozen=True)
class Miss:
    """One thing that a measurement got wrong.

    Attributes:
        estimator: that was asked for.
        text: what.
    """

    estimator: str
    text: str


def run_case(seed: int, estimators: Sequence[str] = ESTIMATORS) -> list[Miss]:
    """Measure the case of a seed with several estimators; whatever is not true of its own dense matrix."""
    case = make_case(seed)
    table = find_sites(case.net, lambda: case.loss_fn(case.net, case.batch), len(case.batch[0]))
    with plain_networks():
        truth = {s.name: dense(case, s) for s in table}
    expected = case.net.function_read_layers()
    told = {f.name for f in table.floats if "function reads" in f.reason}
    misses = [] if told == expected else [Miss("sites", f"functions read {expected}, told {told}")]
    for estimator in estimators:
        misses += [Miss(estimator, text) for text in _compare(case, table, truth, estimator)]
    return misses


def _measured(case: Case, table: SiteTable, estimator: str, seed: int) -> Sensitivity:
    return measure(
        case.net, [case.batch], case.loss_fn, sites=table, estimator=estimator, rtol=RTOL, max_probes=PROBES,
        seed=seed, progress=False, l1_curvature="zero",
    )  # fmt: skip


def _compare(case: Case, table: SiteTable, truth: Mapping[str, tuple[float, float]], estimator: str) -> list[str]:
    try:
        measured = _measured(case, table, estimator, 0)
    except HawqError as error:
        return _false_error(str(error), truth, estimator)
    except Exception as error:  # whatever is raised raw is a miss
        return [f"raised {type(error).__name__}: {str(error)[:200]}"]
    used = str(measured.settings["estimator"])
    column = 0 if used in ("ggn", "exact") else 1
    size = max(abs(t[column]) for t in truth.values())
    misses: list[str] = []
    again: list[Sensitivity] = []
    for r in measured:
        right = truth[r.name][column]
        if _off(r.trace, r.stderr, right, size):
            if r.stderr > 0 and not again:
                again = [_measured(case, table, estimator, seed) for seed in range(1, REPEATS + 1)]
            if again and _right_on_average(again, r.name, right, size):
                continue
            misses.append(f"{r.name}: {used} says {r.trace:.5g} +- {r.stderr:.2g}, dense {right:.5g}")
    return misses + _false_notes(measured, truth, column, size)


def _off(trace: float, error: float, right: float, size: float) -> bool:
    return not abs(trace - right) <= 4 * error + SLACK * abs(right) + 1e-9 * size


def _right_on_average(again: Sequence[Sensitivity], site: str, right: float, size: float) -> bool:
    """A lone miss may be chance: whether other seeds agree with the matrix, each and in the mean."""
    records = [measured[site] for measured in again]
    alone = sum(_off(r.trace, r.stderr, right, size) for r in records)
    mean = sum(r.trace for r in records) / len(records)
    error = math.sqrt(sum(r.stderr**2 for r in records)) / len(records)
    return alone <= 1 and not _off(mean, error, right, size)


def _false_error(text: str, truth: Mapping[str, tuple[float, float]], estimator: str) -> list[str]:
    """A refusal is right only where what it says is true; of the loss's curvature in the outputs Gauss-Newton tells."""
    true_hessian = estimator in ("hutchinson", "hessian")
    largest = max(max(abs(a), abs(b) * true_hessian) for a, b in truth.values())
    if "no curvature" in text and largest <= 1e-9:
        return []
    if "double backward" in text or "derivative" in text:
        return [f"refused, though plain autograd differentiates twice: {text}"]
    return [f"refused: {text}"]


def _false_notes(
    measured: Sensitivity, truth: Mapping[str, tuple[float, float]], column: int, size: float
) -> list[str]:
    misses = []
    used = measured.settings["estimator"]
    largest = max(max(abs(a), abs(b)) for a, b in truth.values())
    apart = {n: f"{a:.4g} and {b:.4g}" for n, (a, b) in truth.items() if abs(a - b) > 1e-6 * largest}
    for note in measured.notes:
        if "zero curvature at" in note:
            named = [n for n in truth if re.search(rf"(at|,) {re.escape(n)}(,|\.$| and )", note)]
            wrong = [n for n in named if abs(truth[n][column]) > 1e-9 * size]
            misses += [f"{n}: said to have zero curvature, dense {truth[n][column]:.3g}" for n in wrong]
        if "linear in the network's outputs" in note and size > 1e-9:
            misses.append(f"said to be linear in the outputs, dense {size:.3g}")
        if "network is piecewise linear" in note and "not" not in note:
            misses += [f"{n}: said to be piecewise linear, but {text}" for n, text in apart.items()]
        if "not piecewise linear" in note and not apart:
            misses.append(f"said not to be piecewise linear, but both matrices have the same traces: {note}")
    if measured.settings["estimator_asked"] == "auto" and used == "ggn" and "piecewise" not in " ".join(measured.notes):
        misses += [f"{n}: auto says nothing, but {text}" for n, text in apart.items()]
    return misses


def run(count: int, first: int, each: int = len(ESTIMATORS)) -> dict[str, Any]:
    """Run ``count`` cases from seed ``first`` on, with ``each`` of the estimators in turn; misses by seed."""
    begin, misses = time.perf_counter(), {}
    for seed in range(first, first + count):
        if wrong := run_case(seed, [ESTIMATORS[(each * seed + i) % len(ESTIMATORS)] for i in range(each)]):
            misses[seed] = {"case": make_case(seed).about, "misses": [f"{m.estimator}: {m.text}" for m in wrong]}
    return {
        "cases": count, "first": first, "estimators a case": each, "failed": len(misses), "misses": misses,
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """``python -m tests.oracle.generated COUNT FIRST_SEED [--each 2] [--json FILE]``; 1 if a case missed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("first", type=int)
    parser.add_argument("--each", type=int, default=len(ESTIMATORS), help="estimators a case")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = run(given.count, given.first, given.each)
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text)
    print(text)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
