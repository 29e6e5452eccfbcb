"""Widths of weights: perturbation ||Q(W) - W||^2 and Omega = mean trace times that (eq. 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import nn

from hawq_lightning._config import CodeFormat, QuantizerConfig, check_bits
from hawq_lightning._errors import HawqError, choice
from hawq_lightning._plan import Candidate
from hawq_lightning._progress import progress_bar
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import quantizable_layers
from hawq_lightning.quantization._fold import norms_to_fold
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named


def weight_code_formats(bits: int, code_format: CodeFormat = "auto") -> tuple[str, ...]:
    """Code formats to try at a width: 1 bit is sign times scale; at 2 bits the better of both; integers above.

    Raises:
        HawqError: an unknown format.
    """
    choice("code_format", code_format, get_args(CodeFormat))
    if bits == 1:
        return ("midrise",)
    if code_format != "auto":
        return (code_format,)
    return ("affine", "midrise") if bits == 2 else ("affine",)


def weight_candidates(
    weight: torch.Tensor,
    axis: int,
    widths: Sequence[int],
    mean_trace: float,
    code_format: CodeFormat = "auto",
    quantizer: str | QuantizerSpec = "uniform",
    norm: nn.Module | None = None,
) -> tuple[Candidate, ...]:
    """One candidate a width; Omega is ``mean_trace * ||Q(W) - W||^2``.

    Args:
        weight: of any shape.
        axis: of its output channels.
        widths: ascending.
        mean_trace: of the site, >= 0.
        code_format: ``auto``, ``affine`` or ``midrise`` for 2 bits and more.
        quantizer: registered name, or what :func:`quantizer_named` returned.
        norm: the BatchNorm behind the layer, for quantizers that fold it while training.

    Raises:
        HawqError: a quantizer without such codes, or NaN in the weight.
    """
    spec = quantizer_named(quantizer)
    q = spec.weight_quantizer(weight.shape[axis], axis).to(weight.device)
    q.fold(norm)
    out = []
    for bits in widths:
        offered = q.code_formats(bits)
        formats = [k for k in weight_code_formats(bits, code_format) if k in offered]
        if not formats and code_format != "auto" and bits > 1:
            raise HawqError(
                f"Quantizer {spec.name!r} has no {code_format} codes of {bits} bits, but {' and '.join(offered)}."
            )
        error, code = min((q.fit(weight, bits, form), form) for form in formats or offered)
        out.append(Candidate(bits, code, mean_trace * error, error))
    return tuple(out)


def candidates_of_weights(
    model: nn.Module,
    sites: SiteTable,
    mean_traces: Mapping[str, float],
    config: QuantizerConfig,
    spec: QuantizerSpec,
    progress: bool,
) -> dict[str, tuple[Candidate, ...]]:
    """Every width of every weight.

    Args:
        model: left as it was.
        sites: table of the model.
        mean_traces: site -> mean trace that counts.
        config: widths and code formats.
        spec: the quantizer.
        progress: show a bar.

    Raises:
        HawqError: a weight that holds NaN; it names the layer.
    """
    widths = check_bits(config.weight_bits, "weight")
    layers, _ = quantizable_layers(model)
    norms = norms_to_fold(model, sites.layers)
    with progress_bar("Weight ranges", len(sites.weights), progress) as advance:
        out = {}
        for i, site in enumerate(sites.weights):
            name = site.layers[0]
            layer, trace, norm = layers[name], mean_traces[site.name], norms.get(name)
            try:
                out[site.name] = weight_candidates(
                    layer.weight.detach(), layer.channel_axis, widths, trace, config.code_format, spec, norm
                )
            except HawqError as error:
                raise HawqError(f"Layer {name!r}: {error}.") from None
            advance(i + 1)
    return out
