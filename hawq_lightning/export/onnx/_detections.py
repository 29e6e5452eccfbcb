"""From the scores and boxes of an exported RetinaNet to finished detections, as torchvision's own detector ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.export.onnx._session import integer_kernels, session


def detections(
    scores: torch.Tensor,
    boxes: torch.Tensor,
    levels: Sequence[int] = (),
    *,
    least_score: float = 0.05,
    candidates: int = 1000,
    overlap: float = 0.5,
    most: int = 300,
) -> dict[str, torch.Tensor]:
    """Keep the good boxes of one image and drop those that overlap a better one of their class.

    Args:
        scores: of every anchor and class, 0 to 1, ``[A, K]``.
        boxes: corners of every anchor's box in pixels, ``[A, 4]``.
        levels: anchors of each pyramid level, in order, summing to A; none: all are one level.
        least_score: boxes of lower scores are dropped.
        candidates: best boxes of each level that stay.
        overlap: IoU above which the worse of two boxes of a class is dropped.
        most: boxes that stay at last.

    Returns:
        ``boxes`` ``[D, 4]``, ``scores`` ``[D]`` and ``labels`` ``[D]``, best first.

    Raises:
        HawqError: torchvision is missing, or ``levels`` do not sum to A.
    """
    batched_nms = require("torchvision.ops").batched_nms
    levels = list(levels) or [len(scores)]
    if sum(levels) != len(scores):
        raise HawqError(f"The levels have {sum(levels):,} anchors, the scores {len(scores):,}.")
    of_levels: list[tuple[torch.Tensor, ...]] = []
    for level_scores, corners in zip(scores.split(levels), boxes.split(levels)):
        flat = level_scores.flatten()
        above = torch.where(flat > least_score)[0]
        best, order = flat[above].topk(min(candidates, len(above)))
        anchor, label = above[order] // scores.shape[1], above[order] % scores.shape[1]
        of_levels.append((corners[anchor], best, label))
    corners, best, label = (torch.cat(parts) for parts in zip(*of_levels))
    remaining = batched_nms(corners, best, label, overlap)[:most]
    return {"boxes": corners[remaining], "scores": best[remaining], "labels": label[remaining]}


class OnnxDetector(nn.Module):
    """A RetinaNet whose network runs in onnxruntime; resizing before it and suppression after it are its own.

    Args:
        detector: torchvision's RetinaNet that was exported, for its settings.
        path: the file that :func:`hawq_lightning.export.to_onnx` wrote of it.

    Raises:
        HawqError: the extra ``export`` is missing, or onnxruntime cannot run the file.
    """

    def __init__(self, detector: Any, path: str | Path) -> None:
        super().__init__()
        self.detector = detector
        self._session = session(path, integers=integer_kernels(path))
        self._levels: dict[tuple[int, ...], list[int]] = {}

    @torch.no_grad()
    def forward(self, images: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Detections of each image, ``[3, H, W]`` in [0, 1], in its own pixels.

        Raises:
            HawqError: after scaling the images are of another size than the file's.
        """
        net = self.detector
        scaled, _ = net.transform(list(images))
        pixels: np.ndarray = scaled.tensors.cpu().numpy()
        takes = self._session.get_inputs()[0]
        if tuple(takes.shape[1:]) != pixels.shape[1:]:
            expected, actual = ("x".join(map(str, shape[-2:])) for shape in (takes.shape, pixels.shape))
            raise HawqError(f"The file takes images of {expected} pixels; after scaling these have {actual}.")
        scores, boxes = map(torch.from_numpy, self._session.run(None, {takes.name: pixels}))
        levels = self._anchors(scaled.tensors)
        detected = []
        for each, corners, (height, width) in zip(scores, boxes, scaled.image_sizes):
            inside = torch.stack([corners[:, 0::2].clamp(0, width), corners[:, 1::2].clamp(0, height)], -1).flatten(1)
            detected.append(
                detections(
                    each, inside, levels, least_score=net.score_thresh, candidates=net.topk_candidates,
                    overlap=net.nms_thresh, most=net.detections_per_img,
                )
            )  # fmt: skip
        in_pixels: list[dict[str, torch.Tensor]]
        in_pixels = net.transform.postprocess(detected, scaled.image_sizes, [tuple(i.shape[-2:]) for i in images])
        return in_pixels

    def _anchors(self, images: torch.Tensor) -> list[int]:
        """Anchors of each level, which only the backbone knows."""
        shape = tuple(images.shape[1:])
        if shape not in self._levels:
            features = self.detector.backbone(images[:1]).values()
            each = self.detector.anchor_generator.num_anchors_per_location()
            self._levels[shape] = [f.shape[-2] * f.shape[-1] * n for f, n in zip(features, each)]
        return self._levels[shape]
