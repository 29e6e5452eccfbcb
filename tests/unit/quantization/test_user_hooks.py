"""Hooks of the user's are called as often in a quantized network as before."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from hawq_lightning.quantization import prepare


class Attention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.block, self.out = kind(), nn.Linear(8, 3)

    def forward(self, x):
        attends = isinstance(self.block, nn.MultiheadAttention)
        y = self.block(x, x, x) if attends else self.block(x)
        return self.out((y[0] if isinstance(y, tuple) else y).mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.table(x[..., 0].abs().long().clamp(0, 8)).mean(1))


NETWORKS = {
    "convolution": lambda: nn.Sequential(nn.Conv1d(5, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
    "attention": lambda: Attention(lambda: nn.MultiheadAttention(8, 2, batch_first=True)),
    "transformer": lambda: Attention(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
    "recurrent": lambda: Attention(lambda: nn.LSTM(8, 8, 2, batch_first=True)),
    "tied": Tied,
}


def calls_in(net, x):
    seen, handles = Counter(), []
    for name, module in net.named_modules():
        if "_quantizer" not in name:
            handles.append(module.register_forward_pre_hook(lambda *_, n=name: seen.update([(n, "before")])))
            handles.append(module.register_forward_hook(lambda *_, n=name: seen.update([(n, "after")])))
            handles.append(module.register_full_backward_hook(lambda *_, n=name: seen.update([(n, "backward")])))
    net(x).sum().backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_hooks_are_called_as_often(name, training):
    torch.manual_seed(0)
    net, x = NETWORKS[name]().train(training), torch.randn(4, 5, 8)
    before = calls_in(net, x)
    layers = prepare(net)
    assert calls_in(net, x) == before
    for layer in layers.values():
        layer.weight_quantizer.fit(layer.weight, 4, "affine")
        if layer.read.reads_activation:
            layer.input_quantizer.enable(8, 0.05, 128.0)
    assert calls_in(net, x) == before
