"""Every candidate of every site: perturbation ||Q(.) - .||^2 and Omega (eq. 10; for activations section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._candidates import Candidates
from hawq_lightning._config import QuantizerConfig
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._plan import Candidate
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import Batch, BatchSizeFn, LossFn
from hawq_lightning.quantization._activation_candidates import activation_candidates
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named
from hawq_lightning.quantization._weight_candidates import candidates_of_weights
from hawq_lightning.sensitivity import QuadraticForm, Sensitivity, SiteTrace, guarded_mean_traces, on_device


def candidates(
    model: nn.Module,
    batches: Iterable[Batch],
    sensitivity: Sensitivity | None,
    sites: SiteTable,
    loss_fn: LossFn,
    *,
    config: QuantizerConfig | None = None,
    quantizer: str | QuantizerSpec | None = None,
    batch_size_fn: BatchSizeFn = batch_images,
    progress: bool = False,
    **overrides: object,
) -> Candidates:
    """Weigh every width for every site.

    Args:
        model: left as it was.
        batches: those that the traces were measured on: activations' Omega pairs trace and perturbation by sample. Of
            others it is the product of the means, with a warning; a DataLoader that shuffles gives others every time.
        sensitivity: traces of ``sites``; ``None``: none were measured, and Omega is the perturbation alone.
        sites: table from :func:`hawq_lightning.sites`.
        loss_fn: runs the model on a batch.
        config: quantizer, widths, code formats.
        quantizer: registered name in the place of the config's, or what :func:`quantizer_named` returned.
        batch_size_fn: number of samples in a batch.
        progress: show a bar.
        overrides: fields of the config to change, such as ``weight_bits=(4, 8)``.

    Returns:
        candidates by site, ascending bits; those of activations carry step and zero point.

    Raises:
        HawqError: an unknown field, widths out of range, NaN in weights or activations (it names the site).
    """
    config = _overridden(config or QuantizerConfig(), overrides)
    spec = quantizer_named(config.name, config.options) if quantizer is None else quantizer_named(quantizer)
    sensitivity = sensitivity or _ones(sites)
    mean_traces, _ = guarded_mean_traces(sensitivity)
    by_site = candidates_of_weights(model, sites, mean_traces, config, spec, progress)
    if config.activation_bits is not None and sites.activations:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        by_site |= activation_candidates(
            model, on_device(batches, device), sensitivity, mean_traces, sites, loss_fn, config, spec, batch_size_fn,
            progress,
        )  # fmt: skip
    by_site = {name: _with_forms(listed, sensitivity.forms.get(name, ())) for name, listed in by_site.items()}
    return Candidates.of(by_site, sites, spec.name, spec.options)


def _with_forms(listed: tuple[Candidate, ...], forms: Sequence[QuadraticForm]) -> tuple[Candidate, ...]:
    """Candidates with the quadratic forms that are of their rounding errors."""
    out = []
    for c in listed:
        form = next((f for f in forms if f.is_of(c)), None)
        out.append(c if form is None else replace(c, q=form.value, q_stderr=form.stderr))
    return tuple(out)


def _ones(sites: SiteTable) -> Sensitivity:
    """Mean traces of one."""
    return Sensitivity(tuple(SiteTrace(s.name, s.kind, float(s.numel), 0.0, 0.0, s.numel, 1.0) for s in sites))


def _overridden(config: QuantizerConfig, overrides: Mapping[str, object]) -> QuantizerConfig:
    names = [f.name for f in fields(QuantizerConfig)]
    for name in overrides:
        if name not in names:
            raise HawqError(f"QuantizerConfig has no field {name!r}.{nearest(name, names)}")
    return replace(config, **overrides)  # type: ignore[arg-type]
