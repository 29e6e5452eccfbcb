"""Block reconstruction: roundings of all layers of a block together, so that its outputs stay those of the float one.

BRECQ (Li et al., ICLR 2021) with the soft roundings of AdaRound (Nagel et al., ICML 2020, eq. 21 to 25), and inputs
that are quantized in part, as in QDrop (Wei et al., ICLR 2022).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from hawq_lightning._batches import default_forward
from hawq_lightning._progress import progress_bar
from hawq_lightning._types import Batch
from hawq_lightning.layers import forget_calls
from hawq_lightning.quantization._enabled import identities
from hawq_lightning.quantization._fake_quantize import per_channel_view
from hawq_lightning.quantization._modules import QuantizedWeight
from hawq_lightning.quantization.post_training._adaround import on_even_grid, shared
from hawq_lightning.quantization.post_training._reference import FloatReference, Forward, Reached, prepared, still
from hawq_lightning.sensitivity import OnDevice

_MOST = 8  # layers of a block
_STRETCH, _SHIFT = 1.2, 0.1  # of the sigmoid, so that roundings reach 0 and 1 (AdaRound, eq. 23)
_WARM_UP = 0.2  # share of the steps without the pull towards 0 and 1
_SHARP = (20.0, 2.0)  # its exponent, at first and at last
_PULL = 0.01
_RATE = 1e-2  # of Adam


@dataclass(frozen=True)
class Block:
    """A module whose layers are rounded together."""

    name: str
    module: nn.Module
    layers: Mapping[str, QuantizedWeight]


def reconstruct_blocks(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Forward = default_forward,
    reference: FloatReference | None = None,
    steps: int = 1000,
    batch_size: int = 32,
    drop: float = 0.5,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Learn, block by block, whether each weight takes the code below or the one above, by gradients through the block.

    A block is a module of the network (a residual block, a chain of layers) that has up to eight layers, is called once
    and gets and gives one tensor; a layer outside of one is a block of its own. Its inputs are those of the quantized
    network, a random share of whose elements is float in every step. Where the learned roundings are no better on
    the images than those that it had, these stay.

    Args:
        model: with quantizers enabled; its weights are changed in place.
        batches: a few hundred images, whose features at a block are all held in memory.
        forward: runs the model on a batch.
        reference: the float network; default: the model's own present weights.
        steps: of Adam, for each block.
        batch_size: images in a step.
        drop: share of the input's elements that is float in a step.
        progress: show a bar.

    Returns:
        block -> ``moved`` (share of codes that are not the nearest), ``before`` and ``after`` (mean squared error of
        the outputs with the roundings that it had and that it has, over the mean square of the float outputs). Layers
        that :func:`adaround` leaves alone do not appear, nor those that take several tensors or several calls.

    Raises:
        HawqError: no quantizer is enabled, or no batches.
    """
    layers, calibration = prepared(model, batches)
    reference = reference or FloatReference(model)
    free = {n: m for n, m in layers.items() if on_even_grid(m) and not shared(m, model)}
    report: dict[str, dict[str, float]] = {}
    with still(model):
        blocks = blocks_in_order(model, free, calibration[0], forward)
        with reference.in_place():
            weights = {n: m.weight.detach().clone() for n, m in free.items()}
        with progress_bar("Reconstructing blocks", len(blocks), progress) as advance:
            for done, block in enumerate(blocks):
                with reference.in_place():
                    floats, wanted = _seen(model, block.module, calibration, forward)
                given, _ = _seen(model, block.module, calibration, forward)
                rounding = _Rounding(block, weights)
                report[block.name] = rounding.learn(floats, given, wanted, steps, batch_size, drop)
                advance(done + 1)
    return report


def blocks_in_order(
    model: nn.Module, layers: Mapping[str, QuantizedWeight], batch: Batch, forward: Forward
) -> list[Block]:
    """The blocks that the layers lie in, in the order in which they begin.

    Args:
        model: with quantizers enabled.
        layers: by name, those whose roundings may be learned.
        batch: to see what modules get and give.
        forward: runs the model on a batch.
    """
    calls: dict[nn.Module, int] = {}
    begun: dict[nn.Module, int] = {}
    plain: set[nn.Module] = set()

    def look(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], out: object) -> None:
        calls[module] = calls.get(module, 0) + 1
        if len(args) == 1 and not kwargs and all(isinstance(t, torch.Tensor) and t.ndim > 1 for t in (args[0], out)):
            plain.add(module)

    def begin(module: nn.Module, args: object) -> None:
        begun.setdefault(module, len(begun))

    handles = [m.register_forward_hook(look, with_kwargs=True) for m in model.modules()]
    handles += [m.register_forward_pre_hook(begin) for m in model.modules()]
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found: list[Block] = []

    def descend(name: str, module: nn.Module) -> None:
        parts = set(module.modules())
        inside = {n: m for n, m in layers.items() if m.module in parts}
        if not inside:
            return
        layered = {m.module for m in inside.values()}
        chain = all(len(layered & set(c.modules())) <= 1 for c in module.children())
        small = module is not model and module in plain and calls[module] == 1 and len(inside) <= _MOST
        if small and (module in layered or chain or not isinstance(module, nn.Sequential)):
            found.append(Block(name, module, inside))
            return
        for child, part in module.named_children():
            descend(f"{name}.{child}" if name else child, part)

    descend("", model)
    return sorted(found, key=lambda b: begun[b.module])


