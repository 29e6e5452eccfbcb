"""COCO's detection annotations: reading and checking the JSON, and images with their boxes as a data set."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._io import read_json
from hawq_lightning._types import JsonObject
from hawq_lightning.data._image_files import read_image

LABELS = ("contiguous", "category_id")
BAD_BOXES = ("error", "fix")
TOLERANCE = 1.0  # pixels that a box may stick out of its image: annotators round


@dataclass(frozen=True)
class Picture:
    """One image and its annotations.

    Attributes:
        id: COCO's image id.
        path: of the image file.
        size: height and width in pixels, as the JSON says.
        boxes: [boxes, 4], corners x1, y1, x2, y2 in pixels.
        labels: [boxes].
        crowd: [boxes], true for regions that hold many objects.
    """

    id: int
    path: Path
    size: tuple[int, int]
    boxes: torch.Tensor
    labels: torch.Tensor
    crowd: torch.Tensor


@dataclass(frozen=True)
class Annotations:
    """All pictures of one split, and the classes' names by label."""

    pictures: tuple[Picture, ...]
    classes: dict[int, str]


def read_coco(
    path: str | Path, folder: str | Path, labels: str = "contiguous", bad_boxes: str = "error"
) -> Annotations:
    """Read an ``instances_*.json`` and check it against the image folder.

    Args:
        path: the JSON file.
        folder: where the images are.
        labels: ``contiguous`` numbers the categories 0, 1, ... by ascending id; ``category_id`` keeps COCO's ids.
        bad_boxes: ``error`` refuses boxes that leave their image or have no area; ``fix`` clips the first, drops the
            second and warns with how many there were.

    Raises:
        HawqError: not COCO's layout, an unknown image or category, a bad box, or a missing image file; each by name.
    """
    for value, options, what in ((labels, LABELS, "labels"), (bad_boxes, BAD_BOXES, "bad_boxes")):
        if value not in options:
            raise HawqError(f"{what} is {value!r}; use one of {', '.join(options)}.")
    path, folder = Path(path), Path(folder)
    if not folder.is_dir():
        raise HawqError(f"No image folder at {folder}.")
    images, annotations, categories = _tables(read_json(path, "COCO annotation file"), path)
    names = {_whole(c, "id", "category", path): str(c.get("name", c["id"])) for c in categories}
    label_of = {c: i if labels == "contiguous" else c for i, c in enumerate(sorted(names))}

    sizes: dict[int, tuple[int, int]] = {}
    files: dict[int, str] = {}
    for image in images:
        key = _whole(image, "id", "image", path)
        if key in sizes:
            raise HawqError(f"{path}: image id {key} is there twice.")
        sizes[key] = (_whole(image, "height", "image", path, 1), _whole(image, "width", "image", path, 1))
        name = image.get("file_name")
        if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise HawqError(f"{path}: image {key} has the file name {name!r}; expected a path inside {folder}.")
        files[key] = name
    _check_files(files, folder)

    rows: dict[int, list[tuple[list[float], int, bool]]] = {key: [] for key in sizes}
    bad: list[str] = []
    for entry in annotations:
        number = entry.get("id", "?")
        key, category = _whole(entry, "image_id", "annotation", path), _whole(entry, "category_id", "annotation", path)
        if key not in sizes:
            raise HawqError(f"{path}: annotation {number} is of image {key}, which is not listed.")
        if category not in names:
            raise HawqError(f"{path}: annotation {number} is of category {category}, which is not listed.")
        box, complaint = _corners(entry.get("bbox"), sizes[key], f"{path}: annotation {number} of {files[key]}")
        if complaint:
            bad.append(complaint)
        if box is not None:
            rows[key].append((box, label_of[category], bool(entry.get("iscrowd", 0))))
    if bad and bad_boxes == "error":
        raise HawqError(f"{bad[0]} ({len(bad)} such); bad_boxes=fix clips or drops them.")
    if bad:
        warnings.warn(f"{len(bad)} boxes were clipped or dropped; the first: {bad[0]}.", stacklevel=2)
    return Annotations(
        tuple(_picture(key, folder / files[key], sizes[key], rows[key]) for key in sorted(sizes)),
        {label_of[c]: name for c, name in sorted(names.items())},
    )


