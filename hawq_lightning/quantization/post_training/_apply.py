"""Several post-training methods one after another, all held against the same float network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from hawq_lightning._batches import default_forward
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._types import Batch, JsonObject
from hawq_lightning.quantization.post_training._adaround import adaround
from hawq_lightning.quantization.post_training._batchnorm import reestimate_batchnorm
from hawq_lightning.quantization.post_training._bias_correction import bias_correction
from hawq_lightning.quantization.post_training._reference import FloatReference, Forward

METHODS: dict[str, Callable[..., JsonObject]] = {
    "adaround": adaround,
    "bias_correction": bias_correction,
    "batchnorm": reestimate_batchnorm,
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
    calibration = list(batches)
    reference = FloatReference(model)
    reports: dict[str, JsonObject] = {}

    def run(name: str) -> None:
        reports[name] = METHODS[name](model, calibration, forward=forward, reference=reference, progress=progress)

    for name in names:
        if methods is True and name == "bias_correction" and not reports["adaround"]:
            run("batchnorm")
        run(name)
    return reports
