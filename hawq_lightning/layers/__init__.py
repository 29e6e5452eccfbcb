"""What is known of each kind of layer, in one place; a kind of one's own is a class under ``@register_layer``."""

from hawq_lightning.layers._adopted import fake_quant_class
from hawq_lightning.layers._attention import AttentionKind
from hawq_lightning.layers._attention_products import (
    HOLDER,
    OPERANDS,
    AttentionProducts,
    drop_holder,
    holder_of,
    holder_values,
    put_holder,
)
from hawq_lightning.layers._computed import bake_parametrizations
from hawq_lightning.layers._conv import ConvKind, ConvTransposeKind
from hawq_lightning.layers._conv_gradients import by_kernel
from hawq_lightning.layers._directions import Directions, KeptDirections, Rows
from hawq_lightning.layers._embedding import EmbeddingBagKind, EmbeddingKind
from hawq_lightning.layers._fake_quant import (
    ActivationQ,
    FakeQuantLayer,
    WeightQ,
    input_quantizer_attribute,
    layer_type,
    must_be_called,
    quantizer_attribute,
    quantizer_parts,
    quantizers_by_attribute,
)
from hawq_lightning.layers._float_modules import ATTENTION, RECURRENT, why_float
from hawq_lightning.layers._function_linear import FunctionLinearKind
from hawq_lightning.layers._gradients import row_dots
from hawq_lightning.layers._held import AttentionQuantizers, HeldQuantizers, ResultQuantizers
from hawq_lightning.layers._hooked import made_by_hook, renew_weight
from hawq_lightning.layers._kind import (
    LAYER_KINDS,
    LayerCall,
    LayerKind,
    WeightRead,
    channel_axis_of,
    find_kind,
    inner_products,
    kind_of,
    kinds,
    projected_products,
    register_layer,
    type_names,
    weight_of,
)
from hawq_lightning.layers._linear import LinearKind, MatrixGradients
from hawq_lightning.layers._operands import (
    OperandReader,
    makes_attention,
    on_product,
    operand_name,
    operand_readers,
    split_operand,
)
from hawq_lightning.layers._other_linear import QOtherLinear
from hawq_lightning.layers._products import InnerProductsKind, recorded, visited
from hawq_lightning.layers._projections import ProjectedProducts
from hawq_lightning.layers._read_inside import ReadInsideKind, writes_to_weights
from hawq_lightning.layers._reader import WeightReader, as_reader, readers_of
from hawq_lightning.layers._recompute import deterministic, recompute_in_backward
from hawq_lightning.layers._recurrent import RecurrentKind
from hawq_lightning.layers._replaced import deep_copy, hold_forward, release_forward
from hawq_lightning.layers._results import (
    BIAS,
    OUTPUT,
    RESULTS,
    Following,
    Listener,
    ReadTensor,
    ResultReader,
    follow_all,
    forget_calls,
    is_result,
    results_of,
    unfollow_all,
)
from hawq_lightning.layers._same_padding import SamePaddingKind

__all__ = [
    "ATTENTION",
    "BIAS",
    "HOLDER",
    "LAYER_KINDS",
    "OPERANDS",
    "OUTPUT",
    "RECURRENT",
    "RESULTS",
    "ActivationQ",
    "AttentionKind",
    "AttentionProducts",
    "AttentionQuantizers",
    "ConvKind",
    "ConvTransposeKind",
    "Directions",
    "EmbeddingBagKind",
    "EmbeddingKind",
    "FakeQuantLayer",
    "Following",
    "FunctionLinearKind",
    "HeldQuantizers",
    "InnerProductsKind",
    "KeptDirections",
    "LayerCall",
    "LayerKind",
    "LinearKind",
    "Listener",
    "MatrixGradients",
    "OperandReader",
    "ProjectedProducts",
    "QOtherLinear",
    "ReadInsideKind",
    "ReadTensor",
    "RecurrentKind",
    "ResultQuantizers",
    "ResultReader",
    "Rows",
    "SamePaddingKind",
    "WeightQ",
    "WeightRead",
    "WeightReader",
    "as_reader",
    "bake_parametrizations",
    "by_kernel",
    "channel_axis_of",
    "deep_copy",
    "deterministic",
    "drop_holder",
    "fake_quant_class",
    "find_kind",
    "follow_all",
    "forget_calls",
    "hold_forward",
    "holder_of",
    "holder_values",
    "inner_products",
    "input_quantizer_attribute",
    "is_result",
    "kind_of",
    "kinds",
    "layer_type",
    "made_by_hook",
    "makes_attention",
    "must_be_called",
    "on_product",
    "operand_name",
    "operand_readers",
    "projected_products",
    "put_holder",
    "quantizer_attribute",
    "quantizer_parts",
    "quantizers_by_attribute",
    "readers_of",
    "recompute_in_backward",
    "recorded",
    "register_layer",
    "release_forward",
    "renew_weight",
    "results_of",
    "row_dots",
    "split_operand",
    "type_names",
    "unfollow_all",
    "visited",
    "weight_of",
    "why_float",
    "writes_to_weights",
]
