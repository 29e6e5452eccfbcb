"""Hessian traces of every weight and activation, with standard errors (paper 2.1, 2.2, 3.1)."""

from hawq_lightning.sensitivity._auto import check_linearity
from hawq_lightning.sensitivity._boundary import OutputHessian, Outputs, find_boundary
from hawq_lightning.sensitivity._cache import TraceCache
from hawq_lightning.sensitivity._context import LossFn, Setting, forward_pass
from hawq_lightning.sensitivity._convergence import landscape, trace_steps
from hawq_lightning.sensitivity._eigen import Eigenpairs, top_eigenpairs, top_eigenvalues
from hawq_lightning.sensitivity._ggn import Signs, concave_share, independent_images, probe_batch, send_back
from hawq_lightning.sensitivity._grad_norms import inner_products
from hawq_lightning.sensitivity._hutchinson import hutchinson_batch
from hawq_lightning.sensitivity._input_hooks import Reads
from hawq_lightning.sensitivity._isolate import (
    Heap,
    noisy_modules,
    quiet,
    random_states_kept,
    release_memory,
    to_device,
)
from hawq_lightning.sensitivity._loss_hessian import draw, recognise
from hawq_lightning.sensitivity._measure import ESTIMATORS, L1, measure
from hawq_lightning.sensitivity._microbatch import pick
from hawq_lightning.sensitivity._precision import PRECISIONS, check_precision
from hawq_lightning.sensitivity._probe_runner import Probes
from hawq_lightning.sensitivity._result import Sensitivity, SiteTrace
from hawq_lightning.sensitivity._sampling import DRAWS, check_draw, chunks, design, join
from hawq_lightning.sensitivity._significance import guarded_mean_traces
from hawq_lightning.sensitivity._trace_loop import Rounds, Share
from hawq_lightning.sensitivity._unfold import Use
from hawq_lightning.sensitivity._weight_gradients import by_kernel

__all__ = [
    "DRAWS",
    "ESTIMATORS",
    "L1",
    "PRECISIONS",
    "Eigenpairs",
    "Heap",
    "LossFn",
    "OutputHessian",
    "Outputs",
    "Probes",
    "Reads",
    "Rounds",
    "Sensitivity",
    "Setting",
    "Share",
    "Signs",
    "SiteTrace",
    "TraceCache",
    "Use",
    "by_kernel",
    "check_draw",
    "check_linearity",
    "check_precision",
    "chunks",
    "concave_share",
    "design",
    "draw",
    "find_boundary",
    "forward_pass",
    "guarded_mean_traces",
    "hutchinson_batch",
    "independent_images",
    "inner_products",
    "join",
    "landscape",
    "measure",
    "noisy_modules",
    "pick",
    "probe_batch",
    "quiet",
    "random_states_kept",
    "recognise",
    "release_memory",
    "send_back",
    "to_device",
    "top_eigenpairs",
    "top_eigenvalues",
    "trace_steps",
]
