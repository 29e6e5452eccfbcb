"""Where the fused kernel of ``kernel="triton"`` can run."""

from __future__ import annotations

import importlib.util
import os

import torch

from hawq_lightning._config import Kernel
from hawq_lightning._errors import HawqError
from hawq_lightning._torch_state import traced, transformed

HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALF)


def check_kernel(kernel: Kernel) -> None:
    """Refuse a kernel that this machine cannot run.

    Raises:
        HawqError: no Triton, or no NVIDIA GPU.
    """
    if kernel == "torch":
        return
    if importlib.util.find_spec("triton") is None:
        raise HawqError(
            'kernel="triton" needs triton, which comes with torch\'s builds for CUDA: leave kernel="torch".'
        )
    if not interpreted() and (torch.version.cuda is None or not torch.cuda.is_available()):
        raise HawqError('kernel="triton" needs an NVIDIA GPU, and torch sees none here: leave kernel="torch".')


def launches(x: torch.Tensor) -> bool:
    """Whether kernels of ours can be launched for a tensor, now."""
    others = torch.compiler.is_compiling() or traced() or transformed()
    return (x.is_cuda or interpreted()) and x.dtype in FLOATS and not others


def compiles(x: torch.Tensor) -> bool:
    """Whether torch.compile makes a kernel of plain operations; an export keeps torch's own operation."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.dtype in FLOATS


def interpreted() -> bool:
    """Whether Triton runs kernels as Python, on any device: its own switch, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
