"""The cheapest test of the paper's claim: half of Omega against the loss change measured, site by site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._plan import Candidate, PlanSite
from hawq_lightning._progress import Bar, progress_bar
from hawq_lightning._site_table import SiteTable
from hawq_lightning.quantization._apply import enable_site
from hawq_lightning.quantization._fold import norms_to_fold
from hawq_lightning.quantization._registry import QuantizerSpec
from hawq_lightning.quantization._trial import temporarily_quantized
from hawq_lightning.sensitivity import isolated_eval, to_device

LossFn = Callable[[nn.Module, Any], torch.Tensor]


def loss_check(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFn,
    sites: SiteTable,
    options: Mapping[str, Sequence[Candidate]],
    *,
    quantizer: str | QuantizerSpec | None = None,
    batch_size_fn: Callable[[Any], int] = batch_images,
    progress: bool | Bar = False,
) -> list[dict[str, Any]]:
    """Quantize one site at a time and measure the loss.

    Args:
        model: float, or with quantizers in any state; left as it was.
        batches: the mean loss is over these.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        sites: the sites.
        options: what to try at each.
        quantizer: registered name; ``None``: the twins' own, ``uniform`` for a float model.
        batch_size_fn: number of images in a batch.
        progress: show a bar.

    Returns:
        rows ``site, kind, bits, predicted`` (half of Omega), ``measured`` (loss change).
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kept = [to_device(b, device) for b in batches]
    images = [batch_size_fn(b) for b in kept]
    norms = norms_to_fold(model, sites.layers)
    trials = [(s, o) for s in sites for o in options.get(s.name, ())]
    out: list[dict[str, Any]] = []

    def mean_loss() -> float:
        values = [float(loss_fn(model, b)) * n for b, n in zip(kept, images)]
        return sum(values) / sum(images)

    with (
        temporarily_quantized(model, quantizer) as layers,
        isolated_eval(model),
        torch.no_grad(),
        progress_bar(bool(progress)) as bar,
    ):
        base = mean_loss()
        task = bar.begin("Loss change, site by site", len(trials))
        for done, (site, option) in enumerate(trials):
            trial = PlanSite(
                site.name, site.kind, site.layers, site.shape, site.numel, option.bits, option.code,
                option.scale, option.zero_point,
            )  # fmt: skip
            for name in site.layers:
                enable_site(layers[name], trial, norms.get(name))
            measured = mean_loss() - base
            for name in site.layers:
                layer = layers[name]
                (layer.weight_quantizer if site.kind == "weight" else layer.input_quantizer).disable()
            out.append({
                "site": site.name, "kind": site.kind, "bits": option.bits,
                "predicted": option.omega / 2, "measured": measured,
            })  # fmt: skip
            bar.advance(task, done + 1)
    return out
