"""Runs that are killed, preempted or started again: random states, signals, checkpoints written whole."""

from hawq_lightning.callbacks.fault_tolerance._checkpoint_io import AtomicCheckpointIO, write_checkpoints_atomically
from hawq_lightning.callbacks.fault_tolerance._random_state import (
    KeepRandomStates,
    ResumedStates,
    random_states,
    set_random_states,
)
from hawq_lightning.callbacks.fault_tolerance._signals import interruptible

__all__ = [
    "AtomicCheckpointIO",
    "KeepRandomStates",
    "ResumedStates",
    "interruptible",
    "random_states",
    "set_random_states",
    "write_checkpoints_atomically",
]
