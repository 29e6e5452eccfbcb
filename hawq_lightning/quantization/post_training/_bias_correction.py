"""Bias correction: quantization shifts the mean of a layer's outputs, and the shift can be taken back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hawq_lightning._batches import default_forward
from hawq_lightning._batchnorm import norms_behind
from hawq_lightning._progress import progress_bar
from hawq_lightning._types import Batch
from hawq_lightning.layers import WeightReader
from hawq_lightning.quantization._modules import QuantizedWeight
from hawq_lightning.quantization.post_training._reference import (
    FloatReference,
    Forward,
    calls_in_order,
    look_at,
    prepared,
    still,
)


def bias_correction(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Forward = default_forward,
    reference: FloatReference | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Put the mean of every output channel back to what it was in the float network.

    Empirical (Nagel et al., Data-Free Quantization, ICCV 2019, section 4.2 and appendix D): layer by layer in the
    order of the network, each with the corrections before it in place. The shift goes into the layer's bias; where it
    has none, into the running mean of the BatchNorm that follows.

    Args:
        model: with quantizers enabled; biases and running means are changed in place.
        batches: a few hundred images.
        forward: runs the model on a batch.
        reference: the float network; default: the model's own present weights.
        progress: show a bar.

    Returns:
        layer -> root mean square of its shift, in standard deviations of the float outputs. Layers with neither bias
        nor a BatchNorm of their own do not appear.

    Raises:
        HawqError: no quantizer is enabled, or no batches.
    """
    layers, calibration = prepared(model, batches)
    reference = reference or FloatReference(model)
    shifts: dict[str, float] = {}
    with still(model):
        order = calls_in_order(model, layers, calibration[0], forward)
        norms = _own_norms(model, layers, calibration[0], forward)
        targets = {n: ChannelMean() for n in order}
        with reference.in_place():
            _means_of_all(model, layers, calibration, forward, targets)
            float_means = {n: m.running_mean.clone() for n, m in norms.items() if m.running_mean is not None}
        with progress_bar("Bias correction", len(order), progress) as advance:
            for done, (name, calls) in enumerate(order.items()):
                layer = layers[name]
                bias = getattr(layer.module, "bias", None)
                bias = bias if isinstance(bias, torch.Tensor) else None  # of a recurrent network: whether it has any
                if bias is not None or name in norms:
                    mean = ChannelMean()
                    for batch in calibration:
                        look_at(model, layer, calls, batch, forward, _mean_into(mean, _channels(layer)))
                    shift = targets[name].value - mean.value
                    if bias is not None:
                        bias.add_(shift.to(bias.dtype))
                    else:
                        running: Any = norms[name].running_mean
                        running.copy_(float_means[name] - shift.to(running.dtype))  # also where it was measured anew
                    shifts[name] = float(
                        (shift.square().mean() / targets[name].variance.mean().clamp_min(1e-30)).sqrt()
                    )
                advance(done + 1)
    return shifts


class ChannelMean:
    """Mean and variance of each channel over batches."""

    def __init__(self) -> None:
        self._sum = self._square = torch.zeros((), dtype=torch.float64)
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
        return self._sum / self._count

    @property
    def variance(self) -> torch.Tensor:
        """Variance of each channel."""
        return (self._square / self._count - self.value.square()).clamp_min(0)


def _own_norms(
    model: nn.Module, layers: Mapping[str, WeightReader], batch: Batch, forward: Forward
) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Layer -> the BatchNorm that reads its outputs, all of them and nothing else, and no other layer's."""
    modules = {n: layer.module for n, layer in layers.items()}
    norm_of = norms_behind(model, dict(model.named_modules()), modules, lambda: forward(model, batch))
    readers = Counter(norm_of.values())
    return {n: model.get_submodule(norm) for n, norm in norm_of.items() if readers[norm] == 1}  # type: ignore[misc]


def _channels(layer: WeightReader) -> int:
    return layer.kind.channels_from_end(layer.module)


def _mean_into(mean: ChannelMean, axis: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
    return lambda _, y: mean.add(y, axis)


def _means_of_all(
    model: nn.Module, layers: Mapping[str, QuantizedWeight], batches: Sequence[Batch], forward: Forward,
    into: Mapping[str, ChannelMean],
) -> None:  # fmt: skip
    handles = [layers[n].on_call(_mean_into(into[n], _channels(layers[n]))) for n in into]
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
