"""torchao: linear layers in its int8 kernels, with the plan's codes and its grids.

torchao 0.18 has such kernels for linear layers only; everything else keeps its stored codes and multiplies floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._plan import Plan
from hawq_lightning.export._deployed import (
    DequantizeWeight,
    Inputs,
    QuantizeActivation,
    deploy,
    portable,
    stored_layers,
)
from hawq_lightning.layers import kind_of

_INT8 = 8


@dataclass(frozen=True)
class TorchaoNetwork:
    """A network for inference.

    Attributes:
        model: the copy, on the CPU, of torch's own modules where torchao computes.
        static: layers that multiply integers, their input rounded to the plan's grid.
        weight_only: layers with int8 weights that read floats.
        left: other layers with stored codes, and why torchao does not run them.
    """

    model: nn.Module
    static: tuple[str, ...]
    weight_only: tuple[str, ...]
    left: dict[str, str]


def to_torchao(
    model: nn.Module, plan: Plan | None, example_input: Inputs, *, fold: bool = True, free_batch: bool = True
) -> TorchaoNetwork:
    """Copy a quantized model, with torchao's ``Int8Tensor`` for the weights of its linear layers.

    The dequantized weights are the fake-quant model's, bit for bit; what a grid's zero point adds goes into the biases.
    Grids of fewer than eight bits are clipped in
    float before, since torchao's have eight.

    Args:
        model: with quantizers enabled; it stays as it is.
        plan: the plan that it carries; ``None`` reads it from the quantizers.
        example_input: float images ``[N, ...]``, or a tuple of the model's positional inputs.
        fold: fold BatchNorm into scales and biases.
        free_batch: as for :func:`hawq_lightning.export.to_onnx`; the network takes any shapes in either case.

    Raises:
        HawqError: torchao is missing or older than 0.18, no linear layer has codes that fit int8, or the model cannot
            be deployed.
    """
    ao = _int8()
    deployed = deploy(model, plan, example_input, fold=fold, free_batch=free_batch)
    copied = portable(deployed.model)
    static: list[str] = []
    weight_only: list[str] = []
    left: dict[str, str] = {}
    for name, layer in list(stored_layers(copied)):
        stored, grid = layer.weight_quantizer, layer.input_quantizer
        if kind_of(layer).float_type is not nn.Linear:
            left[name] = f"torchao has no int8 kernel for {kind_of(layer).float_type.__name__}"
        elif not isinstance(stored, DequantizeWeight):
            left[name] = "its weight is float"
        elif stored.codes.dtype != torch.int8:
            left[name] = "its codes need more than eight bits"
        else:
            with_grid = isinstance(grid, QuantizeActivation)
            _replace(copied, layer, _linear(ao, layer, stored, grid if with_grid else None))
            (static if with_grid else weight_only).append(name)
    if not static and not weight_only:
        reason = next(iter(left.values()), "it has none")
        raise HawqError(f"No linear layer of this network can be given to torchao: {reason}.")
    return TorchaoNetwork(copied, tuple(static), tuple(weight_only), left)


def _int8() -> Any:
    """The module of torchao that holds int8 tensors."""
    require("torchao")
    try:
        module = require("torchao.quantization.quantize_.workflows")
        assert module.Int8Tensor and module.QuantizeTensorToInt8Kwargs
    except (HawqError, AttributeError) as error:
        raise HawqError("This needs torchao 0.18 or later, which has Int8Tensor: pip install -U torchao.") from error
    return module


def _linear(ao: Any, layer: Any, stored: DequantizeWeight, grid: QuantizeActivation | None) -> nn.Module:
    codes, bias, how = stored.codes, layer.bias, {}
    if grid is not None:
        zero = grid.zero - (1 << (_INT8 - 1))  # int8 codes are the grid's less 128
        granularity = require("torchao.quantization.granularity").PerTensor()
        how = {
            # "symmetric", for torchao would add up the weights in every call for the zero point's part
            "act_quant_kwargs": ao.QuantizeTensorToInt8Kwargs(granularity=granularity),
            "act_quant_scale": torch.full((1, 1), grid.scale, dtype=torch.float32),
            "act_quant_zero_point": torch.full((1, 1), zero, dtype=torch.int8),
        }
        shift = -zero * grid.scale * stored.scale.double() * codes.sum(1)
        bias = (shift if bias is None else bias.detach().double() + shift).float()
    weight = ao.Int8Tensor(codes, stored.scale.reshape(-1, 1), [1, codes.shape[1]], torch.float32, **how)
    linear = nn.Linear(codes.shape[1], codes.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return nn.Sequential(grid, linear) if grid is not None and grid.top < (1 << _INT8) - 1 else linear


def _replace(model: nn.Module, layer: nn.Module, new: nn.Module) -> None:
    """In every place that holds it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is layer:
                parent._modules[name] = new
