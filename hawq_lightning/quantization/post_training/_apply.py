"""Several post-training methods one after another, all held against the same float network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from hawq_lightning._batches import default_forward
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._types import Batch, JsonObject
from hawq_lightning.quantization.post_training._adaround import adaround
from hawq_lightning.quantization.post_training._batchnorm import reestimate_batchnorm
from hawq_lightning.quantization.post_training._bias_correction import bias_correction
from hawq_lightning.quantization.post_training._blocks import reconstruct_blocks
from hawq_lightning.quantization.post_training._reference import FloatReference, Forward
from hawq_lightning.sensitivity import OnDevice


@dataclass(frozen=True)
class Method:
    """A post-training method.

    Attributes:
        run: ``run(model, batches, *, forward, reference, progress) -> report``, layer -> what became of it.
        summary: the report of one layer or more in a few words.
    """

    run: Callable[..., JsonObject]
    summary: Callable[[JsonObject], str]


def _rounding(layers: JsonObject) -> str:
    moved, after, before = (_mean(v[k] for v in layers.values()) for k in ("moved", "after", "before"))
    return f"{moved:.1%} of the codes moved, mean output error {before:.3g} -> {after:.3g}"


METHODS = {
    "adaround": Method(adaround, _rounding),
    "blocks": Method(reconstruct_blocks, _rounding),
    "bias_correction": Method(
        bias_correction, lambda layers: f"means shifted by {_mean(layers.values()):.3g} standard deviations"
    ),
    "batchnorm": Method(reestimate_batchnorm, lambda layers: f"standard deviations times {_mean(layers.values()):.3g}"),
}
DEFAULT = ("adaround", "bias_correction")


def check_methods(methods: bool | str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of methods as a tuple; ``True`` means the default ones, ``False`` and ``None`` none.

    Raises:
        HawqError: an unknown name.
    """
    if methods is None or isinstance(methods, bool):
        return DEFAULT if methods else ()
    listed = (methods,) if isinstance(methods, str) else tuple(methods)
    for name in listed:
        if name not in METHODS:
            raise HawqError(
                f"post_training={name!r} is unknown; use one of {', '.join(METHODS)}.{nearest(str(name), METHODS)}"
            )
    if "blocks" in listed and "bias_correction" in listed[listed.index("blocks") :]:
        warnings.warn(
            "post_training: bias_correction behind blocks moves the means inside of blocks, which were learned for "
            "those that they had, and can undo all of it; leave it out, or put it first.",
            stacklevel=3,
        )
    return listed


def post_training(
    model: nn.Module,
    batches: Iterable[Batch],
    methods: bool | str | Sequence[str] = True,
    *,
    forward: Forward = default_forward,
    progress: bool = False,
) -> dict[str, JsonObject]:
    """Improve a quantized model without training it.

    Args:
        model: with quantizers enabled (:func:`hawq_lightning.quantize`); changed in place.
        batches: a few hundred images, inputs first; labels are not used unless ``forward`` does.
        methods: of :data:`METHODS`, in this order; ``True``: rounding, then bias correction, and between them
            BatchNorm's statistics if no layer's rounding can be learned (codebooks), where they are what helps most;
            beside learned rounding they gain nothing (``benchmarks/post_training.py``).
        forward: ``forward(model, batch)``; a loss function will do.
        progress: show bars.

    Returns:
        method -> what it reports of each layer.

    Raises:
        HawqError: an unknown method, no quantizer is enabled, or no batches.
    """
    names = check_methods(methods)
    calibration = batches if isinstance(batches, OnDevice) else list(batches)
    reference = FloatReference(model)
    reports: dict[str, JsonObject] = {}

    def run(name: str) -> None:
        reports[name] = METHODS[name].run(model, calibration, forward=forward, reference=reference, progress=progress)

    for i, name in enumerate(names):
        run(name)
        if methods is True and i == 0 and not reports[name]:  # no layer's rounding could be learned
            run("batchnorm")
    return reports


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