class CocoDataset(Dataset[tuple[torch.Tensor, dict[str, torch.Tensor]]]):
    """Images [3, height, width] in [0, 1], each of its own size, with a dict of its boxes.

    The dict holds ``boxes`` [boxes, 4] (corners, pixels of the image as returned), ``labels``, ``area``, ``iscrowd``
    and ``image_id``.

    Args:
        pictures: from :func:`read_coco`.
        augment: from image and boxes to image and boxes; draws from torch's generator.
        longest: shrink images whose longer side has more pixels than this.
        crowd: keep crowd regions: evaluation ignores what they match; training has no use for them.

    Raises:
        HawqError: on access, for an image that cannot be read or is not of the size that the JSON states.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        augment: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        longest: int | None = None,
        crowd: bool = True,
    ) -> None:
        self.pictures = pictures
        self.augment = augment
        self.longest = longest
        self.crowd = crowd

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        picture = self.pictures[index]
        image, scale = load_image(picture, self.longest)
        keep = torch.ones_like(picture.crowd) if self.crowd else ~picture.crowd
        boxes = picture.boxes[keep] * scale
        if self.augment is not None:
            image, boxes = self.augment(image, boxes)
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        return image, {
            "boxes": boxes,
            "labels": picture.labels[keep],
            "area": width * height,
            "iscrowd": picture.crowd[keep].long(),
            "image_id": torch.tensor(picture.id),
        }


def load_image(picture: Picture, longest: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode to [3, height, width] in [0, 1]; also the factors [4] that shrinking multiplies the corners with.

    Raises:
        HawqError: the file cannot be read, or its size is not the stated one (its boxes would be elsewhere).
    """
    image = read_image(picture.path)
    height, width = picture.size
    if image.size != (width, height):
        raise HawqError(
            f"The image {picture.path} is {image.size[0]}x{image.size[1]} pixels; its annotations say {width}x{height}."
        )
    scale = torch.ones(4)
    if longest is not None and max(image.size) > longest:
        factor = longest / max(image.size)
        small = max(1, round(width * factor)), max(1, round(height * factor))
        image = image.resize(small, Image.Resampling.BILINEAR)
        scale = torch.tensor([small[0] / width, small[1] / height] * 2)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float().div_(255), scale


def random_flips(
    horizontal: bool, vertical: bool
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Mirror an image and its boxes along either axis, each with probability one half (torchvision's transforms).

    Raises:
        HawqError: torchvision is missing.
    """
    v2, tensors = require("torchvision.transforms.v2"), require("torchvision.tv_tensors")
    enabled = [v2.RandomHorizontalFlip()] * horizontal + [v2.RandomVerticalFlip()] * vertical
    flips = v2.Compose(enabled or [v2.Identity()])

    def flip(image: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = (image.shape[-2], image.shape[-1])
        image, corners = flips(
            tensors.Image(image), tensors.BoundingBoxes(boxes.clone(), format="XYXY", canvas_size=size)
        )
        return image.as_subclass(torch.Tensor), corners.as_subclass(torch.Tensor)

    return flip


def _tables(raw: object, path: Path) -> tuple[list[JsonObject], ...]:
    keys = ("images", "annotations", "categories")
    if not isinstance(raw, dict):
        raise HawqError(f"{path} is not COCO's format: expected an object with {', '.join(keys)}.")
    for key in keys:
        if not isinstance(raw.get(key), list):
            raise HawqError(f"{path} is not COCO's format: it has no list {key!r}.")
        if any(not isinstance(entry, dict) for entry in raw[key]):
            raise HawqError(f"{path} is not COCO's format: an entry of {key!r} is no object.")
        if not raw[key] and key != "annotations":
            raise HawqError(f"{path}: the list {key!r} is empty.")
    return tuple(raw[key] for key in keys)


def _whole(entry: JsonObject, key: str, what: str, path: Path, least: int = 0) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise HawqError(f"{path}: {what} {entry.get('id', '?')} has {key}={value!r}; expected a whole number.")
    return value


def _check_files(files: dict[int, str], folder: Path) -> None:
    there: dict[Path, set[str]] = {}
    missing = []
    for name in files.values():
        parent = folder / Path(name).parent
        if parent not in there:
            there[parent] = set(os.listdir(parent)) if parent.is_dir() else set()
        if Path(name).name not in there[parent]:
            missing.append(name)
    if missing:
        raise HawqError(f"{len(missing)} of {len(files)} images are missing in {folder}; the first is {missing[0]}.")


def _corners(raw: object, size: tuple[int, int], what: str) -> tuple[list[float] | None, str]:
    """The box x, y, width, height as corners inside the image (None: no area), and what is wrong with it."""
    if (
        not isinstance(raw, list)
        or len(raw) != 4
        or any(isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v) for v in raw)
    ):
        raise HawqError(f"{what} has bbox={raw!r}; expected [x, y, width, height].")
    x, y, w, h = (float(v) for v in raw)
    height, width = size
    box = [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]
    if box[2] <= box[0] or box[3] <= box[1]:
        return None, f"{what} has a box without area inside the image: {raw} in {width}x{height}"
    if min(x, y) < -TOLERANCE or x + w > width + TOLERANCE or y + h > height + TOLERANCE:
        return box, f"{what} has a box that leaves the image: {raw} in {width}x{height}"
    return box, ""


def _picture(key: int, path: Path, size: tuple[int, int], rows: list[tuple[list[float], int, bool]]) -> Picture:
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([row[1] for row in rows], dtype=torch.int64)
    return Picture(key, path, size, boxes, labels, torch.tensor([row[2] for row in rows], dtype=torch.bool))
