"""timm's ``Linear``, in MobileNetV3, V4 and GhostNet: nn.Linear with another forward under TorchScript."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.layer_checks import check_quantized, check_traces


def _build() -> nn.Module:
    linear = pytest.importorskip("timm.layers.linear").Linear
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), linear(8, 6), nn.ReLU(), linear(6, 3, bias=False)).eval()


def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_it_is_quantized_with_what_it_reads_trained_and_packed(tmp_path):
    batch = torch.randn(4, 6), torch.arange(4) % 3
    net = check_quantized(_build, batch, _loss, tmp_path)
    assert all(net[i].input_quantizer.bits for i in (2, 4))


def test_traces_are_the_dense_ones():
    batch = torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % 3
    table = check_traces(_build().double(), batch, _loss, exact=("2", "4"))
    assert {"2.weight", "2.input", "4.weight", "4.input"} <= {s.name for s in table}
