"""Grouped, transposed and reflecting convolutions in every precision."""

from __future__ import annotations

import pytest
import torch

import hawq_lightning as hl
from hawq_lightning.quantization import enabled_bits
from tests.small_network import Small, cross_entropy, images, small_plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_unusual_layers_in_every_precision(dtype, tmp_path):
    torch.manual_seed(0)
    model, fresh = Small().to(dtype), Small().to(dtype)
    plan = small_plan(model, dtype)
    hl.quantize(model, plan)
    assert len(set(enabled_bits(model).values())) >= 2
    cross_entropy(model, images(dtype)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    hl.save_packed(model, plan, tmp_path / "model.safetensors")
    hl.load_packed(tmp_path / "model.safetensors", fresh)
    assert torch.equal(fresh(images(dtype)[0]), model(images(dtype)[0]))
