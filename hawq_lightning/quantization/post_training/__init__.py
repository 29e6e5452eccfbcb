"""Quantization without training: better rounding and corrected statistics from a few hundred images, no labels."""

from hawq_lightning.quantization.post_training._adaround import adaround
from hawq_lightning.quantization.post_training._apply import METHODS, Method, check_methods, post_training
from hawq_lightning.quantization.post_training._batchnorm import reestimate_batchnorm
from hawq_lightning.quantization.post_training._bias_correction import bias_correction
from hawq_lightning.quantization.post_training._blocks import reconstruct_blocks
from hawq_lightning.quantization.post_training._reference import FloatReference
from hawq_lightning.quantization.post_training._rounding import learn_rounding
from hawq_lightning.quantization.post_training._second_moments import Moments

__all__ = [
    "METHODS",
    "FloatReference",
    "Method",
    "Moments",
    "adaround",
    "bias_correction",
    "check_methods",
    "learn_rounding",
    "post_training",
    "reconstruct_blocks",
    "reestimate_batchnorm",
]
