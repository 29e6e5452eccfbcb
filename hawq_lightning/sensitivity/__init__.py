"""Hessian traces of every weight and activation, with standard errors (paper 2.1, 2.2, 3.1)."""

from hawq_lightning._batches import batch_images
from hawq_lightning._sites import find_sites
from hawq_lightning.sensitivity._auto import Auto
from hawq_lightning.sensitivity._batch_hash import BatchKeys, batch_digest, batches_digest
from hawq_lightning.sensitivity._boundary import OutputHessian, Outputs, find_boundary
from hawq_lightning.sensitivity._cache import TraceCache, read_intact
from hawq_lightning.sensitivity._chunks import chunks, join
from hawq_lightning.sensitivity._context import MeasureContext, forward_pass
from hawq_lightning.sensitivity._convergence import landscape, trace_history
from hawq_lightning.sensitivity._eigen import Eigenpairs, top_eigenpairs, top_eigenvalues
from hawq_lightning.sensitivity._estimator import (
    ESTIMATORS,
    Estimator,
    Pilot,
    ProbeRequest,
    Probes,
    Rows,
    register_estimator,
)
from hawq_lightning.sensitivity._generator_state import generator_put_back
from hawq_lightning.sensitivity._ggn import AllOutputs, GaussNewton
from hawq_lightning.sensitivity._heap import Heap, pages_kept, release_memory
from hawq_lightning.sensitivity._held_attributes import HeldAttributes, of_library, plain_attributes
from hawq_lightning.sensitivity._held_contents import PutBack, contents_put_back, dict_put_back, worth_a_look
from hawq_lightning.sensitivity._held_state import HeldNames, HeldState
from hawq_lightning.sensitivity._hessian import Hessian
from hawq_lightning.sensitivity._hutchinson import Hutchinson, hutchinson_batch
from hawq_lightning.sensitivity._independence import samples_apart
from hawq_lightning.sensitivity._input_hooks import InputHooks
from hawq_lightning.sensitivity._isolate import isolated_eval, noisy_modules, random_states_kept, seed_torch
from hawq_lightning.sensitivity._linearity import check_linearity
from hawq_lightning.sensitivity._loss_hessian import ProbeVectors, factor_probe, factorize_loss_hessian
from hawq_lightning.sensitivity._measure import measure
from hawq_lightning.sensitivity._microbatch import pick
from hawq_lightning.sensitivity._on_device import OnDevice, on_device, to_device
from hawq_lightning.sensitivity._output_probes import backpropagate, concave_share
from hawq_lightning.sensitivity._probe_runner import ProbeRunner, WholeBatches
from hawq_lightning.sensitivity._process_shard import ProcessShard
from hawq_lightning.sensitivity._recomputed_weights import EffectiveWeights
from hawq_lightning.sensitivity._repeatable import repeatable, settle_draws
from hawq_lightning.sensitivity._result import Sensitivity
from hawq_lightning.sensitivity._result_fields import SiteTrace
from hawq_lightning.sensitivity._rounding import QuadraticForm, RoundingErrors
from hawq_lightning.sensitivity._sampling import sampling_design
from hawq_lightning.sensitivity._significance import guarded_mean_traces, kinds_in_noise
from hawq_lightning.sensitivity._statistics import TraceStatistics
from hawq_lightning.sensitivity._stopping import (
    AllOf,
    AnyOf,
    MaxProbes,
    Progress,
    RelativeError,
    Satisfied,
    Stop,
    StoppingRule,
)

__all__ = [
    "ESTIMATORS",
    "AllOf",
    "AllOutputs",
    "AnyOf",
    "Auto",
    "BatchKeys",
    "EffectiveWeights",
    "Eigenpairs",
    "Estimator",
    "GaussNewton",
    "Heap",
    "HeldAttributes",
    "HeldNames",
    "HeldState",
    "Hessian",
    "Hutchinson",
    "InputHooks",
    "MaxProbes",
    "MeasureContext",
    "OnDevice",
    "OutputHessian",
    "Outputs",
    "Pilot",
    "ProbeRequest",
    "ProbeRunner",
    "ProbeVectors",
    "Probes",
    "ProcessShard",
    "Progress",
    "PutBack",
    "QuadraticForm",
    "RelativeError",
    "RoundingErrors",
    "Rows",
    "Satisfied",
    "Sensitivity",
    "SiteTrace",
    "Stop",
    "StoppingRule",
    "TraceCache",
    "TraceStatistics",
    "WholeBatches",
    "backpropagate",
    "batch_digest",
    "batch_images",
    "batches_digest",
    "check_linearity",
    "chunks",
    "concave_share",
    "contents_put_back",
    "dict_put_back",
    "factor_probe",
    "factorize_loss_hessian",
    "find_boundary",
    "find_sites",
    "forward_pass",
    "generator_put_back",
    "guarded_mean_traces",
    "hutchinson_batch",
    "isolated_eval",
    "join",
    "kinds_in_noise",
    "landscape",
    "measure",
    "noisy_modules",
    "of_library",
    "on_device",
    "pages_kept",
    "pick",
    "plain_attributes",
    "random_states_kept",
    "read_intact",
    "register_estimator",
    "release_memory",
    "repeatable",
    "samples_apart",
    "sampling_design",
    "seed_torch",
    "settle_draws",
    "to_device",
    "top_eigenpairs",
    "top_eigenvalues",
    "trace_history",
    "worth_a_look",
]
