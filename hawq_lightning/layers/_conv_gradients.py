"""Weight gradients of convolutions, a sample each, and their inner products.

They come from the kernel that training uses where unfolding would copy much. On a CPU it takes a third of the time of
unfolding and multiplying for a 3 x 3 convolution, and a twentieth for a depthwise one (``benchmarks/trace_cost.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.layers._directions import Directions
from hawq_lightning.layers._gradients import (
    Factors,
    Pairs,
    as_one_row,
    gram_is_less,
    gram_products,
    joined,
    products,
    row_dots,
)
from hawq_lightning.layers._kind import LayerCall
from hawq_lightning.layers._projections import ProjectedProducts, projected_factors, projected_pairs
from hawq_lightning.layers._unfold import Conv, as_conv, paddings, unfold, with_batch_axis

_FEW = 1 << 15  # elements of an unfolded sample up to which copying them is cheap
_LIGHT = 10**7  # multiplications a sample below which a call is mostly overhead
_CHANNELS = 256  # of samples side by side in one call


def conv_inner_products(calls: Sequence[LayerCall], per_sample: bool, transposed: bool) -> torch.Tensor:
    """By Gram matrices, products of unfolded inputs, or the convolution's backward kernel: what is least work."""
    by_gram, kernel = _least_work(calls, per_sample, transposed)
    if kernel:
        pairs = conv_gradients(calls, per_sample, transposed)
    else:
        u, d, e = joined([_factors(call, per_sample, transposed) for call in calls])
        if by_gram:
            return gram_products(u, d, e)
        pairs = products(u, d, None if all(call.other is None for call in calls) else e)
    return torch.cat([row_dots(g, h) for g, h in pairs])


def conv_projected_products(
    calls: Sequence[LayerCall], per_sample: bool, transposed: bool, directions: Directions
) -> ProjectedProducts:
    """See :meth:`hawq_lightning.layers.LayerKind.projected_products`."""
    if _least_work(calls, per_sample, transposed)[1]:
        return projected_pairs(conv_gradients(calls, per_sample, transposed), directions)
    layer = as_conv(calls[0].layer)
    u, d, e = joined([_factors(call, per_sample, transposed) for call in calls])
    other = None if all(call.other is None for call in calls) else e
    if int(layer.groups) == 1 and not transposed:
        return projected_factors(u, d, other, len(directions), lambda b: directions.part(0, b).flatten(2)[:, None])
    matrices = directions.whole().reshape(len(directions), layer.groups, layer.weight.shape[0] // layer.groups, -1)
    matrices = matrices.mT if transposed else matrices
    return projected_factors(u, d, other, len(directions), lambda b: matrices[:, :, b])


def _least_work(calls: Sequence[LayerCall], per_sample: bool, transposed: bool) -> tuple[bool, bool]:
    """Whether Gram matrices are the least work, and whether the backward kernel is."""
    layer = as_conv(calls[0].layer)
    weight, groups = layer.weight, int(layer.groups)
    rows, columns = weight.shape[0] // groups, weight[0].numel()
    positions = sum((c.read if transposed else c.grad).numel() // weight.shape[0] for c in calls)
    samples = 1 if calls[0].grad.ndim < weight.ndim else calls[0].grad.shape[0]
    positions = positions // samples if per_sample else positions
    by_gram = gram_is_less(positions, rows, columns)
    return by_gram, not by_gram and by_kernel(layer, positions * columns * groups)


def conv_gradients(calls: Sequence[LayerCall], per_sample: bool, transposed: bool) -> Pairs:
    """By the backward kernel; see :meth:`hawq_lightning.layers.LayerKind.weight_gradients`."""
    layers = [as_conv(call.layer) for call in calls]
    reads, grads = (
        [with_batch_axis(layer, x) for layer, x in zip(layers, xs)]
        for xs in ([c.read for c in calls], [c.grad for c in calls])
    )
    others = None
    if any(call.other is not None for call in calls):
        others = [with_batch_axis(x, c.grad if c.other is None else c.other) for x, c in zip(layers, calls)]
    rows = reads[0].shape[0]
    at_once = _side_by_side(layers[0], grads[0], transposed) if per_sample else rows
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)

        def total(outs: Sequence[torch.Tensor], part: slice = part) -> torch.Tensor:
            calls_of_part = zip(layers, reads, outs)
            terms = [_gradient(x, r[part], g[part], per_sample, transposed) for x, r, g in calls_of_part]
            return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)

        g = total(grads)
        yield g, g if others is None else total(others)


def by_kernel(layer: nn.Module, unfolded: int) -> bool:
    """Whether the convolution's backward kernel is the faster way to a gradient.

    Args:
        layer: a convolution.
        unfolded: elements of an unfolded row.
    """
    conv = as_conv(layer)
    if conv.weight.device.type != "cpu":
        return False  # on accelerators one product of all samples keeps the device busy, many small calls do not
    pointwise = all(k == 1 for k in conv.kernel_size)
    return int(conv.groups) > 1 or not (pointwise or unfolded <= _FEW)


def _side_by_side(layer: Conv, grad: torch.Tensor, transposed: bool) -> int:
    """Samples in one call, as groups of a grouped convolution."""
    if transposed:
        return 1
    work = grad[0, 0].numel() * layer.weight.numel()
    return max(1, _CHANNELS // max(layer.in_channels, layer.out_channels)) if work < _LIGHT else 1


def _factors(call: LayerCall, per_sample: bool, transposed: bool) -> Factors:
    layer, other = as_conv(call.layer), call.grad if call.other is None else call.other
    if transposed:
        # the gradient of a transposed convolution is that of a convolution with input and output in each other's
        # place; G = read . unfold(grad)^T: the roles of C and K are swapped, the inner product is the same
        d, e = unfold(layer, call.grad, call.read, True), unfold(layer, other, call.read, True)
        u = _grouped(layer, call.read)
    else:
        u = unfold(layer, call.read, call.grad)
        d = _grouped(layer, call.grad)
        e = d if call.other is None else _grouped(layer, other)
    return (u, d, e) if per_sample else as_one_row((u, d, e))


def _grouped(layer: Conv, x: torch.Tensor) -> torch.Tensor:
    x = with_batch_axis(layer, x)
    return x.reshape(x.shape[0], layer.groups, x.shape[1] // layer.groups, -1)


def _gradient(layer: Conv, read: torch.Tensor, grad: torch.Tensor, per_sample: bool, transposed: bool) -> torch.Tensor:
    """``[samples, *weight.shape]``, or ``[1, *weight.shape]`` of all samples together."""
    pads, dims, samples = paddings(layer, transposed), len(layer.kernel_size), read.shape[0]
    even = all(pads[2 * i] == pads[2 * i + 1] for i in range(dims))
    if (layer.padding_mode != "zeros" and not transposed) or not even:
        read = F.pad(read, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        pads = [0] * (2 * dims)
    weight, groups = layer.weight.detach(), layer.groups
    if per_sample and samples > 1:  # samples become groups; a weight is asked for its shape alone
        read, grad = (x.reshape(1, -1, *x.shape[2:]) for x in (read, grad))
        weight, groups = weight.expand(samples, *weight.shape).flatten(0, 1), samples * groups
    gradient = torch.ops.aten.convolution_backward(
        grad.contiguous(), read.contiguous(), weight.to(grad.dtype), None, list(layer.stride),
        list(reversed(pads[::2])), list(layer.dilation), transposed, list(layer.output_padding), groups,
        [False, True, False],
    )[1]  # fmt: skip
    return gradient.reshape(samples if per_sample else 1, *layer.weight.shape)  # type: ignore[no-any-return]
