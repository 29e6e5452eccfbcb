"""COCO's mean average precision of weighted images, from matches that were made once: cheap enough to bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_RECALLS = torch.linspace(0, 1, 101).double().numpy()  # torchmetrics' thresholds, float32's rounding included


class Matches:
    """What a detector found on every image, each detection already matched with the objects.

    Args:
        table: ``image``, ``label``, ``score`` ``[D]``: of each detection; ``matched`` ``[D, T]`` at each IoU
            threshold: 1 for an object, 0 for none, -1 for one that does not count (a crowd); ``objects`` ``[N, K]``:
            how many of each class an image holds.
    """

    def __init__(self, table: Mapping[str, NDArray[Any]]) -> None:
        order = np.argsort(-table["score"], kind="stable")
        self.image, self.label = table["image"][order], table["label"][order]
        self.matched, self.objects = table["matched"][order], table["objects"]

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.objects)

    def mean_average_precision(self, weights: NDArray[np.float64]) -> float:
        """Mean over classes with objects and over IoU thresholds of the precision at 101 recalls, 0 to 1.

        Args:
            weights: how often each image counts, ``[N]``.
        """
        scores = []
        for label in range(self.objects.shape[1]):
            total = float(weights @ self.objects[:, label])
            if total == 0:
                continue
            of_class = self.label == label
            count = weights[self.image[of_class], None]
            hits = np.cumsum(count * (self.matched[of_class] == 1), axis=0)
            misses = np.cumsum(count * (self.matched[of_class] == 0), axis=0)
            scores.append([_average(hits[:, t], misses[:, t], total) for t in range(self.matched.shape[1])])
        return float(np.mean(scores)) if scores else 0.0


def _average(hits: NDArray[np.float64], misses: NDArray[np.float64], total: float) -> float:
    if not len(hits):
        return 0.0
    recall = hits / total
    precision = hits / np.maximum(hits + misses, np.finfo(float).eps)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    at = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.where(at < len(best), best[np.minimum(at, len(best) - 1)], 0.0).mean())
