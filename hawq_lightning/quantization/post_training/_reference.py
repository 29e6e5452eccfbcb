"""The float network inside of the quantized one, and passes through both that stop at a layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, Outputs
from hawq_lightning.layers import WeightReader, forget_calls
from hawq_lightning.quantization._enabled import fake_quant_disabled, quantized_layers, quantizers
from hawq_lightning.quantization._modules import QuantizedWeight
from hawq_lightning.sensitivity import OnDevice, noisy_modules, on_device, random_states_kept

Forward = Callable[[nn.Module, Batch], Outputs]


class FloatReference:
    """Remembers a network's weights, biases and statistics, so that it can be run as it was later.

    Args:
        model: with quantizers enabled; what is changed in it afterwards does not change the reference.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        of_quantizers = {id(t) for q in quantizers(model) for t in (*q.parameters(), *q.buffers())}
        self._kept = [
            (t, t.detach().clone()) for t in (*model.parameters(), *model.buffers()) if id(t) not in of_quantizers
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model is the float network that it was."""
        present = [(t, t.data) for t, _ in self._kept]
        with fake_quant_disabled(self._model):
            try:
                for t, value in self._kept:
                    t.data = value
                yield
            finally:
                for t, value in present:
                    t.data = value


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """No gradients, no chance, no statistics gathered; modes are put back."""
    modes = [(m, m.training) for m in (*noisy_modules(model), *quantizers(model))]
    try:
        for m, _ in modes:
            m.training = False
        with torch.no_grad(), random_states_kept(0), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def prepared(model: nn.Module, batches: Iterable[Batch]) -> tuple[dict[str, QuantizedWeight], OnDevice]:
    """The layers whose quantizers are enabled, and the batches on the model's device.

    Raises:
        HawqError: no quantizer is enabled, or there are no batches.
    """
    layers = {n: m for n, m in quantized_layers(model).items() if m.weight_quantizer.bits or m.input_quantizer.bits}
    if not layers:
        raise HawqError("No quantizer of this model is enabled: call hawq_lightning.quantize(model, plan) first.")
    device = next(m.weight.device for m in layers.values())
    calibration = on_device(batches, device)
    if not len(calibration):
        raise HawqError("There are no batches to calibrate on.")
    return layers, calibration


def calls_in_order(
    model: nn.Module, layers: Mapping[str, WeightReader], batch: Batch, forward: Forward
) -> dict[str, int]:
    """Layers in the order of their first call, and how often each is called in a pass."""
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: counts.__setitem__(name, counts.get(name, 0) + 1)

    handles = [layer.on_call(hook(n)) for n, layer in layers.items()]
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return counts


class Reached(BaseException):
    """The rest of the pass is of no interest."""


def look_at(
    model: nn.Module,
    layer: WeightReader,
    calls: int,
    batch: Batch,
    forward: Forward,
    look: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """Run a batch until ``layer`` was called ``calls`` times; ``look(input, output)`` at every call."""
    seen = 0

    def record(x: torch.Tensor, output: torch.Tensor) -> None:
        nonlocal seen
        look(x, output)
        seen += 1
        if seen >= calls:
            raise Reached

    handle = layer.on_call(record)
    try:
        with contextlib.suppress(Reached):
            forward(model, batch)
    finally:
        forget_calls()
        handle.remove()
