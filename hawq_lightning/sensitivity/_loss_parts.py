"""Modules that return the loss or a part of it: the boundary between network and loss lies in front of them.

A module that owns a parameter is taken for a part of the network: most are. Loss modules own some as well: learned
centres and proxies, weights of tasks, temperatures, transition scores; and models may return their loss. The loss is
linear in what they return, and all its curvature is made inside of them, where probes at their outputs see nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hawq_lightning.sensitivity._boundary import OutputHessian
from hawq_lightning.sensitivity._second_derivative import NoSecondDerivative


@dataclass
class LossParts:
    """What was learned of the outputs of a model's modules.

    Attributes:
        modules: names of those that return a part of the loss, so that the boundary lies in front of them.
        outputs: of those that look like it and do not: in front of them there is no curvature either.
    """

    modules: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)

    def look(self, hessian: OutputHessian) -> set[str]:
        """Modules whose outputs were taken for the network's and are parts of the loss.

        A layer's output is none. Of what other modules return a number without axes is one: a network has outputs for
        every sample. So is a tensor in which the loss is linear, with slopes of one sign: a loss a sample, or a
        log-likelihood, that is averaged. L1 losses are linear too, but pull up as well as down.

        Args:
            hessian: of the loss at the boundary.
        """
        found = set()
        for i, (name, value, slope) in enumerate(zip(hessian.names, hessian.values, hessian.gradient)):
            if hessian.by_layer[i] or name in self.outputs or not bool(slope.any()):
                continue
            one_sign = bool((slope >= 0).all()) or bool((slope <= 0).all())
            if value.ndim == 0 or (one_sign and hessian.linear_in(i)):
                found.add(name)
        return found

    def step_back(self, modules: set[str]) -> None:
        """From now on the boundary lies in front of these."""
        self.modules |= modules

    def revert(self, modules: set[str]) -> None:
        """The outputs of these are the network's after all."""
        self.modules -= modules
        self.outputs |= modules


def has_curvature(hessian: OutputHessian) -> bool:
    """Whether the loss's Hessian at the boundary is anything but zero."""
    vectors = hessian.random_vectors(torch.Generator().manual_seed(0))
    try:
        return any(bool(h.any()) for h in hessian(vectors))
    except NoSecondDerivative:
        return True