def _seen(
    model: nn.Module, module: nn.Module, batches: OnDevice, forward: Forward
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module gets and gives on all batches."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def look(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        inputs.append(args[0].detach().clone())
        outputs.append(out.detach().clone())
        raise Reached

    handle = module.register_forward_hook(look)
    try:
        for batch in batches:
            with contextlib.suppress(Reached):
                forward(model, batch)
            forget_calls()
    finally:
        handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


class _Rounding:
    """Soft roundings of a block's weights.

    Args:
        block: whose weights.
        weights: layer -> the float weight.
    """

    def __init__(self, block: Block, weights: Mapping[str, torch.Tensor]) -> None:
        self.block = block
        self.below: dict[str, torch.Tensor] = {}
        self.soft: dict[str, torch.Tensor] = {}
        self.nearest: dict[str, torch.Tensor] = {}
        self.present: dict[str, torch.Tensor] = {}
        for name, layer in block.layers.items():
            quantizer = layer.weight_quantizer
            places = weights[name].float() / self._scale(layer) + quantizer.zero_point
            self.below[name] = places.floor()
            share = (places - self.below[name]).clamp(0, 1)
            self.soft[name] = -torch.log(_STRETCH / (share + _SHIFT) - 1)
            self.nearest[name] = quantizer.codes(weights[name])
            self.present[name] = quantizer.codes(layer.weight)

    def learn(
        self, floats: torch.Tensor, given: torch.Tensor, wanted: torch.Tensor, steps: int, size: int, drop: float
    ) -> dict[str, float]:
        """Learn them, and put the better codes into the weights; see :func:`reconstruct_blocks`."""
        generator = torch.Generator().manual_seed(0)
        power = float(wanted.square().mean().clamp_min(1e-30))
        channels = wanted.shape[1]
        parameters = [v.requires_grad_(True) for v in self.soft.values()]
        optimizer = torch.optim.Adam(parameters, lr=_RATE)
        with torch.enable_grad(), self._weights_as_they_are():
            for step in range(steps):
                chosen = torch.randperm(len(given), generator=generator)[:size].to(given.device)
                x = given[chosen]
                floating = (torch.rand(x.shape, generator=generator) < drop).to(x.device)
                out = self._run({n: self._soft_weight(n) for n in self.soft}, torch.where(floating, floats[chosen], x))
                loss = channels * (out - wanted[chosen]).square().mean() / power
                if (share := step / steps) >= _WARM_UP:
                    sharp = _SHARP[1] + (_SHARP[0] - _SHARP[1]) * (1 - (share - _WARM_UP) / (1 - _WARM_UP))
                    loss = loss + _PULL * sum((1 - (2 * self._up(n) - 1).abs() ** sharp).sum() for n in self.soft)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        learned = {n: self._codes(n, (self._up(n) >= 0.5).float()).to(torch.int32) for n in self.soft}
        before, after = (self._error(codes, given, wanted, size) / power for codes in (self.present, learned))
        best = learned if after <= before else self.present
        for name, layer in self.block.layers.items():
            layer.weight.copy_(layer.weight_quantizer.dequantize(best[name]).to(layer.weight.dtype))
        moved = sum(int((best[n] != self.nearest[n]).sum()) for n in best)
        count = sum(c.numel() for c in best.values())
        return {"moved": moved / count, "before": before, "after": min(before, after)}

    def _up(self, name: str) -> torch.Tensor:
        return (torch.sigmoid(self.soft[name]) * _STRETCH - _SHIFT).clamp(0, 1)

    def _codes(self, name: str, up: torch.Tensor) -> torch.Tensor:
        half = 1 << (self.block.layers[name].weight_quantizer.bits - 1)
        return (self.below[name] + up).clamp(-half, half - 1)

    def _soft_weight(self, name: str) -> torch.Tensor:
        layer = self.block.layers[name]
        codes = self._codes(name, self._up(name))
        return ((codes - layer.weight_quantizer.zero_point) * self._scale(layer)).to(layer.weight.dtype)

    def _scale(self, layer: QuantizedWeight) -> torch.Tensor:
        quantizer = layer.weight_quantizer
        return per_channel_view(quantizer.scale.detach(), layer.weight, quantizer.axis)

    def _weights_as_they_are(self) -> AbstractContextManager[None]:
        """Inside, weights pass their quantizers unchanged."""
        return identities(layer.weight_quantizer for layer in self.block.layers.values())

    def _run(self, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        paths = {m: n for n, m in self.block.module.named_modules()}
        inside = {}
        for name, weight in weights.items():
            layer = self.block.layers[name]
            inside[f"{paths[layer.module]}.{layer.parameter}".removeprefix(".")] = weight
        out: torch.Tensor = functional_call(self.block.module, inside, (x,))
        return out

    def _error(self, codes: Mapping[str, torch.Tensor], given: torch.Tensor, wanted: torch.Tensor, size: int) -> float:
        weights = {n: self.block.layers[n].weight_quantizer.dequantize(c) for n, c in codes.items()}
        total = 0.0
        with torch.no_grad(), self._weights_as_they_are():
            for x, y in zip(given.split(size), wanted.split(size)):
                total += float((self._run(weights, x) - y).double().square().sum())
        return total / wanted.numel()
