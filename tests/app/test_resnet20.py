"""ResNet20, reading weights, and the classification task."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hawq_lightning import HawqError
from hawq_lightning.data import DigitsDataModule, ImageFolderDataModule
from hawq_lightning.models import resnet20
from hawq_lightning.tasks import ClassificationTask

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "resnet20_cifar10.pt"
CIFAR = Path("/tmp/data/cifar10")


def quiet(**changes):
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(**(off | changes))


def test_parameters_shapes_and_names():
    net = resnet20()
    assert sum(p.numel() for p in net.parameters()) == 269_722
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    names = dict(net.named_parameters())
    assert {"conv1.weight", "bn1.bias", "layer3.2.conv2.weight", "linear.bias"} <= set(names)
    grey = resnet20(num_classes=7, in_channels=1, channels=4, depth=8)
    assert grey(torch.randn(2, 1, 8, 8)).shape == (2, 7)


def test_shortcut_is_a_strided_slice_padded_with_zero_channels():
    block = resnet20(channels=4).layer2[0].eval()
    for conv in (block.conv1, block.conv2):
        nn.init.zeros_(conv.weight)
    x = torch.rand(1, 4, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert out[:, :2].abs().sum() == 0 and out[:, 6:].abs().sum() == 0


@pytest.mark.parametrize(("wrong", "words"), [({"depth": 21}, "nearest is 20"), ({"channels": 0}, "channels=0")])
def test_impossible_networks(wrong, words):
    with pytest.raises(HawqError, match=words):
        resnet20(**wrong)


def test_weights_roundtrip_also_from_a_lightning_checkpoint(tmp_path):
    net = resnet20(channels=4, depth=8)
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    torch.save({"state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "last.ckpt")
    x = torch.randn(2, 3, 16, 16)
    for name in ("plain.pt", "last.ckpt"):
        again = resnet20(channels=4, depth=8, weights=tmp_path / name)
        assert torch.equal(again.eval()(x), net.eval()(x))


def test_weights_that_cannot_be_used(tmp_path):
    with pytest.raises(HawqError, match="nope"):
        resnet20(weights=tmp_path / "nope.pt")
    torch.save(resnet20(channels=4, depth=8).state_dict(), tmp_path / "small.pt")
    with pytest.raises(HawqError, match="small.pt"):
        resnet20(weights=tmp_path / "small.pt")
    with pytest.raises(HawqError, match="10 classes"):
        resnet20(num_classes=3, channels=4, depth=8, weights=tmp_path / "small.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "small.pt").read_bytes()[:2000])
    with pytest.raises(HawqError, match="cut.pt"):
        resnet20(weights=tmp_path / "cut.pt")


@pytest.mark.skipif(not SHARED.is_file(), reason="no ../shared/data beside this checkout")
def test_given_weights_load_unchanged():
    net = resnet20(weights=SHARED)
    state = torch.load(SHARED, weights_only=True)
    assert set(state) == set(net.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@pytest.mark.skipif(not (SHARED.is_file() and CIFAR.is_dir()), reason="CIFAR-10 is not unpacked at /tmp/data/cifar10")
def test_given_weights_reach_their_accuracy():
    data = ImageFolderDataModule(CIFAR, train="val", augment="none", num_classes=10, batch_size=500)
    task = ClassificationTask(resnet20(weights=SHARED), 10)
    found = quiet().validate(task, data, verbose=False)[0]
    assert found["val/acc"] == pytest.approx(0.8806, abs=5e-5)


class TwoHeads(nn.Module):
    """Auxiliary logits in training, as InceptionV3."""

    quantization_exclude = ("other.*",)

    def __init__(self):
        super().__init__()
        self.main, self.other = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        return (self.main(x), self.other(x)) if self.training else self.main(x)


def test_auxiliary_logits_enter_the_training_loss_only():
    net = TwoHeads()
    task = ClassificationTask(net, 10, auxiliary_weight=0.4, label_smoothing=0.1)
    x, y = torch.randn(5, 1, 8, 8), torch.arange(5)
    task.log = task.log_dict = lambda *a, **k: None
    expected = F.cross_entropy(net.main(x.flatten(1)), y, label_smoothing=0.1)
    expected = expected + 0.4 * F.cross_entropy(net.other(x.flatten(1)), y, label_smoothing=0.1)
    assert torch.allclose(task.training_step((x, y)), expected)
    task.eval()
    assert torch.equal(task(x), net.main(x.flatten(1)))
    assert task.quantization_exclude == ("net.other.*",)


@pytest.mark.parametrize("settings", [
    {"optimizer": "sgd", "lr": 0.1, "schedule": "onecycle"},
    {"optimizer": "adamw", "lr": 0.01, "schedule": "cosine"},
    {"optimizer": "sgd", "lr": 0.05, "schedule": "none"},
], ids=lambda s: "-".join(map(str, s.values())))  # fmt: skip
def test_training_learns_the_digits(settings):
    pl.seed_everything(0, verbose=False)
    task = ClassificationTask(resnet20(in_channels=1, channels=8, depth=8), 10, **settings)
    trainer = quiet(max_epochs=3)
    trainer.fit(task, DigitsDataModule())
    assert float(trainer.callback_metrics["val/acc"]) > 0.7
    assert set(trainer.callback_metrics) >= {"train/loss", "train/acc", "val/loss", "val/acc", "val/acc_top5"}
    groups = trainer.optimizers[0].param_groups
    assert groups[0]["weight_decay"] > 0 and groups[1]["weight_decay"] == 0
    if settings["schedule"] != "none":
        assert groups[0]["lr"] < settings["lr"] / 100


def test_hyperparameters_hold_no_network():
    task = ClassificationTask(resnet20(channels=4, depth=8), 10, lr=0.3)
    assert task.hparams["lr"] == 0.3 and "net" not in task.hparams


@pytest.mark.parametrize(("wrong", "words"), [
    ({"optimizer": "sdg"}, "Did you mean 'sgd'"),
    ({"schedule": "cosin"}, "Did you mean 'cosine'"),
    ({"num_classes": 1}, "num_classes=1"),
    ({"label_smoothing": 1.5}, "label_smoothing"),
    ({"lr": 0}, "lr=0"),
])  # fmt: skip
def test_task_refuses(wrong, words):
    with pytest.raises(HawqError, match=words):
        ClassificationTask(**({"net": nn.Linear(2, 2), "num_classes": 10} | wrong))


def test_test_split_is_the_held_out_one():
    task = ClassificationTask(resnet20(in_channels=1, channels=4, depth=8), 10)
    trainer, data = quiet(), DigitsDataModule()
    held_out, last = trainer.validate(task, data, verbose=False)[0], trainer.test(task, data, verbose=False)[0]
    assert last["test/acc"] == held_out["val/acc"] and last["test/loss"] == pytest.approx(held_out["val/loss"])
