"""Three unrelated styles of LightningModule (tests/styles), unchanged, with the one added callback."""

import importlib

import lightning.pytorch.callbacks
import pytest
import torch
from torch import nn

from tests.trainers import assert_mixed, hawq


@pytest.mark.feature(
    "Modules",
    "three styles of other people's code: Lightning's demos; a template with net, optimizers and metrics handed in "
    "(plain and compiled); a torchvision reference with mixup, warm-up, decay groups and EMA",
    "run unchanged with the one added callback",
)
@pytest.mark.parametrize(
    "style, settings, layers",
    [("demo", {}, 4), ("template", {}, 3), ("template", {"compile": True}, 3), ("reference", {}, 9)],
    ids=["demo", "template", "template_compiled", "reference"],
)
def test_a_style(tmp_path, style, settings, layers):
    if style == "reference" and not hasattr(lightning.pytorch.callbacks, "EMAWeightAveraging"):
        pytest.skip("its moving average is of Lightning 2.6")
    torch.manual_seed(0)
    callback = hawq(budget="9x", rtol=1.0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
             "enable_model_summary": False, "default_root_dir": tmp_path, "accelerator": "cpu"}  # fmt: skip
    model = importlib.import_module(f"tests.styles.{style}").main([callback], **settings, **quiet)
    assert_mixed(model, callback)
    assert len(callback.plan.weights) == layers
    assert callback.plan.costs["float_weight_bytes"] / callback.plan.costs["weight_bytes"] >= 9
    assert all(isinstance(p, nn.Parameter) and torch.isfinite(p).all() for p in model.parameters())
