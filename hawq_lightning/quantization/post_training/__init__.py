"""Quantization without training: better rounding and corrected statistics from a few hundred images, no labels."""

from hawq_lightning.quantization.post_training.adaround import adaround
from hawq_lightning.quantization.post_training.apply import METHODS, check_methods, post_training
from hawq_lightning.quantization.post_training.batchnorm import reestimate_batchnorm
from hawq_lightning.quantization.post_training.bias_correction import bias_correction
from hawq_lightning.quantization.post_training.reference import FloatReference

__all__ = [
    "METHODS",
    "FloatReference",
    "adaround",
    "bias_correction",
    "check_methods",
    "post_training",
    "reestimate_batchnorm",
]
