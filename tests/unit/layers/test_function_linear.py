"""Attention whose children are read by ``F.linear``: Swin of torchvision, BEiT and EVA-02 of timm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2

from tests.layer_checks import check_quantized, check_traces


def _swin(**options: Any) -> nn.Module:
    return SwinTransformer([2, 2], 8, [2], [2], [2, 2], mlp_ratio=1, num_classes=3, stochastic_depth_prob=0, **options)


def _timm(module: str, name: str, **options: Any) -> nn.Module:
    made = getattr(pytest.importorskip(f"timm.models.{module}"), name)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    return made(**sizes, mlp_ratio=1, head_init_scale=10.0, **options)


def _swin_v2_of_timm() -> nn.Module:
    made = pytest.importorskip("timm.models.swin_transformer_v2").SwinTransformerV2
    net = made(img_size=8, patch_size=2, num_classes=3, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=2)
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)  # the branches begin at zero otherwise, and send nothing back
    return net


class _Video(nn.Module):
    """One block of torchvision's video Swin on images as single frames."""

    def __init__(self) -> None:
        from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 3)
        self.attention = ShiftedWindowAttention3d(8, [1, 2, 2], [0, 0, 0], 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.attention(self.stem(x).permute(0, 2, 3, 1)[:, None])
        return self.head(h.mean((1, 2, 3)))


NETS = {
    "swin": _swin,
    "swin_v2": lambda: _swin(block=SwinTransformerBlockV2),
    "swin_v2_timm": _swin_v2_of_timm,
    "video": _Video,
    "beit": lambda: _timm("beit", "Beit"),
    "eva02": lambda: _timm("eva", "Eva", qkv_bias=True, use_rot_pos_emb=False),
}


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().eval()


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _batch(dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    return torch.randn(3, 3, 8, 8, dtype=dtype), torch.arange(3)


@pytest.mark.parametrize("name", NETS)
def test_it_is_whole_quantized_trained_and_packed(name, tmp_path):
    net = check_quantized(lambda: _build(name), _batch(torch.float32), _loss, tmp_path)
    attention = [m for m in net.modules() if type(m).__name__.startswith("Q") and hasattr(m, "qkv_weight_quantizer")]
    assert len(attention) == (2 if "swin" in name else 1) and all(m.qkv_weight_quantizer.bits for m in attention)


def test_traces_are_the_dense_ones():
    net = _build("beit").double()
    table = check_traces(net, _batch(torch.float64), _loss, exact=("head",))
    assert "blocks.0.attn.qkv.weight" in {s.name for s in table.weights}
    assert not any("function reads" in f.reason for f in table.floats)
