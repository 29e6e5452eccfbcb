"""Q(.) of the paper: quantizers, fake-quant layers, applying plans, and what each width perturbs."""

from hawq_lightning._code_formats import CODE_FORMATS, CodeFormat, register_code_format
from hawq_lightning._config import check_bits
from hawq_lightning._sites import quantizable_layers
from hawq_lightning.quantization import methods  # noqa: F401  the quantizers register themselves
from hawq_lightning.quantization._apply import (
    disable,
    enable,
    enable_site,
    prepare,
    quantize,
    reestimate,
    tie_scales,
    unquantize,
)
from hawq_lightning.quantization._attention import (
    QuantizedOperand,
    expect_attention,
    prepare_attention_of,
    put_attention,
    quantized_operands,
    with_operand,
)
from hawq_lightning.quantization._candidates import candidates
from hawq_lightning.quantization._check_plan import check_plan, with_quantizer
from hawq_lightning.quantization._copies import NetworkCopies, plan_with_copies, prepare_alike
from hawq_lightning.quantization._distillation import Enough, GraphOutputs, Head, HeadOutputs, distance, find_heads
from hawq_lightning.quantization._enabled import (
    enabled_bits,
    fake_quant_disabled,
    plan_of,
    quantized_layers,
    quantized_reads,
    quantizers,
    refresh,
)
from hawq_lightning.quantization._fake_quantize import MIDRISE_ZERO, fake_quantize_tensor, per_channel_view
from hawq_lightning.quantization._float_distance import FloatDistance, PlanLoss
from hawq_lightning.quantization._forecast import After, Forecast, Mode, Tangent
from hawq_lightning.quantization._inputs import network_inputs
from hawq_lightning.quantization._integer_bias import IntegerBias
from hawq_lightning.quantization._modules import (
    QuantizedLayer,
    QuantizedWeight,
    float_classes,
    quantizers_in,
    to_fake_quantized,
    with_quantizers,
)
from hawq_lightning.quantization._norm_statistics import new_statistics, norms_with_statistics
from hawq_lightning.quantization._off_grid import off_grid, warn_off_grid
from hawq_lightning.quantization._path_attribution import forecast, shares_of_plan
from hawq_lightning.quantization._plan_distance import distance_of_plan
from hawq_lightning.quantization._quantizer import Quantizer
from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer, trained_quantizers
from hawq_lightning.quantization._ranges import activation_step, weight_step
from hawq_lightning.quantization._registry import (
    QuantizerSpec,
    import_quantizers,
    quantizer_named,
    quantizer_names,
    quantizer_of,
    register_quantizer,
)
from hawq_lightning.quantization._results import (
    QuantizedResult,
    bake_biases,
    biases_of,
    drop_results,
    expect_results,
    prepare_results_of,
    put_biases,
    put_results,
    quantized_results,
    with_result,
)
from hawq_lightning.quantization._rounding_errors import rounding_errors
from hawq_lightning.quantization._storage import Storage
from hawq_lightning.quantization._trial import (
    first_order_term,
    loss_of_plan,
    loss_per_site,
    plans_in_place,
    temporarily_quantized,
)
from hawq_lightning.quantization._use_kernel import use_kernel
from hawq_lightning.quantization._weight_candidates import weight_candidates, weight_code_formats

__all__ = [
    "CODE_FORMATS",
    "MIDRISE_ZERO",
    "ActivationQuantizer",
    "After",
    "CodeFormat",
    "Enough",
    "FloatDistance",
    "Forecast",
    "GraphOutputs",
    "Head",
    "HeadOutputs",
    "IntegerBias",
    "Mode",
    "NetworkCopies",
    "PlanLoss",
    "QuantizedLayer",
    "QuantizedOperand",
    "QuantizedResult",
    "QuantizedWeight",
    "Quantizer",
    "QuantizerSpec",
    "Storage",
    "Tangent",
    "WeightQuantizer",
    "activation_step",
    "bake_biases",
    "biases_of",
    "candidates",
    "check_bits",
    "check_plan",
    "disable",
    "distance",
    "distance_of_plan",
    "drop_results",
    "enable",
    "enable_site",
    "enabled_bits",
    "expect_attention",
    "expect_results",
    "fake_quant_disabled",
    "fake_quantize_tensor",
    "find_heads",
    "first_order_term",
    "float_classes",
    "forecast",
    "import_quantizers",
    "loss_of_plan",
    "loss_per_site",
    "network_inputs",
    "new_statistics",
    "norms_with_statistics",
    "off_grid",
    "per_channel_view",
    "plan_of",
    "plan_with_copies",
    "plans_in_place",
    "prepare",
    "prepare_alike",
    "prepare_attention_of",
    "prepare_results_of",
    "put_attention",
    "put_biases",
    "put_results",
    "quantizable_layers",
    "quantize",
    "quantized_layers",
    "quantized_operands",
    "quantized_reads",
    "quantized_results",
    "quantizer_named",
    "quantizer_names",
    "quantizer_of",
    "quantizers",
    "quantizers_in",
    "reestimate",
    "refresh",
    "register_code_format",
    "register_quantizer",
    "rounding_errors",
    "shares_of_plan",
    "temporarily_quantized",
    "tie_scales",
    "to_fake_quantized",
    "trained_quantizers",
    "unquantize",
    "use_kernel",
    "warn_off_grid",
    "weight_candidates",
    "weight_code_formats",
    "weight_step",
    "with_operand",
    "with_quantizer",
    "with_quantizers",
    "with_result",
]
