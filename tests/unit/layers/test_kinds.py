"""What each kind of layer says of itself, against what the layer does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hawq_lightning.layers import kind_of


@pytest.mark.parametrize("layer, shape", [
    (nn.Conv2d(4, 6, 3, 2, 1, dilation=2, groups=2, bias=False), (3, 4, 9, 8)),
    (nn.Conv2d(4, 4, (1, 3), padding="same", bias=False), (3, 4, 5, 6)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 6, 6)),
    (nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 6, 6)),
    (nn.Conv1d(3, 5, 2, bias=False), (2, 3, 7)),
    (nn.Conv3d(2, 3, 2, 2, bias=False), (2, 2, 4, 4, 4)),
    (nn.Linear(5, 3, bias=False), (2, 4, 5)),
    (nn.Conv2d(2, 3, 3, bias=False), (2, 6, 6)),
])  # fmt: skip
def test_patches_times_weight_are_the_outputs(layer, shape):
    x = torch.randn(*shape)
    rows = layer.weight.detach().reshape(kind_of(layer).groups(layer), -1, layer.weight[0].numel())
    y = layer(x).detach()
    y = y if isinstance(layer, nn.Linear) or y.ndim == layer.weight.ndim else y[None]
    y = y.reshape(-1, len(layer.weight)).T if isinstance(layer, nn.Linear) else y.transpose(0, 1).flatten(1)
    products = (rows @ kind_of(layer).patches(layer, x, 1 << 15).transpose(1, 2)).flatten(0, 1)
    assert torch.allclose(products, y, atol=1e-5)
