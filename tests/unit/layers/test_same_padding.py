"""timm's convolutions with TensorFlow's padding: strides, odd sizes, groups, dilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import sites
from tests.layer_checks import check_quantized, check_traces

FORMS: dict[str, dict[str, Any]] = {
    "stride": {"kernel_size": 3, "stride": 2},
    "depthwise": {"kernel_size": 5, "stride": 2, "groups": 4},
    "dilated": {"kernel_size": 3, "stride": 1, "dilation": 2, "bias": False},
    "oblong": {"kernel_size": (1, 3), "stride": (2, 3)},
}


def _build(form: str) -> nn.Module:
    same = pytest.importorskip("timm.layers.conv2d_same").Conv2dSame
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), same(4, 4, **FORMS[form]), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    ).eval()  # fmt: skip


def _made(form: str) -> nn.Module:
    net = _build(form)
    net(torch.zeros(1, 2, 7, 8))
    return net


def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("form", FORMS)
def test_it_is_quantized_with_what_it_reads_trained_and_packed(form, tmp_path):
    torch.manual_seed(1)
    batch = torch.randn(3, 2, 7, 8), torch.arange(3)
    net = check_quantized(lambda: _made(form), batch, _loss, tmp_path)
    assert net[2].input_quantizer.bits


@pytest.mark.parametrize("form", FORMS)
def test_traces_and_products_are_right(form):
    torch.manual_seed(1)
    batch = torch.randn(3, 2, 7, 8, dtype=torch.float64), torch.arange(3)
    net = _made(form).double()
    table = check_traces(net, batch, _loss, exact=("2",))
    y = net[2](net[0](batch[0]))
    (layer,) = (x for x in table.layers if x.name == "2")
    assert layer.macs == y[0].numel() * net[2].weight[0].numel()
    assert not any(f.name == "(functional)" for f in sites(net.float(), batch[0].float()).floats)
