"""Integer-only inference: a quantized network as a program of integers, to the last bit.

The paper names it as future work ("to avoid using any floating point number", section 4). The program is read from the
finished file for integer kernels, so both have the same codes, grids and biases; only scales become dyadic numbers.
"""

from hawq_lightning.export.onnx.integer_only._differences import (
    KernelDifferences,
    LayerDifference,
    kernel_differences,
)
from hawq_lightning.export.onnx.integer_only._export import IntegerOnly, to_integer_only
from hawq_lightning.export.onnx.integer_only._network import IntegerNetwork

__all__ = [
    "IntegerNetwork",
    "IntegerOnly",
    "KernelDifferences",
    "LayerDifference",
    "kernel_differences",
    "to_integer_only",
]
