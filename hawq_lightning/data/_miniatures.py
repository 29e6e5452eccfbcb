"""Small data sets in the real formats: an ImageNet-like folder of JPEGs and a COCO folder, drawn, not downloaded.

Each class is a shape, so a network can learn them; sizes vary, and a few files are grey or CMYK as in ImageNet.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from hawq_lightning._errors import HawqError

SHAPES = ("disc", "square", "triangle", "ring", "cross", "diamond", "bars", "star")
COCO_IDS = (1, 3, 17, 44, 62, 70, 85, 90)  # with gaps, as COCO's own


def write_image_folder(
    root: str | Path, classes: int = 4, train: int = 8, val: int = 4, size: int = 64, seed: int = 0
) -> Path:
    """Write ``root/train`` and ``root/val`` with one folder of JPEGs a class; a finished folder is left as it is.

    Args:
        root: made if it is not there.
        classes: 2 to 8.
        train: images a class.
        val: images a class.
        size: short side in pixels, about; sides vary by up to a half.
        seed: of all that is drawn.

    Returns:
        ``root``.

    Raises:
        HawqError: a number out of range, or ``root`` cannot be written.
    """
    _check(classes, train, val, size)

    def fill(folder: Path) -> None:
        for split, count in (("train", train), ("val", val)):
            for label in range(classes):
                place = folder / split / f"n{label + 1:08d}"
                place.mkdir(parents=True)
                for number in range(count):
                    draw = random.Random(f"{seed} {split} {label} {number}")
                    image = _background(draw, size)
                    _shape(image, label, _box(draw, image.size, 0.5, 0.9), draw)
                    _save(image, place / f"{place.name}_{number}.JPEG", number)

    return _once(Path(root).expanduser(), fill, f"images {classes} {train} {val} {size} {seed}")


def write_coco(
    root: str | Path, classes: int = 3, train: int = 16, val: int = 8, size: int = 96, seed: int = 0
) -> Path:
    """Write ``train2017``, ``val2017`` and ``annotations/instances_*.json``; a finished folder is left as it is.

    One image has no object and one annotation is a crowd, as in COCO.

    Args:
        root: made if it is not there.
        classes: 2 to 8; category ids have gaps.
        train: images.
        val: images.
        size: short side in pixels, about.
        seed: of all that is drawn.

    Returns:
        ``root``.

    Raises:
        HawqError: a number out of range, or ``root`` cannot be written.
    """
    _check(classes, train, val, size)
    categories = [{"id": COCO_IDS[c], "name": SHAPES[c], "supercategory": "shape"} for c in range(classes)]

    def fill(folder: Path) -> None:
        (folder / "annotations").mkdir()
        for split, count in (("train2017", train), ("val2017", val)):
            (folder / split).mkdir()
            images: list[dict[str, object]] = []
            annotations: list[dict[str, object]] = []
            for number in range(count):
                draw = random.Random(f"{seed} {split} {number}")
                image = _background(draw, size)
                name = f"{number + 1:012d}.jpg"
                images.append({"id": number + 1, "file_name": name, "width": image.width, "height": image.height})
                for _ in range(draw.randint(1, 3) if number != 1 else 0):
                    label = draw.randrange(classes)
                    box = _box(draw, image.size, 0.25, 0.5)
                    _shape(image, label, box, draw)
                    annotations.append(_annotation(len(annotations) + 1, number + 1, label, box, crowd=0))
                if number == 2:
                    box = _box(draw, image.size, 0.2, 0.3)
                    annotations.append(_annotation(len(annotations) + 1, number + 1, 0, box, crowd=1))
                _save(image, folder / split / name, number)
            body = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(body), encoding="utf-8")

    return _once(Path(root).expanduser(), fill, f"coco {classes} {train} {val} {size} {seed}")


def _check(classes: int, train: int, val: int, size: int) -> None:
    for name, value, low, high in (
        ("classes", classes, 2, len(SHAPES)),
        ("train", train, 1, 10_000),
        ("val", val, 1, 10_000),
        ("size", size, 16, 1024),
    ):
        if not low <= value <= high:
            raise HawqError(f"{name}={value} is out of range ({low} to {high}).")


def _once(root: Path, fill: Callable[[Path], None], recipe: str) -> Path:
    """Fill a folder beside ``root`` and rename it, so that parallel jobs and a crash leave whole folders only."""
    stamp = root / "miniature.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe:
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise HawqError(f"{root} holds something else than this miniature; give another folder.")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    except OSError as error:
        raise HawqError(f"{root} cannot be written: {error}.") from error
    try:
        fill(made)
        (made / stamp.name).write_text(recipe, encoding="utf-8")
        made.chmod(0o755)
        os.replace(made, root)
    except OSError as error:
        if not stamp.is_file():  # else another job was faster
            raise HawqError(f"{root} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return root


def _background(draw: random.Random, size: int) -> Image.Image:
    width, height = size + draw.randrange(size // 2 + 1), size + draw.randrange(size // 2 + 1)
    coarse = Image.frombytes("RGB", (8, 8), bytes(draw.randrange(40, 216) for _ in range(192)))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _box(draw: random.Random, size: tuple[int, int], low: float, high: float) -> tuple[int, int, int, int]:
    side = max(6, int(min(size) * draw.uniform(low, high)))
    x, y = draw.randint(0, size[0] - side), draw.randint(0, size[1] - side)
    return x, y, x + side, y + side


def _shape(image: Image.Image, label: int, box: tuple[int, int, int, int], draw: random.Random) -> None:
    pen = ImageDraw.Draw(image)
    colour = tuple(
        draw.choice((0, 255)) if channel != label % 3 else 255 - 255 * (label // 3 % 2) for channel in range(3)
    )
    x0, y0, x1, y1 = box[0], box[1], box[2] - 1, box[3] - 1
    cx, cy, radius = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
    thick = max(2, int(radius / 2))
    match SHAPES[label]:
        case "disc":
            pen.ellipse((x0, y0, x1, y1), fill=colour)
        case "square":
            pen.rectangle((x0, y0, x1, y1), fill=colour)
        case "triangle":
            pen.polygon([(x0, y1), (x1, y1), (cx, y0)], fill=colour)
        case "ring":
            pen.ellipse((x0, y0, x1, y1), outline=colour, width=thick)
        case "cross":
            pen.rectangle((cx - thick / 2, y0, cx + thick / 2, y1), fill=colour)
            pen.rectangle((x0, cy - thick / 2, x1, cy + thick / 2), fill=colour)
        case "diamond":
            pen.polygon([(cx, y0), (x1, cy), (cx, y1), (x0, cy)], fill=colour)
        case "bars":
            pen.rectangle((x0, y0, x0 + thick, y1), fill=colour)
            pen.rectangle((x1 - thick, y0, x1, y1), fill=colour)
        case "star":
            spokes = [(radius if k % 2 == 0 else radius / 2.5, math.pi * (k / 5 - 0.5)) for k in range(10)]
            pen.polygon([(cx + r * math.cos(a), cy + r * math.sin(a)) for r, a in spokes], fill=colour)


def _annotation(number: int, image: int, label: int, box: tuple[int, int, int, int], crowd: int) -> dict[str, object]:
    x0, y0, x1, y1 = box
    return {
        "id": number,
        "image_id": image,
        "category_id": COCO_IDS[label],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "iscrowd": crowd,
    }


def _save(image: Image.Image, path: Path, number: int) -> None:
    mode = {3: "L", 5: "CMYK"}.get(number, "RGB")
    image.convert(mode).save(path, "JPEG", quality=92)
