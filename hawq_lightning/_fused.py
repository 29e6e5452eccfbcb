"""Fused kernels of torch's Transformer layers, switched off where somebody looks at what a network computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fused_transformers_off() -> Iterator[None]:
    """Inside, ``nn.Transformer`` layers call their parts, on padded sequences, in evaluation mode as well.

    The fused kernels read weights past the layers that hold them, and nested tensors, which the encoder makes of padded
    sequences, have no sizes to count operations by.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
