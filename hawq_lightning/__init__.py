"""Mixed-precision quantization for PyTorch Lightning, bits chosen by Hessian traces (HAWQ-V2)."""

from typing import TYPE_CHECKING

from hawq_lightning._candidates import Candidates
from hawq_lightning._config import MeasureConfig, QuantizerConfig, SelectConfig
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._plan import Candidate, Plan, PlanSite
from hawq_lightning._site_table import Layer, Site, SiteTable
from hawq_lightning._sites import sites
from hawq_lightning._version import __version__
from hawq_lightning.export import load_packed, save_packed
from hawq_lightning.layers import register_layer
from hawq_lightning.quantization import candidates, forecast, quantize, register_quantizer, unquantize
from hawq_lightning.selection import (
    Frontier,
    Problem,
    frontier,
    register_cost,
    register_score,
    register_selector,
    select,
)
from hawq_lightning.sensitivity import Sensitivity, measure

if TYPE_CHECKING:
    from hawq_lightning.callbacks import (
        HAWQ,
        ApplyPlan,
        BlockwiseOrder,
        Distillation,
        FreezeSchedule,
        MeasureTraces,
        PostTraining,
        load_from_checkpoint,
    )

_LIGHTNING = ("HAWQ", "ApplyPlan", "BlockwiseOrder", "Distillation", "FreezeSchedule", "MeasureTraces", "PostTraining",
              "load_from_checkpoint")  # fmt: skip


def __getattr__(name: str) -> object:
    # lightning is imported only by those who use it: the method works in plain PyTorch
    if name in _LIGHTNING:
        from hawq_lightning import callbacks

        value: object = getattr(callbacks, name)
        return value
    raise AttributeError(f"module 'hawq_lightning' has no attribute {name!r}")


__all__ = [
    "HAWQ",
    "ApplyPlan",
    "BlockwiseOrder",
    "Candidate",
    "Candidates",
    "Distillation",
    "FreezeSchedule",
    "Frontier",
    "HawqError",
    "Layer",
    "MeasureConfig",
    "MeasureTraces",
    "Plan",
    "PlanSite",
    "PostTraining",
    "Problem",
    "QuantizerConfig",
    "SelectConfig",
    "Sensitivity",
    "Site",
    "SiteTable",
    "__version__",
    "candidates",
    "forecast",
    "frontier",
    "load_from_checkpoint",
    "load_packed",
    "measure",
    "nearest",
    "quantize",
    "register_cost",
    "register_layer",
    "register_quantizer",
    "register_score",
    "register_selector",
    "save_packed",
    "select",
    "sites",
    "unquantize",
]
