"""Mixed-precision quantization for PyTorch Lightning, bits chosen by Hessian traces (HAWQ-V2)."""

from typing import TYPE_CHECKING, Any

from hawq_lightning.errors import HawqError
from hawq_lightning.export import load_packed, save_packed
from hawq_lightning.plan import Option, Plan
from hawq_lightning.quantization import options, quantize
from hawq_lightning.selection import Frontier, Problem, frontier, select
from hawq_lightning.sensitivity import Sensitivity, measure
from hawq_lightning.site_table import SiteTable
from hawq_lightning.sites import sites

if TYPE_CHECKING:
    from hawq_lightning.callbacks import HAWQ, InstallPlan, MeasureTraces, load_from_checkpoint

__version__ = "0.1.0"

_LIGHTNING = ("HAWQ", "InstallPlan", "MeasureTraces", "load_from_checkpoint")


def __getattr__(name: str) -> Any:
    # lightning is imported only by those who use it: the method works in plain PyTorch
    if name in _LIGHTNING:
        from hawq_lightning import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module 'hawq_lightning' has no attribute {name!r}")


__all__ = [
    "HAWQ",
    "Frontier",
    "HawqError",
    "InstallPlan",
    "MeasureTraces",
    "Option",
    "Plan",
    "Problem",
    "Sensitivity",
    "SiteTable",
    "frontier",
    "load_from_checkpoint",
    "load_packed",
    "measure",
    "options",
    "quantize",
    "save_packed",
    "select",
    "sites",
]
