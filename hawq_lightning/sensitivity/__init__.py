"""Hessian traces of every weight and activation, with standard errors (paper 2.1, 2.2, 3.1)."""

from hawq_lightning.sensitivity.measure import ESTIMATORS, Share, measure
from hawq_lightning.sensitivity.result import Sensitivity, SiteTrace

__all__ = ["ESTIMATORS", "Sensitivity", "Share", "SiteTrace", "measure"]
