"""Writing model.onnx into a run folder, and saying how well it agrees with the network."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawq_lightning.cli.speeds import show, speeds
from hawq_lightning.errors import HawqError
from hawq_lightning.export import compare, network_of, to_onnx
from hawq_lightning.plan import Plan, write_text
from hawq_lightning.quantization import uninstall


class Images:
    """Image tensors as the exported network takes them; a detector's are scaled and padded first.

    Args:
        net: the whole network.
        batches: images first, with or without targets.
    """

    def __init__(self, net: nn.Module, batches: Iterable[Any]) -> None:
        self.net, self.batches = net, batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            images = batch[0] if isinstance(batch, (list, tuple)) else batch
            yield images if isinstance(images, torch.Tensor) else self.net.transform(list(images))[0].tensors  # type: ignore[operator]

    def first(self) -> torch.Tensor:
        """Two images, or the only one.

        Raises:
            HawqError: there is none.
        """
        for images in self:
            return images[:2]
        raise HawqError("The validation data is empty; there is no image to export with.")


def write_onnx(
    folder: Path,
    module: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    images: int | None = None,
    seconds: float = 0.0,
    **how: Any,
) -> dict[str, Any]:
    """Write ``model.onnx`` and ``export.json`` and print one line.

    Args:
        folder: the run folder.
        module: the quantized network, or the task around it.
        plan: that it carries.
        batches: of the validation data.
        images: compare on so many at most; 0 for none.
        seconds: also measure float, uniform 8 bits and the plan for so long each, and print their table.
        how: ``fold`` and ``exact`` of :func:`hawq_lightning.export.to_onnx`.

    Returns:
        what export.json holds.

    Raises:
        HawqError: the network cannot be exported.
    """
    net = getattr(module, "net", module)
    inner, real = network_of(net).eval(), Images(net, batches)
    deployed = to_onnx(inner, plan, real.first(), folder / "model.onnx", **how)
    record: dict[str, Any] = {
        "onnx_bytes": (folder / "model.onnx").stat().st_size,
        "folded": len(deployed.folding.folded),
        "not_folded": dict(deployed.folding.kept),
    }
    text = f"model.onnx: {record['onnx_bytes']:,} bytes"
    if images != 0:
        found = compare(inner, folder / "model.onnx", real, images=images)
        record["agreement"] = found.to_dict()
        text += f"; {found}"
    print(text)
    if seconds:
        whole = uninstall(copy.deepcopy(net)).cpu().eval()
        record |= speeds(network_of(whole), plan, real.first().cpu(), folder / "model.onnx", seconds=seconds, **how)
        show(record)
    write_text(folder / "export.json", json.dumps(record, indent=1))
    return record
