"""The switch between torch's fake-quantizers and the fused kernel."""

from __future__ import annotations

from torch import nn

from hawq_lightning._config import Kernel
from hawq_lightning._types import Model
from hawq_lightning.quantization._kernel import check_kernel
from hawq_lightning.quantization._quantizer import Quantizer
from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer


def use_kernel(model: Model, kernel: Kernel = "triton") -> Model:
    """Choose what fake-quantizes on a GPU; numbers on the CPU, files and plans know nothing of it.

    ``triton``: one kernel reads a tensor and writes its levels, another masks the gradient in place and finds the mask
    anew, so that nothing is kept for it. Inside ``torch.compile`` plain operations take its place, which Inductor makes
    one kernel of. Quantizers that round by rules of their own (``lsq``, ``dorefa``, ``int_only`` ...) stay with torch,
    and so do exports and transformations of ``torch.func``. **Unmeasured: no GPU was at hand.**

    Args:
        model: prepared or quantized; what it is given later, too, is switched by another call.
        kernel: ``triton``, or ``torch`` to go back.

    Returns:
        ``model``.

    Raises:
        HawqError: ``triton`` where there is no NVIDIA GPU or no Triton.
    """
    check_kernel(kernel)
    for quantizer in _of_the_family(model):
        quantizer.kernel = kernel
    return model


def _of_the_family(model: nn.Module) -> list[Quantizer]:
    evenly = (WeightQuantizer.quantize, ActivationQuantizer.quantize)
    return [m for m in model.modules() if isinstance(m, Quantizer) and type(m).quantize in evenly]
