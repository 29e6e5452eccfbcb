"""The quantizers of the literature, a file each; each registers itself."""

from hawq_lightning.quantization.methods import _dorefa, _fqn, _int_only, _kmeans, _lsq, _rvq  # noqa: F401  they register themselves
from hawq_lightning.quantization.methods._lq_activations import MOST_BITS, ActivationLQ
from hawq_lightning.quantization.methods._lq_nets import WeightLQ

__all__ = [
    "MOST_BITS",
    "ActivationLQ",
    "WeightLQ",
]
