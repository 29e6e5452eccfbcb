"""State dicts of release 0.1.0, whose quantizers called the buffer of their bits ``width``, still load."""

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.optim.swa_utils import AveragedModel

from hawq_lightning import Plan
from hawq_lightning.callbacks import load_from_checkpoint
from hawq_lightning.quantization import enabled_bits, prepare, quantize, trained_quantizers
from tests.unit.export.old_network import Small, images

FILES = Path(__file__).parents[1] / "export" / "files"


@pytest.mark.parametrize("name", ["lsq", "int_only"])
def test_a_state_dict_of_0_1_0_gives_the_same_network(name: str) -> None:
    old = torch.load(FILES / f"release_0_1_0_{name}.pt", weights_only=True)
    assert trained_quantizers(old["state_dict"]) == dict.fromkeys(("conv", "up", "head"), name)
    net = Small()
    prepare(net, quantizer=name)
    assert not enabled_bits(net)
    net.load_state_dict(old["state_dict"])
    assert enabled_bits(net) == Plan.from_dict(old["plan"]).bits
    assert torch.allclose(net.eval()(images()), old["y"], rtol=1e-5, atol=1e-6)
    assert not any(key.endswith(".width") for key in net.state_dict())
    averaged = AveragedModel(net)  # what weight averaging keeps beside the network
    averaged.load_state_dict({"n_averaged": torch.tensor(1)} | {f"module.{k}": v for k, v in old["state_dict"].items()})
    assert enabled_bits(averaged.module) == enabled_bits(net)


class Task(LightningModule):
    """Around the network, as a run does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Small()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("name", ["lsq", "int_only"])
def test_a_lightning_checkpoint_of_0_1_0_loads_without_a_trainer(tmp_path: Path, name: str, weights_only: bool) -> None:
    old = torch.load(FILES / f"release_0_1_0_{name}.pt", weights_only=True)
    state = {f"net.{k}": v for k, v in old["state_dict"].items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5.0"}, tmp_path / "last.ckpt")
    task = load_from_checkpoint(Task, tmp_path / "last.ckpt", weights_only=weights_only).eval()
    assert torch.allclose(task(images()), old["y"], rtol=1e-5, atol=1e-6)
    assert {k.removeprefix("net."): b for k, b in enabled_bits(task).items()} == Plan.from_dict(old["plan"]).bits


def test_loading_leaves_the_callers_state_dict_alone() -> None:
    state = torch.load(FILES / "release_0_1_0_lsq.pt", weights_only=True)["state_dict"]
    keys = list(state)
    net = Small()
    prepare(net, quantizer="lsq")
    net.load_state_dict(state)
    assert list(state) == keys
    assert quantize(copy.deepcopy(net), Plan.from_dict(torch.load(FILES / "release_0_1_0_lsq.pt")["plan"])) is not None
