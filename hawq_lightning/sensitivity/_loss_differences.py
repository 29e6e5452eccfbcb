"""The loss's Hessian at the outputs by differences of gradients, where autograd has no second derivative of the loss.

CTC, margin losses and functions of the user's own have gradients alone. The loss is computed again with the outputs
moved a little to both sides; twice, by a whole and by half a step: a product that depends on the step is that of a kink
or of rounding, and counts as zero, as it does where autograd differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hawq_lightning.sensitivity._boundary import OutputHessian, Outputs, wide
from hawq_lightning.sensitivity._second_derivative import NoSecondDerivative, own_functions

Slopes = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
"""The loss's gradient at other outputs than the network's."""

_STEP = 3e-3  # of the outputs' size, 1 at the most: float32 gradients lose five digits of eight, differences two
_SAME = 0.1  # share by which products of the two steps may differ


class DifferenceHessian(OutputHessian):
    """As :class:`OutputHessian`, by central differences: four evaluations of the loss a product.

    Args:
        loss: scalar.
        outputs: the recorder of the forward pass.
        boundary: numbers from :func:`find_boundary`.
        slopes: the loss's gradient at other outputs.
    """

    twice = False
    dense_outputs = 4

    def __init__(self, loss: torch.Tensor, outputs: Outputs, boundary: Sequence[int], slopes: Slopes) -> None:
        super().__init__(loss, outputs, boundary)
        self._slopes, self.linear = slopes, False

    def linear_in(self, number: int) -> bool:
        """Not known."""
        return False

    def __call__(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """H v."""
        return difference_product(self.in_output_dtypes(self.values), self.in_output_dtypes(vectors), self._slopes)


def difference_product(
    values: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor], slopes: Slopes
) -> list[torch.Tensor]:
    """The Hessian times ``vectors``, one tensor for each of ``values``, in float32 at least."""
    largest = max((float(v.abs().max()) for v in vectors if v.numel()), default=0.0)
    if largest == 0:
        return [torch.zeros_like(wide(v)) for v in values]
    count = sum(v.numel() for v in values)
    size = (sum(float(v.double().square().sum()) for v in values) / count) ** 0.5
    step = _STEP * max(min(size, 1.0), 0.1 * size) / largest if size else _STEP / largest
    whole, half = (_central(values, vectors, slopes, t) for t in (step, step / 2))
    kept = []
    for a, b in zip(whole, half):
        same = (a - b).abs() <= _SAME * torch.maximum(a.abs(), b.abs())
        kept.append(torch.where(same, (4 * b - a) / 3, 0.0))  # Richardson: errors of the fourth order
    return kept


def _central(
    values: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor], slopes: Slopes, step: float
) -> list[torch.Tensor]:
    sides = [slopes([x + sign * step * v for x, v in zip(values, vectors)]) for sign in (1, -1)]
    return [(wide(a) - wide(b)) / (2 * step) for a, b in zip(*sides)]


def check_second_derivative(hessian: OutputHessian, loss: torch.Tensor, slopes: Slopes) -> None:
    """Try a product, and against differences where functions of the user's own are on the way.

    Such a function may give autograd a gradient that it takes for a constant, and nothing says so.

    Args:
        hessian: by autograd.
        loss: scalar.
        slopes: its gradient at other outputs.

    Raises:
        NoSecondDerivative: there is none, or a function hides it.
    """
    vectors = hessian.random_vectors(torch.Generator().manual_seed(0))
    products = hessian(vectors)
    if functions := own_functions(loss, hessian.edges):
        others = difference_product(hessian.in_output_dtypes(hessian.values), hessian.in_output_dtypes(vectors), slopes)
        apart = sum(float((a - b).double().square().sum()) for a, b in zip(products, others))
        if apart > _SAME**2 * sum(float(b.double().square().sum()) for b in others):
            names = ", ".join(dict.fromkeys(f.__name__ for f in functions))
            raise NoSecondDerivative(f"{names}, whose gradient autograd takes for a constant")
