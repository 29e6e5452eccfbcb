"""Q(.) of the paper: quantizers, fake-quant twins of layers, installing them, and what each width perturbs."""

from hawq_lightning.quantization.first_order import first_order_term
from hawq_lightning.quantization.install import (
    arm,
    armed_bits,
    check_plan,
    disarm,
    install,
    paused,
    plan_of,
    quantize,
    quantized_layers,
    refresh,
    uninstall,
)
from hawq_lightning.quantization.loss_check import loss_check
from hawq_lightning.quantization.perturbation import options, weight_options
from hawq_lightning.quantization.plan_loss import plan_loss
from hawq_lightning.quantization.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer, check_bits
from hawq_lightning.quantization.twins import QuantizedLayer

__all__ = [
    "ActivationQuantizer",
    "QuantizedLayer",
    "Quantizer",
    "WeightQuantizer",
    "arm",
    "armed_bits",
    "check_bits",
    "check_plan",
    "disarm",
    "first_order_term",
    "install",
    "loss_check",
    "options",
    "paused",
    "plan_loss",
    "plan_of",
    "quantize",
    "quantized_layers",
    "refresh",
    "uninstall",
    "weight_options",
]
