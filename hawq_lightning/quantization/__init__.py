"""Q(.) of the paper: quantizers, fake-quant twins of layers, installing them, and what each width perturbs."""

from hawq_lightning.quantization import dorefa, fqn, int_only, lq_nets, lsq  # noqa: F401  they register themselves
from hawq_lightning.quantization.first_order import first_order_term
from hawq_lightning.quantization.inputs import network_inputs
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
    reestimate,
    refresh,
    share,
    uninstall,
    with_quantizer,
)
from hawq_lightning.quantization.loss_check import loss_check
from hawq_lightning.quantization.perturbation import options, weight_kinds, weight_options
from hawq_lightning.quantization.plan_loss import plan_loss
from hawq_lightning.quantization.quantizer import Quantizer
from hawq_lightning.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from hawq_lightning.quantization.registry import (
    QuantizerSpec,
    import_quantizers,
    quantizer_named,
    quantizer_names,
    register,
)
from hawq_lightning.quantization.twins import QuantizedLayer
from hawq_lightning.quantization.widths import check_bits

__all__ = [
    "ActivationQuantizer",
    "QuantizedLayer",
    "Quantizer",
    "QuantizerSpec",
    "WeightQuantizer",
    "arm",
    "armed_bits",
    "check_bits",
    "check_plan",
    "disarm",
    "first_order_term",
    "import_quantizers",
    "install",
    "loss_check",
    "network_inputs",
    "options",
    "paused",
    "plan_loss",
    "plan_of",
    "quantize",
    "quantized_layers",
    "quantizer_named",
    "quantizer_names",
    "reestimate",
    "refresh",
    "register",
    "share",
    "uninstall",
    "weight_kinds",
    "weight_options",
    "with_quantizer",
]
