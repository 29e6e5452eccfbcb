"""Run somebody's loss without leaving a trace: modes, buffers, gradients and random states are put back exactly."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from hawq_lightning._fused import fused_transformers_off
from hawq_lightning._loss_graph import trainable_remembered
from hawq_lightning._recomputed import reentrant_checkpoints_replaced
from hawq_lightning._values import check_can_be_trained
from hawq_lightning.layers import quantizer_parts
from hawq_lightning.sensitivity._backward_hooks import HooksOnlyLook
from hawq_lightning.sensitivity._chance import WithoutChance
from hawq_lightning.sensitivity._held_attributes import HeldAttributes
from hawq_lightning.sensitivity._held_state import HeldNames, put_back_at_end

# what makes one image's loss depend on chance or on the other images; containers keep their mode, since detection
# models return losses, and Inception its auxiliary head, in training mode only
_NOISY = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_NOISY_NAMES = re.compile(r"StochasticDepth|Drop(Path|Block|out)|SpectralNorm", re.IGNORECASE)


def noisy_modules(model: nn.Module) -> list[nn.Module]:
    """Modules whose training mode couples images, draws random numbers, or changes a weight at every call."""
    return [m for m in model.modules() if isinstance(m, _NOISY) or any(map(_NOISY_NAMES.search, _names(m)))]


def _names(module: nn.Module) -> list[str]:
    """Of its class and of the hooks before its call: old-style spectral norm iterates there.

    A network is a container whatever it is called, as a ``DropoutUNet`` is.
    """
    children = next(module.children(), None) is not None and next(module.parameters(), None) is not None
    return [type(x).__name__ for x in (*([] if children else [module]), *module._forward_pre_hooks.values())]


class RandomStates:
    """torch's, NumPy's and Python's random states as they are now."""

    def __init__(self) -> None:
        self._cpu, self._numpy, self._python = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def moved(self) -> bool:
        """Whether anything was drawn on the CPU since."""
        (_, keys, position, *_), (_, before, there, *_) = np.random.get_state(), self._numpy
        same = position == there and np.array_equal(keys, before) and random.getstate() == self._python
        return not same or not torch.equal(torch.get_rng_state(), self._cpu)

    def put_back(self) -> None:
        """Make them what they were."""
        torch.set_rng_state(self._cpu)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


def seed_torch(seed: int) -> None:
    """``torch.manual_seed`` for devices in use alone: for others it queues seeds, which nothing would take back."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def random_states_kept(seed: int | None = None) -> Iterator[None]:
    """Put back torch's, NumPy's and Python's random states; inside they start from ``seed`` when given."""
    states = RandomStates()
    try:
        if seed is not None:
            seed_torch(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
        yield
    finally:
        states.put_back()


@contextmanager
def isolated_eval(model: nn.Module, seed: int | None = 0) -> Iterator[None]:
    """Dropout off, BatchNorm on running statistics, no parameter gathers gradients; everything is put back after.

    Args:
        model: left as it was, bit for bit, whatever happens inside.
        seed: for random draws that the loss itself makes.

    Raises:
        HawqError: lazy layers that have not run yet, or parameters made in inference mode.
    """
    check_can_be_trained(model)
    modes = [(m, m.training) for m in model.modules()]
    attributes = HeldAttributes(_without_quantizers(model))
    names = HeldNames(_without_quantizers(model))
    buffers = [(b, b.detach().clone()) for b in model.buffers() if b.layout == torch.strided]
    needs = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    remembered = ExitStack()
    remembered.enter_context(trainable_remembered(model))
    try:
        for module in noisy_modules(model):
            module.training = False
        for p, _, _ in needs:
            p.requires_grad_(False)
            p.grad = None
        # compiled modules drop hooks that come after compilation, and refuse double backward
        with (
            random_states_kept(seed),
            put_back_at_end(),  # what a loss moved, such as a teacher
            WithoutChance(),
            HooksOnlyLook(model),
            torch.compiler.set_stance("force_eager"),
            reentrant_checkpoints_replaced(),
            fused_transformers_off(),
        ):
            yield
    finally:
        attributes.put_back()
        names.put_back()
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                if buffer._version or not torch.equal(buffer, value):
                    buffer.copy_(value)
        for p, required, grad in needs:
            p.requires_grad_(required)
            p.grad = grad
        remembered.close()


def _without_quantizers(model: nn.Module) -> list[nn.Module]:
    """Modules of a model but for quantizers, which look after themselves."""
    quantizers = quantizer_parts(model)
    return [m for m in model.modules() if m not in quantizers]
