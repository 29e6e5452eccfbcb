"""BatchNorm statistics of the quantized network."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hawq_lightning._batches import default_forward
from hawq_lightning._types import Batch
from hawq_lightning.quantization._norm_statistics import new_statistics, norms_with_statistics
from hawq_lightning.quantization.post_training._reference import FloatReference, Forward, prepared, still

_MOMENTUM = 0.1
_UPDATES = 32


def reestimate_batchnorm(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Forward = default_forward,
    reference: FloatReference | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Measure the running means and variances of every BatchNorm anew, as averages over ``batches``.

    Mean and variance alike are then those of the quantized network. A batch should hold many images.

    Where a BatchNorm is folded while training (``int_only``) its variance makes the weights' range, which makes the
    variance. Both then move together in small steps, as in training: a moving average instead of the plain one.

    Args:
        model: with quantizers enabled; running statistics are changed in place.
        batches: some hundred images.
        forward: runs the model on a batch.
        reference: not needed; here so that all methods are called alike.
        progress: show a bar.

    Returns:
        BatchNorm -> mean ratio of the new standard deviation to the old.

    Raises:
        HawqError: no quantizer is enabled, or no batches.
    """
    layers, calibration = prepared(model, batches)
    norms = norms_with_statistics(model)
    old = {n: m.running_var.clone() for n, m in norms.items() if m.running_var is not None}
    folding = [m for m in layers.values() if m.weight_quantizer.bits and m.weight_quantizer.folding]
    with still(model), new_statistics(model, _MOMENTUM if folding else None):
        for _ in range(-(-_UPDATES // len(calibration)) if folding else 1):
            for batch in calibration:
                forward(model, batch)
                for layer in folding:
                    quantizer = layer.weight_quantizer
                    quantizer.fit(layer.weight, quantizer.bits, quantizer.code)
    return {
        n: float((m.running_var / old[n].clamp_min(1e-30)).sqrt().mean())
        for n, m in norms.items()
        if m.running_var is not None
    }
