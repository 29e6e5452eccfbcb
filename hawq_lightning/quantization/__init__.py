"""Q(.) of the paper: quantizers, fake-quant twins of layers, installing them, and what each width perturbs."""

from hawq_lightning.quantization import methods
from hawq_lightning.quantization._apply import (
    arm,
    arm_site,
    armed_bits,
    check_plan,
    disarm,
    install,
    paused,
    plan_of,
    quantize,
    quantized_layers,
    quantizers,
    reestimate,
    refresh,
    share,
    uninstall,
    with_quantizer,
)
from hawq_lightning.quantization._candidates import options, weight_kinds, weight_options
from hawq_lightning.quantization._distillation import Enough, GraphOutputs, Head, HeadOutputs, distance, find_heads
from hawq_lightning.quantization._fake_quantize import MIDRISE_ZERO, along, fake_quantize_tensor
from hawq_lightning.quantization._first_order import first_order_term
from hawq_lightning.quantization._inputs import network_inputs
from hawq_lightning.quantization._loss_check import loss_check
from hawq_lightning.quantization._modules import QuantizedLayer, make_twin, must_be_called
from hawq_lightning.quantization._plan_loss import plan_loss
from hawq_lightning.quantization._quantizer import Quantizer
from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer, named_in
from hawq_lightning.quantization._ranges import activation_step, weight_step
from hawq_lightning.quantization._registry import (
    QuantizerSpec,
    import_quantizers,
    quantizer_named,
    quantizer_names,
    register,
)
from hawq_lightning.quantization._trial import on_trial
from hawq_lightning.quantization._widths import check_bits

__all__ = [
    "MIDRISE_ZERO",
    "ActivationQuantizer",
    "Enough",
    "GraphOutputs",
    "Head",
    "HeadOutputs",
    "QuantizedLayer",
    "Quantizer",
    "QuantizerSpec",
    "WeightQuantizer",
    "activation_step",
    "along",
    "arm",
    "arm_site",
    "armed_bits",
    "check_bits",
    "check_plan",
    "disarm",
    "distance",
    "fake_quantize_tensor",
    "find_heads",
    "first_order_term",
    "import_quantizers",
    "install",
    "loss_check",
    "make_twin",
    "methods",
    "must_be_called",
    "named_in",
    "network_inputs",
    "on_trial",
    "options",
    "paused",
    "plan_loss",
    "plan_of",
    "quantize",
    "quantized_layers",
    "quantizer_named",
    "quantizer_names",
    "quantizers",
    "reestimate",
    "refresh",
    "register",
    "share",
    "uninstall",
    "weight_kinds",
    "weight_options",
    "weight_step",
    "with_quantizer",
]
