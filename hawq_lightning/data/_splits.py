"""Fixed parts of a training split: images apart for tuning, and a subset to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hawq_lightning._errors import HawqError

EvaluateOn = Literal["val", "held_out"]
Labelled = Sequence[tuple[Path, int]]


@dataclass(frozen=True)
class Parts:
    """Which part of the training split is trained on, and what is evaluated on.

    Attributes:
        held_out: images of the training split that are set apart.
        train_subset: train on this many of the others; ``None``: on all.
        evaluate_on: ``val`` or ``held_out``.
        seed: of the draws.

    Raises:
        HawqError: numbers out of range, or another name.
    """

    held_out: int = 0
    train_subset: int | None = None
    evaluate_on: EvaluateOn = "val"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.evaluate_on not in ("val", "held_out"):
            raise HawqError(f"data.evaluate_on={self.evaluate_on!r} is unknown; use val or held_out.")
        if self.held_out < (self.evaluate_on == "held_out"):
            raise HawqError(f"data.held_out={self.held_out} must be 0 or more, and at least 1 to evaluate on it.")
        if self.train_subset is not None and self.train_subset < 1:
            raise HawqError(f"data.train_subset={self.train_subset} must be at least 1.")

    def of(self, splits: Mapping[str, Labelled]) -> dict[str, Labelled]:
        """``train`` and ``val`` of the files with their labels, cut by these settings."""
        train, val = splits["train"], splits["val"]
        if not self.held_out and self.train_subset is None:
            return {"train": train, "val": val}
        labels = np.asarray([label for _, label in train])
        apart, trained_on = stratified(labels, self.held_out, self.train_subset, self.seed)
        if self.evaluate_on == "held_out":
            val = [train[i] for i in apart]
        return {"train": [train[i] for i in trained_on], "val": val}


def stratified(
    labels: NDArray[np.int64], held_out: int, subset: int | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two disjoint sets of images, each with every class in its share (rounded to whole images).

    What is held out depends on ``held_out`` and ``seed`` alone, not on ``subset``.

    Args:
        labels: of all images, ``[N]``.
        held_out: images in the first set.
        subset: images in the second set; ``None``: all others.
        seed: of the draw.

    Returns:
        ascending indices of both.

    Raises:
        HawqError: more images asked for than there are.
    """
    count = len(labels)
    taken = count - held_out if subset is None else subset
    if held_out + taken > count or held_out >= count:
        raise HawqError(
            f"data.held_out={held_out} and data.train_subset={subset} need {held_out + (subset or 1)} images; the "
            f"training split has {count}."
        )
    # in this order every stretch holds the classes in their shares
    rank = np.empty(count)
    draw = np.random.default_rng(seed)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        rank[draw.permutation(of_class)] = (np.arange(len(of_class)) + 0.5) / len(of_class)
    order = np.argsort(rank, kind="stable")
    return np.sort(order[:held_out]), np.sort(order[held_out : held_out + taken])
