"""Attention of torchvision and timm that hands its children's weights to ``F.linear``: the children are not called.

Swin's windows read ``qkv.weight`` and ``proj.weight`` so; BEiT, EVA-02, timm's Swin V2 ``qkv.weight``, whose bias they
put together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hawq_lightning._types import FunctionInputs, Options
from hawq_lightning.layers._fake_quant import ActivationQ, FakeQuantLayer, WeightQ, layer_type
from hawq_lightning.layers._kind import WeightRead, kind_of, register_layer, weight_of
from hawq_lightning.layers._linear import MatrixGradients
from hawq_lightning.layers._products import InnerProductsKind, shown_product


class QFunctionLinear(FakeQuantLayer[WeightQ, ActivationQ]):
    """The same attention, both operands of its linear functions quantized."""

    def forward(self, *args: Any, **kwargs: Any) -> object:
        """As the float module."""
        return _forward(self, *args, **kwargs)


class _Linears(TorchFunctionMode):
    """Inside, ``F.linear`` with a weight of ``module`` is a product of that weight's site."""

    def __init__(self, module: nn.Module, names: Mapping[str, WeightRead]) -> None:
        super().__init__()
        self._module, self._names = module, {id(weight_of(module, n)): n for n in names}

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.linear:
            given = {**dict(zip(("input", "weight", "bias"), args)), **kwargs}
            weight, bias = given["weight"], given.get("bias")
            if (name := self._names.get(id(weight))) is not None:
                return shown_product(self._module, name, F.linear, given["input"], weight, bias)
        return func(*args, **kwargs)


class FunctionLinearKind(InnerProductsKind, MatrixGradients):
    """Weights of children, which a function reads."""

    fake_quant_type = QFunctionLinear
    known_by_tensor = True

    def explicit_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> object:
        """The forward, its products in sight."""
        return _forward(module, *args, **kwargs)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> object:
    with _Linears(module, kind_of(module).weights(module)):
        return cast(Any, layer_type(module)).forward(module, *args, **kwargs)


class _Windows(FunctionLinearKind):
    """Swin's, in shifted windows of images or of several frames."""

    def weights(self, module: nn.Module) -> Mapping[str, WeightRead]:
        """Both projections, a scale a row."""
        return {"qkv.weight": WeightRead(0), "proj.weight": WeightRead(0)}


class _JoinedBias(FunctionLinearKind):
    """Whose bias is put together of those of queries and values."""

    def weights(self, module: nn.Module) -> Mapping[str, WeightRead]:
        """The packed input projection; the output's is called."""
        return {"qkv.weight": WeightRead(0)}

    def why_float(self, module: nn.Module) -> str | None:
        """Without a bias of queries, or with projections apart, the children are called."""
        attention: Any = module
        joined = attention.qkv is not None and attention.q_bias is not None and not attention.qkv_bias_separate
        return None if joined else "its layers are sites of their own"


# they differ in the class that they stand for only
for _name, _kind, _class in (
    ("torchvision_swin_attention", _Windows, "torchvision.models.swin_transformer.ShiftedWindowAttention"),
    ("torchvision_swin_v2_attention", _Windows, "torchvision.models.swin_transformer.ShiftedWindowAttentionV2"),
    (
        "torchvision_video_swin_attention",
        _Windows,
        "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d",
    ),
    ("timm_swin_v2_attention", _JoinedBias, "timm.models.swin_transformer_v2.WindowAttention"),
    ("timm_beit_attention", _JoinedBias, "timm.models.beit.Attention"),
    ("timm_eva_attention", _JoinedBias, "timm.models.eva.EvaAttention"),
):
    register_layer(_name)(type(f"{_class.rpartition('.')[2]}Kind", (_kind,), {"float_name": _class}))
