"""FQN: a fully quantized network for object detection (Li et al., CVPR 2019)."""

from __future__ import annotations

from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer
from hawq_lightning.quantization._ranges import Ranges
from hawq_lightning.quantization._registry import register_quantizer


class ActivationFQN(ActivationQuantizer):
    """Activations clipped at percentiles of calibration images, against outliers.

    Args:
        ranges: ``percentile``, or another.
    """

    def __init__(self, *, ranges: Ranges = "percentile") -> None:
        super().__init__(ranges=ranges)


@register_quantizer("fqn", activation=ActivationFQN, freezes_norms=True)
class WeightFQN(WeightQuantizer):
    """Weights between their extremes, one symmetric range a channel; BatchNorm is frozen in training.

    Args:
        channels: length of the channel axis.
        axis: channel axis of the weight.
    """

    def __init__(self, channels: int, axis: int = 0) -> None:
        super().__init__(channels, axis, ranges="minmax")
