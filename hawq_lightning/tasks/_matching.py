"""Detections matched with objects as COCO does it, for bootstraps over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

THRESHOLDS = torch.linspace(0.5, 0.95, 10).double().numpy()  # as torchmetrics has them
_MOST = 100  # detections of a class on an image


def match_image(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Match one image's detections: by class, best score first, each with the object of greatest IoU that is free.

    Args:
        found: ``boxes`` ``[D, 4]`` as corners, ``labels``, ``scores`` ``[D]``.
        wanted: ``boxes``, ``labels`` and, where there are crowds, ``iscrowd``.

    Returns:
        ``label``, ``score`` ``[D]`` and ``matched`` ``[D, 10]`` (int8) at IoU 0.50, 0.55 ... 0.95: 1 an object, 0 none,
        -1 a crowd.
    """
    crowd = wanted.get("iscrowd", torch.zeros_like(wanted["labels"])).bool()
    labels, scores, flags = [], [], []
    for label in torch.unique(found["labels"]).tolist():
        mine = (found["labels"] == label).nonzero()[:, 0]
        mine = mine[found["scores"][mine].argsort(descending=True, stable=True)][:_MOST]
        theirs = (wanted["labels"] == label).nonzero()[:, 0]
        flag = torch.zeros(len(mine), len(THRESHOLDS), dtype=torch.int8)
        if len(theirs):
            theirs = theirs[crowd[theirs].int().argsort(stable=True)]  # crowds last
            overlap = _overlap(found["boxes"][mine], wanted["boxes"][theirs], crowd[theirs]).cpu()
            flag = _greedy(overlap, crowd[theirs].cpu())
        labels.append(torch.full((len(mine),), label))
        scores.append(found["scores"][mine].cpu().float())
        flags.append(flag)
    if not labels:
        return {"label": torch.zeros(0, dtype=torch.int64), "score": torch.zeros(0),
                "matched": torch.zeros(0, len(THRESHOLDS), dtype=torch.int8)}  # fmt: skip
    return {"label": torch.cat(labels), "score": torch.cat(scores), "matched": torch.cat(flags)}


def objects_of(wanted: Mapping[str, Tensor]) -> Tensor:
    """How many objects of each class, up to its highest, an image holds; crowds not counted."""
    crowd = wanted.get("iscrowd", torch.zeros_like(wanted["labels"])).bool()
    return torch.bincount(wanted["labels"][~crowd].cpu())


def join(matches: Sequence[Mapping[str, Tensor]], objects: Sequence[Tensor]) -> dict[str, Tensor]:
    """All images in one table: ``image``, ``label``, ``score``, ``matched`` by detection, ``objects`` by image."""
    image = torch.cat([torch.full((len(m["label"]),), i, dtype=torch.int32) for i, m in enumerate(matches)])
    out = {k: torch.cat([m[k] for m in matches]) for k in ("label", "score", "matched")}
    classes = max(len(o) for o in objects)
    padded = [torch.nn.functional.pad(o, (0, classes - len(o))) for o in objects]
    return {"image": image, **out, "objects": torch.stack(padded)}


def _overlap(mine: Tensor, theirs: Tensor, crowd: Tensor) -> Tensor:
    from torchvision.ops import box_iou

    iou: Tensor = box_iou(mine, theirs)
    if bool(crowd.any()):  # the share of the detection that lies in the crowd
        low, high = torch.maximum(mine[:, None, :2], theirs[:, :2]), torch.minimum(mine[:, None, 2:], theirs[:, 2:])
        area = (mine[:, 2:] - mine[:, :2]).prod(1, keepdim=True)
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
