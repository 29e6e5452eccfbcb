"""What torch does with a pass at the moment: private functions of torch, which may go, asked in one place."""

from __future__ import annotations

import torch

_PEEK = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
_TRACING_STATE = getattr(torch._C, "_get_tracing_state", None)


def traced() -> bool:
    """Whether ``torch.jit.trace`` runs, which keeps torch's operators alone."""
    return _TRACING_STATE is not None and _TRACING_STATE() is not None


def transformed() -> bool:
    """Whether a transformation of torch.func runs (``vmap``, ``grad``, ``jvp``), for which tensors have no values."""
    # compiled code has no stack to look at: Dynamo breaks its graph over the look
    return not torch.compiler.is_compiling() and _PEEK is not None and _PEEK() is not None
