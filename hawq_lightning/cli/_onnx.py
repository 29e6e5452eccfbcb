"""Writing model.onnx into a run folder, and saying how well it agrees with the network."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._io import json_text, write_text
from hawq_lightning._plan import Plan
from hawq_lightning._types import Batch, JsonObject
from hawq_lightning.cli._calibration import IMAGES
from hawq_lightning.cli._speeds import show, speeds
from hawq_lightning.export import EXPORTERS, Deployed, export, network_of
from hawq_lightning.layers import deep_copy
from hawq_lightning.quantization import unquantize

ONNX, INTEGER = EXPORTERS["onnx"], EXPORTERS["onnx_integer"]
FILE, INTEGER_FILE = f"model{ONNX.suffix}", f"model{INTEGER.suffix}"


class Images:
    """Image tensors as the exported network takes them; a detector's are scaled and padded first.

    A file holds one height and width, those of :meth:`first`; batches of another size are left out and counted.

    Args:
        net: the whole network.
        batches: images first, with or without targets.
        free_batch: a file of them takes any number at a time; else as many as the first batch holds.
        size: of an image, where it is known already.
    """

    def __init__(
        self, net: nn.Module, batches: Iterable[Batch], free_batch: bool = True, size: torch.Size | None = None
    ) -> None:
        self.net, self.batches, self.free_batch = net, batches, free_batch
        self.size = size
        self.left_out = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.left_out = 0
        for batch in self.batches:
            images = batch[0] if isinstance(batch, (list, tuple)) else batch
            x = images if isinstance(images, torch.Tensor) else self.net.transform(list(images))[0].tensors  # type: ignore[operator]
            if self.size is None or x.shape[1:] == self.size:
                yield x
            else:
                self.left_out += len(x)

    def first(self) -> torch.Tensor:
        """Two images, or the only one; without a free batch the whole of the first batch.

        Raises:
            HawqError: there is none.
        """
        for images in self:
            self.size = images.shape[1:]
            return images[:2] if self.free_batch else images
        raise HawqError("The validation data is empty; there is no image to export with.")


def write_onnx(
    folder: Path,
    module: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    images: int | None = None,
    seconds: float = 0.0,
    score: bool = False,
    integer: bool = True,
    calibration: Iterable[Batch] | None = None,
    seven_bits: bool = False,
    **how: object,
) -> JsonObject:
    """Write ``model.onnx`` and ``export.json``, and print one line.

    Args:
        folder: the run folder.
        module: the quantized network, or the task around it.
        plan: that it carries.
        batches: of the validation data.
        images: compare on so many at most; 0 for none.
        seconds: also measure float, uniform 8 bits and the plan for so long each, and print their table.
        score: of a RetinaNet, also measure mAP of the file and of the network.
        integer: also write ``model.integer.onnx``, for integer kernels.
        calibration: of training data, for the integer file's grids that the network lacks; ``None``: ``batches``.
        seven_bits: hold its 8-bit weights by 7 bits.
        how: options of the exporter: ``fold``, ``exact``, ``storage``, ``free_batch``, ``free_size``.

    Returns:
        what export.json holds.

    Raises:
        HawqError: the network cannot be exported.
    """
    net = getattr(module, "net", module)
    inner, real = network_of(net).eval(), Images(net, batches, bool(how.get("free_batch", True)))
    path = folder / FILE
    deployed = export(inner, plan, path, ONNX.name, example_input=real.first(), **how)
    assert isinstance(deployed, Deployed)
    record: JsonObject = {
        "onnx_bytes": path.stat().st_size,
        "folded": len(deployed.folding.folded),
        "not_folded": dict(deployed.folding.kept),
    }
    text = f"{FILE}: {record['onnx_bytes']:,} bytes"
    if images != 0 and ONNX.verify is not None:
        agreement = ONNX.verify(inner, path, real, images)
        record["agreement"] = agreement.to_dict() | ({"left_out": real.left_out} if real.left_out else {})
        text += f"; {agreement}"
        if real.left_out:
            text += f"; {real.left_out} images of another size than {tuple(real.size or ())[1:]} left out"
    print(text)
    if integer:
        seen = real if calibration is None else Images(net, calibration, real.free_batch, real.size)
        record["integer"] = _write_integer(
            folder / INTEGER_FILE, inner, plan, real, seen, images, {**how, "seven_bits": seven_bits}
        )
    if score and real.free_batch and images != 0 and getattr(inner, "boxes", None) is not None and not real.left_out:
        record["map"] = mean_average_precision(net, path, batches, images)
        print("mAP " + ", ".join(f"{k} {v:.4f}" for k, v in record["map"].items() if k != "images"))
    if seconds:
        whole = unquantize(deep_copy(net)).cpu().eval()
        fast = folder / INTEGER_FILE if integer else None
        record |= speeds(network_of(whole), plan, real.first().cpu(), path, integer=fast, seconds=seconds, how=how)
        show(record)
    write_text(folder / "export.json", json_text(record, indent=1))
    return record


def _write_integer(
    path: Path, net: nn.Module, plan: Plan, real: Images, seen: Images, images: int | None, how: Mapping[str, object]
) -> JsonObject:
    taken = ("fold", "free_batch", "free_size", "seven_bits")
    options = {k: v for k, v in how.items() if k in taken or (k, v) == ("storage", "int8")}
    first = real.first()
    deployed = export(net, plan, path, INTEGER.name, example_input=first, calibration=_some(seen), **options)
    assert isinstance(deployed, Deployed)
    record: JsonObject = {
        "bytes": path.stat().st_size,
        "grids": deployed.grids,
        "still_float": dict(deployed.still_float),
    }
    text = f"{path.name}: {record['bytes']:,} bytes"
    if images != 0 and INTEGER.verify is not None:
        agreement = INTEGER.verify(net, path, real, images)
        record["agreement"] = agreement.to_dict()
        text += f"; {agreement}"
    if deployed.narrowed:
        record["narrowed"] = list(deployed.narrowed)
        text += f"; {len(deployed.narrowed)} weights of 8 bits have 7"
    if left := record["still_float"]:
        text += f"; {len(left)} products stay float ({next(iter(left.values()))})"
    print(text)
    return record


def _some(real: Images) -> Iterator[torch.Tensor]:
    count = 0
    for x in real:
        if count >= IMAGES:
            break
        yield x
        count += len(x)


@torch.no_grad()
def mean_average_precision(
    net: nn.Module, path: Path, batches: Iterable[Batch], images: int | None = None
) -> dict[str, float]:
    """COCO's mAP of a RetinaNet and of its file, over the same images.

    Args:
        net: the quantized detector.
        path: of its ONNX file.
        batches: images and targets, all scaled to the file's size.
        images: stop after so many.

    Raises:
        HawqError: the package that computes mAP is missing.
    """
    require("faster_coco_eval")
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # it prints tables
    from torchmetrics.detection import MeanAveragePrecision

    from hawq_lightning.export.onnx import OnnxDetector

    runs = {"network": net.eval(), "onnx": OnnxDetector(net, path)}
    metrics = {k: MeanAveragePrecision(backend="faster_coco_eval") for k in runs}
    count = 0
    for pictures, targets in batches:
        left = len(pictures) if images is None else images - count
        for k, run in runs.items():
            metrics[k].warn_on_many_detections = False
            objects = [{n: t[n] for n in ("boxes", "labels", "iscrowd", "area") if n in t} for t in targets[:left]]
            metrics[k].update(run(list(pictures[:left])), objects)
        count += min(left, len(pictures))
        if images is not None and count >= images:
            break
    return {"images": count} | {k: max(0.0, float(m.compute()["map"])) for k, m in metrics.items()}
