"""Modules with several weights, and weights that functions read, as ONNX files."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from hawq_lightning import load_packed, quantize, save_packed
from hawq_lightning.export import to_onnx
from hawq_lightning.export.onnx import session
from tests.unit.export.test_onnx import planned

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Read(nn.Module):
    """A module on sequences, and a classifier of their mean."""

    def __init__(self, module: nn.Module, size: int = 8) -> None:
        super().__init__()
        self.module, self.head = module, nn.Linear(size, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = (x, x, x) if isinstance(self.module, nn.MultiheadAttention) else (x,)
        y = self.module(*inputs)
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


def _beit() -> nn.Module:
    beit = pytest.importorskip("timm.models.beit").Beit
    return beit(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3, mlp_ratio=1)


NETS = {
    "attention": lambda: Read(nn.MultiheadAttention(8, 2, batch_first=True)),
    "other keys": lambda: Read(nn.MultiheadAttention(8, 2, kdim=8, vdim=8, batch_first=True, bias=False)),
    "encoder": lambda: Read(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
    "lstm": lambda: Read(nn.LSTM(8, 6, batch_first=True), 6),
    "swin": lambda: SwinTransformer([2, 2], 8, [2], [2], [2, 2], mlp_ratio=1, num_classes=3, stochastic_depth_prob=0),
    "beit": _beit,
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("attention", "beit") else pytest.mark.stress) for n in NETS]
)
def test_the_onnx_file_gives_what_the_packed_file_gives(name, tmp_path):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    x = torch.randn(3, 3, 8, 8) if name in ("swin", "beit") else torch.randn(3, 5, 8)
    plan = planned(net, x, "affine", lambda i: (2, 4, 8)[i % 3])
    expected = quantize(net, plan)(x)
    save_packed(net, plan, tmp_path / "model.safetensors")
    assert torch.equal(load_packed(tmp_path / "model.safetensors", NETS[name]().eval())(x), expected)
    to_onnx(net, plan, x, tmp_path / "model.onnx")
    run = session(tmp_path / "model.onnx", optimize=False)
    for samples in (3, 1):  # the batch size is free
        (found,) = run.run(None, {run.get_inputs()[0].name: x[:samples].numpy()})
        assert torch.allclose(torch.from_numpy(found), expected[:samples], atol=1e-5)


class Bags(nn.Module):
    """Looked up in a loop, whose body reads constants of the graph around it."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 6, mode="sum"), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bag(x))


class AsksForType(nn.Module):
    """As transformers' ViT, CLIP and T5 do, before their layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.stem.weight.shape[1] == x.shape[1]
        return self.head(self.stem(x.to(self.stem.weight.dtype)).mean((2, 3)).to(self.head.weight.dtype))


@pytest.mark.parametrize("net", [Bags(), AsksForType()], ids=["bags", "type"])
def test_what_surrounds_a_weight_is_kept(net, tmp_path):
    x = torch.randint(0, 20, (4, 5)) if isinstance(net, Bags) else torch.randn(4, 3, 8, 8)
    plan = planned(net, x, "affine", lambda i: (2, 4, 8)[i % 3])
    expected = quantize(net.eval(), plan)(x)
    to_onnx(net, plan, x, tmp_path / "model.onnx")
    run = session(tmp_path / "model.onnx", optimize=False)
    (found,) = run.run(None, {run.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)
