"""Detections matched with objects as COCO does it, for bootstraps over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

THRESHOLDS = torch.linspace(0.5, 0.95, 10).double().numpy()  # as torchmetrics has them
_MOST = 100  # detections of a class on an image


def match_image(detections: Mapping[str, Tensor], objects: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Match one image's detections: by class, best score first, each with the object of greatest IoU that is free.

    Args:
        detections: ``boxes`` ``[D, 4]`` as corners, ``labels``, ``scores`` ``[D]``.
        objects: ``boxes``, ``labels`` and, where there are crowds, ``iscrowd``.

    Returns:
        ``label``, ``score`` ``[D]`` and ``matched`` ``[D, 10]`` (int8) at IoU 0.50, 0.55 ... 0.95: 1 an object, 0 none,
        -1 a crowd.
    """
    crowd = objects.get("iscrowd", torch.zeros_like(objects["labels"])).bool()
    labels, scores, flags = [], [], []
    for label in torch.unique(detections["labels"]).tolist():
        of_class = (detections["labels"] == label).nonzero()[:, 0]
        of_class = of_class[detections["scores"][of_class].argsort(descending=True, stable=True)][:_MOST]
        candidates = (objects["labels"] == label).nonzero()[:, 0]
        flag = torch.zeros(len(of_class), len(THRESHOLDS), dtype=torch.int8)
        if len(candidates):
            candidates = candidates[crowd[candidates].int().argsort(stable=True)]  # crowds last
            overlap = _overlap(detections["boxes"][of_class], objects["boxes"][candidates], crowd[candidates]).cpu()
            flag = _greedy(overlap, crowd[candidates].cpu())
        labels.append(torch.full((len(of_class),), label))
        scores.append(detections["scores"][of_class].cpu().float())
        flags.append(flag)
    if not labels:
        return {"label": torch.zeros(0, dtype=torch.int64), "score": torch.zeros(0),
                "matched": torch.zeros(0, len(THRESHOLDS), dtype=torch.int8)}  # fmt: skip
    return {"label": torch.cat(labels), "score": torch.cat(scores), "matched": torch.cat(flags)}


def objects_of(objects: Mapping[str, Tensor]) -> Tensor:
    """How many objects of each class, up to its highest, an image holds; crowds not counted."""
    crowd = objects.get("iscrowd", torch.zeros_like(objects["labels"])).bool()
    return torch.bincount(objects["labels"][~crowd].cpu())


def join(matches: Sequence[Mapping[str, Tensor]], objects: Sequence[Tensor]) -> dict[str, Tensor]:
    """All images in one table: ``image``, ``label``, ``score``, ``matched`` by detection, ``objects`` by image."""
    image = torch.cat([torch.full((len(m["label"]),), i, dtype=torch.int32) for i, m in enumerate(matches)])
    out = {k: torch.cat([m[k] for m in matches]) for k in ("label", "score", "matched")}
    classes = max(len(o) for o in objects)
    padded = [torch.nn.functional.pad(o, (0, classes - len(o))) for o in objects]
    return {"image": image, **out, "objects": torch.stack(padded)}


def _overlap(detections: Tensor, objects: Tensor, crowd: Tensor) -> Tensor:
    from torchvision.ops import box_iou

    iou: Tensor = box_iou(detections, objects)
    if bool(crowd.any()):  # the share of the detection that lies in the crowd
        low, high = (
            torch.maximum(detections[:, None, :2], objects[:, :2]),
            torch.minimum(detections[:, None, 2:], objects[:, 2:]),
        )
        area = (detections[:, 2:] - detections[:, :2]).prod(1, keepdim=True)
        iou = torch.where(crowd, (high - low).clamp(min=0).prod(2) / area, iou)
    return iou


def _greedy(overlap: Tensor, crowd: Tensor) -> Tensor:
    """``[D, T]`` flags; rows of ``overlap`` ``[D, O]`` by falling score, columns with crowds last."""
    table, real = overlap.double().numpy(), int((~crowd).sum())
    flags = np.zeros((len(table), len(THRESHOLDS)), dtype=np.int8)
    free = np.ones((len(THRESHOLDS), real), dtype=bool)
    every = np.arange(len(THRESHOLDS))
    for d, row in enumerate(table):
        flags[d][(row[real:, None] >= THRESHOLDS).any(0)] = -1
        if real:
            left = np.where(free, row[:real], -1.0)
            where = left.argmax(1)
            hit = left[every, where] >= THRESHOLDS
            flags[d][hit] = 1
            free[every[hit], where[hit]] = False
    return torch.from_numpy(flags)
