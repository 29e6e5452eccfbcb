"""Weight gradients of convolutions, an image each, by the kernel that training uses: nothing is unfolded.

On a CPU this takes a third of the time of unfolding and multiplying for a 3 x 3 convolution, and a twentieth for a
depthwise one (``benchmarks/trace_cost.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning._sites import layer_type
from hawq_lightning.sensitivity._unfold import TRANSPOSED, LayerCall, batched, paddings

_FEW = 1 << 15  # elements of an unfolded image up to which copying them is cheap
_LIGHT = 10**7  # multiplications an image below which a call is mostly overhead
_CHANNELS = 256  # of images side by side in one call


def by_kernel(layer: nn.Module, unfolded: int) -> bool:
    """Whether the kernel is the faster way.

    Args:
        layer: convolution or linear.
        unfolded: elements of an unfolded row.
    """
    if layer_type(layer) is nn.Linear or layer.weight.device.type != "cpu":  # type: ignore[union-attr]
        return False  # on accelerators one product of all images keeps the device busy, many small calls do not
    pointwise = all(k == 1 for k in layer.kernel_size)  # type: ignore[union-attr]
    return int(layer.groups) > 1 or not (pointwise or unfolded <= _FEW)  # type: ignore[arg-type]


def weight_gradients(uses: Sequence[LayerCall], per_image: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients from ``grad`` and from ``other`` (or the same), summed over ``uses``, some rows each."""
    layer: Any = uses[0].layer
    reads, grads = ([batched(layer, x) for x in xs] for xs in ([u.read for u in uses], [u.grad for u in uses]))
    others = None if all(u.other is None for u in uses) else [
        batched(layer, u.grad if u.other is None else u.other) for u in uses
    ]  # fmt: skip
    rows = reads[0].shape[0]
    many = _side_by_side(layer, grads[0]) if per_image else rows
    for start in range(0, rows, many):
        part = slice(start, start + many)

        def total(outs: Sequence[torch.Tensor], part: slice = part) -> torch.Tensor:
            found = [_gradient(layer, r[part], g[part], per_image) for r, g in zip(reads, outs)]
            return found[0] if len(found) == 1 else torch.stack(found).sum(0)

        g = total(grads)
        yield g, g if others is None else total(others)


def _side_by_side(layer: Any, grad: torch.Tensor) -> int:
    """Images in one call, as groups of a grouped convolution."""
    if issubclass(layer_type(layer), TRANSPOSED):
        return 1
    work = grad[0, 0].numel() * layer.weight.numel()
    return max(1, _CHANNELS // max(layer.in_channels, layer.out_channels)) if work < _LIGHT else 1


def _gradient(layer: Any, read: torch.Tensor, grad: torch.Tensor, apart: bool) -> torch.Tensor:
    """(images, *weight.shape), or (1, *weight.shape) of all images together."""
    pads, transposed = paddings(layer), issubclass(layer_type(layer), TRANSPOSED)
    dims, images = len(layer.kernel_size), read.shape[0]
    even = all(pads[2 * i] == pads[2 * i + 1] for i in range(dims))
    if (layer.padding_mode != "zeros" and not transposed) or not even:
        read = F.pad(read, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        pads = [0] * (2 * dims)
    weight, groups = layer.weight.detach(), layer.groups
    if apart and images > 1:  # images become groups; a weight is asked for its shape alone
        read, grad = (x.reshape(1, -1, *x.shape[2:]) for x in (read, grad))
        weight, groups = weight.expand(images, *weight.shape).flatten(0, 1), images * groups
    found = torch.ops.aten.convolution_backward(
        grad.contiguous(), read.contiguous(), weight.to(grad.dtype), None, list(layer.stride),
        list(reversed(pads[::2])), list(layer.dilation), transposed, list(layer.output_padding), groups,
        [False, True, False],
    )[1]  # fmt: skip
    return found.reshape(images if apart else 1, *layer.weight.shape)
