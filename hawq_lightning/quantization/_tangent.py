"""The distance to the float network near one of its quantized networks, to first order in the sites' errors.

On the way to the network of the lowest widths the distance often flattens: outputs that say nothing of the classes
cannot get much worse. Plans of few bits are such networks, and what tells them apart is the slope there, not what a
site adds on the way from the float network (path attribution), where everything still worked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from hawq_lightning._plan import Candidate
from hawq_lightning.layers import WeightReader
from hawq_lightning.quantization._forecast import Tangent
from hawq_lightning.quantization._pieces import product
from hawq_lightning.quantization._registry import QuantizerSpec
from hawq_lightning.quantization._rounding_errors import ActivationRounding, weight_errors


class SlopesOfEveryWidth:
    """Gathers, at one point of a path, the slopes of all sites along the rounding errors of all their widths.

    Args:
        at: t of the point.
        candidates: site -> one candidate a width.
        weights: site -> its weight, and the BatchNorm behind it.
        rounding: of the activation sites, in the order of their candidates.
        spec: the quantizer.

    Attributes:
        at: t of the point.
        distance: at the point.
        along_path: slope there along the errors of the path's own network, all sites together.
    """

    def __init__(
        self, at: float, candidates: Mapping[str, Sequence[Candidate]],
        weights: Mapping[str, tuple[WeightReader, nn.Module | None]], rounding: Mapping[str, ActivationRounding],
        spec: QuantizerSpec,
    ) -> None:  # fmt: skip
        self.at, self.distance, self.along_path = at, 0.0, 0.0
        self._candidates, self._weights, self._rounding, self._spec = candidates, weights, rounding, spec
        # of weights the gradient is summed, which takes their memory once, and not once a width
        self._gradients: dict[str, torch.Tensor] = {}
        self._slopes = {name: [0.0] * len(listed) for name, listed in candidates.items()}

    def of_batch(self, share: float) -> Callable[[str, torch.Tensor | None, torch.Tensor], None]:
        """What is told site, what it read (of a weight nothing), and the slope there.

        Args:
            share: of the batch in all samples.
        """

        def seen(site: str, x: torch.Tensor | None, slope: torch.Tensor) -> None:
            if x is None:
                before = self._gradients.get(site)
                self._gradients[site] = share * slope if before is None else before.add_(slope, alpha=share)
                return
            for k, along in enumerate(self._rounding[site].along(x, slope)):
                self._slopes[site][k] += share * along

        return seen

    def passed(self, share: float, distance: float, slopes: Mapping[str, float]) -> None:
        """Note what a batch came to.

        Args:
            share: of the batch in all samples.
            distance: its distance at the point.
            slopes: site -> slope along its error on the path.
        """
        self.distance += share * distance
        for slope in slopes.values():
            self.along_path += share * slope

    def tangent(self, end: float) -> Tangent | None:
        """The tangent at the point, once weights are back at their values; ``None`` if the distance does not flatten.

        Args:
            end: distance of the path's network.
        """
        # where the distance still bends upwards, own errors count that are of second order: shares know these
        if end <= 0 or self.distance + (1 - self.at) * self.along_path <= end:
            return None
        for site, gradient in self._gradients.items():
            reader, norm = self._weights[site]
            errors = weight_errors(reader, self._candidates[site], self._spec, norm)
            self._slopes[site] = [product(gradient, error) for error in errors]
        slopes = {
            name: {c.bits: slope for c, slope in zip(self._candidates[name], of_site)}
            for name, of_site in self._slopes.items()
        }
        return Tangent(self.distance - self.at * self.along_path, slopes, end)
