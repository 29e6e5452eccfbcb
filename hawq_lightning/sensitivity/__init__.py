"""Hessian traces of every weight and activation, with standard errors (paper 2.1, 2.2, 3.1)."""

from hawq_lightning.sensitivity.draws import DRAWS
from hawq_lightning.sensitivity.eigen import Eigenpairs, top_eigenpairs, top_eigenvalues
from hawq_lightning.sensitivity.measure import ESTIMATORS, L1, Share, measure
from hawq_lightning.sensitivity.precision import PRECISIONS
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
    "measure",
    "top_eigenpairs",
    "top_eigenvalues",
]
