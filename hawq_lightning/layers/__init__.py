"""What is known of each kind of layer, in one place; a kind of one's own is a class under ``@register_layer``."""

from hawq_lightning.layers._conv import ConvKind, ConvTransposeKind
from hawq_lightning.layers._conv_gradients import by_kernel
from hawq_lightning.layers._fake_quant import (
    ActivationQ,
    FakeQuantLayer,
    WeightQ,
    input_quantizer_attribute,
    layer_type,
    must_be_called,
    quantizer_attribute,
)
from hawq_lightning.layers._float_modules import ATTENTION, RECURRENT, why_float
from hawq_lightning.layers._gradients import row_dots
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
    register_layer,
    type_names,
    weight_of,
)
from hawq_lightning.layers._linear import LinearKind
from hawq_lightning.layers._reader import WeightReader, as_reader, readers_of
from hawq_lightning.layers._recompute import deterministic, recompute_in_backward

__all__ = [
    "ATTENTION",
    "LAYER_KINDS",
    "RECURRENT",
    "ActivationQ",
    "ConvKind",
    "ConvTransposeKind",
    "FakeQuantLayer",
    "LayerCall",
    "LayerKind",
    "LinearKind",
    "WeightQ",
    "WeightRead",
    "WeightReader",
    "as_reader",
    "by_kernel",
    "channel_axis_of",
    "deterministic",
    "find_kind",
    "inner_products",
    "input_quantizer_attribute",
    "kind_of",
    "kinds",
    "layer_type",
    "must_be_called",
    "quantizer_attribute",
    "readers_of",
    "recompute_in_backward",
    "register_layer",
    "row_dots",
    "type_names",
    "weight_of",
    "why_float",
]
