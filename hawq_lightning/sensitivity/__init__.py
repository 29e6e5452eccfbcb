"""Hessian traces of every weight and activation, with standard errors (paper 2.1, 2.2, 3.1)."""

from hawq_lightning.sensitivity._auto import check_linearity
from hawq_lightning.sensitivity._boundary import OutputHessian, Outputs, find_boundary
from hawq_lightning.sensitivity._cache import TraceCache
from hawq_lightning.sensitivity._context import LossFn, MeasureContext, forward_pass
from hawq_lightning.sensitivity._convergence import landscape, trace_history
from hawq_lightning.sensitivity._eigen import Eigenpairs, top_eigenpairs, top_eigenvalues
from hawq_lightning.sensitivity._ggn import RademacherProbes, concave_share, independent_images, probe_batch, send_back
from hawq_lightning.sensitivity._hutchinson import hutchinson_batch
from hawq_lightning.sensitivity._input_hooks import InputHooks
from hawq_lightning.sensitivity._isolate import (
    Heap,
    isolated_eval,
    noisy_modules,
    random_states_kept,
    release_memory,
    to_device,
)
from hawq_lightning.sensitivity._loss_hessian import draw, factorize_loss_hessian
from hawq_lightning.sensitivity._measure import ESTIMATORS, L1, measure
from hawq_lightning.sensitivity._microbatch import pick
from hawq_lightning.sensitivity._precision import PRECISIONS, check_precision
from hawq_lightning.sensitivity._probe_runner import ProbeRunner
from hawq_lightning.sensitivity._result import Sensitivity, SiteTrace
from hawq_lightning.sensitivity._sampling import DRAWS, check_draw, chunks, design, join
from hawq_lightning.sensitivity._significance import guarded_mean_traces
from hawq_lightning.sensitivity._trace_loop import ProcessShard, TraceLoop

__all__ = [
    "DRAWS",
    "ESTIMATORS",
    "L1",
    "PRECISIONS",
    "Eigenpairs",
    "Heap",
    "InputHooks",
    "LossFn",
    "MeasureContext",
    "OutputHessian",
    "Outputs",
    "ProbeRunner",
    "ProcessShard",
    "RademacherProbes",
    "Sensitivity",
    "SiteTrace",
    "TraceCache",
    "TraceLoop",
    "check_draw",
    "check_linearity",
    "check_precision",
    "chunks",
    "concave_share",
    "design",
    "draw",
    "factorize_loss_hessian",
    "find_boundary",
    "forward_pass",
    "guarded_mean_traces",
    "hutchinson_batch",
    "independent_images",
    "isolated_eval",
    "join",
    "landscape",
    "measure",
    "noisy_modules",
    "pick",
    "probe_batch",
    "random_states_kept",
    "release_memory",
    "send_back",
    "to_device",
    "top_eigenpairs",
    "top_eigenvalues",
    "trace_history",
]
