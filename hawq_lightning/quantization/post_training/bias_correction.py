"""Bias correction: quantization shifts the mean of a layer's outputs, and the shift can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hawq_lightning.batches import default_forward
from hawq_lightning.progress import Bar, progress_bar
from hawq_lightning.quantization.post_training.reference import (
    FloatReference,
    Forward,
    calls_in_order,
    look_at,
    prepared,
    still,
)
from hawq_lightning.quantization.twins import QuantizedLayer
from hawq_lightning.sites import version_of


def bias_correction(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward = default_forward,
    reference: FloatReference | None = None,
    progress: bool | Bar = False,
) -> dict[str, float]:
    """Put the mean of every output channel back to what it was in the float network.

    Empirical (Nagel et al., Data-Free Quantization, ICCV 2019, section 4.2 and appendix D): layer by layer in the
    order of the network, each with the corrections before it in place. The shift goes into the layer's bias; where it
    has none, into the running mean of the BatchNorm that follows.

    Args:
        model: armed; biases and running means are changed in place.
        batches: a few hundred images.
        forward: runs the model on a batch.
        reference: the float network; default: the model's own present weights.
        progress: show a bar.

    Returns:
        layer -> root mean square of its shift, in standard deviations of the float outputs. Layers with neither bias
        nor a BatchNorm of their own do not appear.

    Raises:
        HawqError: nothing is armed, or no batches.
    """
    layers, kept = prepared(model, batches)
    reference = reference or FloatReference(model)
    found: dict[str, float] = {}
    with still(model), progress_bar(bool(progress)) as bar:
        order = calls_in_order(model, layers, kept[0], forward)
        norms = norms_behind(model, layers, kept[0], forward)
        targets = {n: ChannelMean() for n in order}
        with reference.in_place():
            _means_of_all(model, layers, kept, forward, targets)
            float_means = {n: m.running_mean.clone() for n, m in norms.items() if m.running_mean is not None}
        task = bar.begin("Bias correction", len(order))
        for done, (name, calls) in enumerate(order.items()):
            layer: Any = layers[name]
            if layer.bias is not None or name in norms:
                mean = ChannelMean()
                for batch in kept:
                    look_at(model, layer, calls, batch, forward, _mean_into(mean, _channels(layer)))
                shift = targets[name].value - mean.value
                if layer.bias is not None:
                    layer.bias.add_(shift.to(layer.bias.dtype))
                else:
                    running: Any = norms[name].running_mean
                    running.copy_(float_means[name] - shift.to(running.dtype))  # also where it was measured anew
                found[name] = float((shift.square().mean() / targets[name].variance.mean().clamp_min(1e-30)).sqrt())
            bar.advance(task, done + 1)
    return found


class ChannelMean:
    """Mean and variance of each channel over batches."""

    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._square: Any = 0.0
        self._count = 0

    def add(self, y: torch.Tensor, axis: int) -> None:
        """Take in an output whose channels lie along ``axis``."""
        rows = y.movedim(axis, 0).flatten(1).double()
        self._sum = self._sum + rows.sum(1)
        self._square = self._square + rows.square().sum(1)
        self._count += rows.shape[1]

    @property
    def value(self) -> torch.Tensor:
        """Mean of each channel."""
        return self._sum / self._count  # type: ignore[no-any-return]

    @property
    def variance(self) -> torch.Tensor:
        """Variance of each channel."""
        return (self._square / self._count - self.value.square()).clamp_min(0)


def norms_behind(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, forward: Forward
) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Layer -> the BatchNorm that reads its outputs, all of them and nothing else."""
    made: dict[tuple[int, int], tuple[str, torch.Tensor]] = {}  # tensors are kept, so that an id stays its own
    readers: dict[str, list[Any]] = {}
    reads: dict[Any, list[str | None]] = {}

    def out(name: str) -> Any:
        def hook(module: nn.Module, args: Any, y: torch.Tensor) -> None:
            made[id(y), version_of(y)] = name, y
            readers.setdefault(name, [])

        return hook

    def into(module: nn.Module, args: Any) -> None:
        x = args[0]
        name, tensor = made.get((id(x), version_of(x)), (None, None))
        reads.setdefault(module, []).append(name)
        if name is not None and tensor is x:
            readers[name].append(module)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [m.register_forward_hook(out(n)) for n, m in layers.items()]
    handles += [m.register_forward_pre_hook(into) for m in norms]
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    calls: dict[str, int] = {}
    for name, _ in made.values():
        calls[name] = calls.get(name, 0) + 1
    found: dict[str, nn.modules.batchnorm._BatchNorm] = {}
    for name, modules in readers.items():
        norm: Any = modules[0] if modules else None
        alone = norm is not None and set(map(id, modules)) == {id(norm)} and set(reads[norm]) == {name}
        if alone and len(modules) == calls[name] and norm.running_mean is not None:
            found[name] = norm
    return found


def _channels(layer: Any) -> int:
    return 1 - int(layer.weight.ndim)  # from the end: there may be no batch axis


def _mean_into(mean: ChannelMean, axis: int) -> Callable[[Any, torch.Tensor], None]:
    return lambda _, y: mean.add(y, axis)


def _means_of_all(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], batches: list[Any], forward: Forward,
    into: Mapping[str, ChannelMean],
) -> None:  # fmt: skip
    def hook(name: str, axis: int) -> Any:
        return lambda module, args, y: into[name].add(y, axis)

    handles = [layers[n].register_forward_hook(hook(n, _channels(layers[n]))) for n in into]
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
