"""A network trained as what integer kernels compute: armed, resumed, and loaded without a Trainer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning import HAWQ, MeasureConfig, QuantizerConfig, SelectConfig, load_from_checkpoint
from hawq_lightning.quantization import biases_of, quantized_results
from tests.trainers import Classifier, loader, same_states, trainer


class Block(nn.Module):
    """A residual block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.conv(x)) + x).mean((2, 3)))


class Task(Classifier):
    """With that network."""

    def __init__(self, width: int = 1) -> None:
        super().__init__(width)
        self.net = Block()


def data() -> DataLoader:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 3, 6, 6, generator=g), torch.randint(0, 4, (32,), generator=g)
    return DataLoader(TensorDataset(x, y), 16)


def fit(folder, epochs, name="uniform", ckpt=None):
    torch.manual_seed(0)
    quantizer = QuantizerConfig(name, (2, 4, 8), deploy="integer")
    select = SelectConfig("4x", "uniform")
    callback = HAWQ(quantizer=quantizer, measure=MeasureConfig(images=32, max_probes=2), select=select, dirpath=folder)
    task, t = Task(), trainer(folder, callback, max_epochs=epochs)
    t.fit(task, data(), ckpt_path=ckpt)
    return task, callback, t


def test_a_resumed_run_ends_as_an_undisturbed_one_and_others_load_it(tmp_path):
    whole, callback, _ = fit(tmp_path, 2)
    assert callback.plan.biases == {"net.conv": "net.norm"}
    results = {n: x.input_quantizer.bits for n, x in quantized_results(whole).items()}
    # the network's input is read by the sum as by the convolution; of 8 bits both
    assert results == {"net:add[1]": 8, "net.norm:output": 8, "net:relu": 8}
    assert callback.plan["net.conv.input"].layers == ("net.conv", "net:add[1]")
    assert "net:relu" in callback.plan.bits
    _, _, t = fit(tmp_path / "half", 1)
    t.save_checkpoint(tmp_path / "half.ckpt")
    resumed, again, _ = fit(tmp_path / "resumed", 2, ckpt=tmp_path / "half.ckpt")
    assert same_states(resumed.state_dict(), whole.state_dict()) and again.plan.biases == callback.plan.biases
    t.save_checkpoint(tmp_path / "whole.ckpt")
    loaded = load_from_checkpoint(Task, tmp_path / "whole.ckpt")
    assert biases_of(loaded) == callback.plan.biases and quantized_results(loaded).keys() == results.keys()


def test_a_network_without_integer_kernels_is_told_of(tmp_path):
    class Nothing(Classifier):
        def __init__(self) -> None:
            super().__init__(1)
            self.net = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 4))

    quantizer, select = QuantizerConfig(deploy="integer"), SelectConfig("4x", "uniform")
    callback = HAWQ(quantizer=quantizer, select=select, dirpath=tmp_path)
    with pytest.warns(UserWarning, match="no layer of this network gives codes"):
        trainer(tmp_path, callback, max_steps=1).fit(Nothing(), loader())


@pytest.mark.stress
def test_learned_steps_of_results_follow_those_of_layers(tmp_path):
    task, _, _ = fit(tmp_path, 1, "lsq")
    task.state_dict()  # the last step has moved the layer's alone
    result = quantized_results(task)["net:add[1]"].input_quantizer
    assert float(result.scale) == float(task.net.conv.input_quantizer.scale)
