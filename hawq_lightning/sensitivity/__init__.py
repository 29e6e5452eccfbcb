"""Hessian traces of every weight and activation, with standard errors (paper 2.1, 2.2, 3.1)."""

from hawq_lightning.sensitivity.draws import DRAWS, check_draw
from hawq_lightning.sensitivity.eigen import Eigenpairs, top_eigenpairs, top_eigenvalues
from hawq_lightning.sensitivity.measure import ESTIMATORS, L1, Share, measure
from hawq_lightning.sensitivity.precision import PRECISIONS, check_precision
from hawq_lightning.sensitivity.result import Sensitivity, SiteTrace

__all__ = [
    "DRAWS",
    "ESTIMATORS",
    "L1",
    "PRECISIONS",
    "Eigenpairs",
    "Sensitivity",
    "Share",
    "SiteTrace",
    "check_draw",
    "check_precision",
    "measure",
    "top_eigenpairs",
    "top_eigenvalues",
]
