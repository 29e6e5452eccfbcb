"""What a measurement belongs to: a hash of weights, images, loss and settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hawq_lightning._batches import parts_of
from hawq_lightning.layers import FakeQuantLayer
from hawq_lightning.sensitivity._boundary import Outputs, read_by
from hawq_lightning.sensitivity._context import MeasureContext


def fingerprint(
    setting: MeasureContext, batches: Sequence[Any], first: Any, asked: str, seed: int, images: Sequence[int]
) -> str:
    """Hash of the weights, of the drawn input tensors, of the loss of ``first`` and of the settings ``asked``."""
    digest = hashlib.sha256(f"{asked} {seed} {list(images)}".encode())
    idle = tuple(_idle_quantizers(setting.model))
    for name, value in setting.model.state_dict().items():
        if name.startswith(idle):
            continue
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for batch in batches:
        _hash_tensors(batch, digest)
    with torch.enable_grad():
        loss = check_loss_value(setting, first)
    setting.facts["loss"] = loss
    digest.update(f"{loss:.6g}".encode())
    return f"sha256:{digest.hexdigest()}"


def _idle_quantizers(model: nn.Module) -> Iterator[str]:
    # which quantizer waits in a fake-quant layer does not change its traces
    for name, layer in model.named_modules():
        if isinstance(layer, FakeQuantLayer):
            for key in [k for k in layer._modules if k.endswith("_quantizer")]:
                quantizer = getattr(layer, key)
                if not quantizer.bits or quantizer.fake_quant_disabled:
                    yield f"{name}.{key}." if name else f"{key}."


def check_loss_value(setting: MeasureContext, batch: Any) -> float:
    """The loss of a batch as a number, checked; a penalty on the weights themselves is noted."""
    weights = {id(m.weight): (name, m.weight) for name, m in setting.layers.items()}
    for _, w in weights.values():
        w.requires_grad_(True)
    try:
        with Outputs(setting.model) as outputs:
            loss = setting.loss(batch)
        if read := [weights[id(w)][0] for w in read_by(loss, outputs) if id(w) in weights]:
            more = f" and {len(read) - 3} more" if len(read) > 3 else ""
            setting.note(
                f"The loss reads the weights of {', '.join(read[:3])}{more} outside of their layers (a penalty on "
                "weights?); the curvature from there is not counted."
            )
        return float(loss.detach())
    finally:
        for _, w in weights.values():
            w.requires_grad_(False)


def _hash_tensors(batch: Any, digest: Any) -> None:
    if isinstance(batch, torch.Tensor):
        digest.update(batch.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        for value in parts_of(batch):
            _hash_tensors(value, digest)
