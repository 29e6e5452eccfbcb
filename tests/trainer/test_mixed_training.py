"""Fast fine-tuning on CPUs: bfloat16 in training only, channels last, and in bfloat16 the codes of the fused kernel."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from hawq_lightning import HawqError
from hawq_lightning.callbacks import ChannelsLast, MixedTraining
from hawq_lightning.quantization import fake_quantize_tensor
from tests.trainers import Classifier, loader, trainer


class Watcher(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        out = self.net(batch)
        self.seen["training"] = out.dtype
        self.strides = self.net[0].weight.stride()
        return out.float().square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen["validation"] = self.net(batch).dtype

    def predict_step(self, batch, batch_idx):
        return self.net(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_only_training_is_in_bfloat16_and_weights_are_channels_last():
    torch.manual_seed(0)
    module, data = Watcher(), DataLoader(torch.randn(4, 3, 8, 8), 2)
    before = module.net(data.dataset)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=1, plugins=[MixedTraining("cpu")], callbacks=[ChannelsLast()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    # float32: bfloat16 would be a thousandth off, another layout is by the order of its sums
    torch.testing.assert_close(torch.cat(trainer.predict(module, data)), before, rtol=1e-5, atol=1e-6)
    trainer.fit(module, data, data)
    assert module.seen == {"training": torch.bfloat16, "validation": torch.float32}
    assert module.strides == (27, 1, 9, 3) and module.net[0].weight.dtype == torch.float32


def test_an_unknown_device_is_named():
    with pytest.raises(HawqError, match="'tpu' is unknown; use cpu or cuda"):
        MixedTraining("tpu")


@pytest.mark.parametrize("zero", [0.0, 7.0])
def test_bfloat16_gets_the_codes_of_the_fused_kernel(zero):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(500), torch.tensor([0.0, 1e30, -1e30, 1e-40])]).bfloat16().requires_grad_()
    scale = torch.tensor(0.073)
    ours = fake_quantize_tensor(x, scale, torch.tensor(zero), 15)
    fused = torch.fake_quantize_per_tensor_affine(x, scale, torch.tensor(int(zero), dtype=torch.int32), 0, 15)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, fused)
    assert len(ours.unique()) == 16
    (slope,) = torch.autograd.grad(ours.sum(), x)
    assert torch.equal(slope, torch.autograd.grad(fused.sum(), x)[0]) and 0 < float(slope.float().mean()) < 1


def test_channels_last_lays_out_what_it_can(tmp_path):
    class Late(Classifier):
        def configure_model(self):
            if not hasattr(self, "late"):
                self.late = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv3d(2, 2, 3)])

    model = Late()
    trainer(tmp_path, ChannelsLast()).fit(model, loader())
    assert model.late[0].weight.is_contiguous(memory_format=torch.channels_last)
