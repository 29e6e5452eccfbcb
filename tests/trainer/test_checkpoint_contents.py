"""What a checkpoint holds is enough: compiled networks, quantizer options, excluded layers, copies and pickles."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, load_from_checkpoint
from hawq_lightning.quantization import enabled_bits, plan_of
from tests.trainers import Classifier, assert_mixed, fit_beside, hawq, loader, mlp, trainer, weights_only


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")
def test_a_checkpoint_of_a_network_with_an_excluded_layer_loads(tmp_path):
    model = Classifier()
    first = trainer(tmp_path, hawq(exclude="net.6"))
    first.fit(model, loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = Classifier()
    trainer(tmp_path, hawq(exclude="net.6")).test(again, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    resumed = Classifier()
    callback = hawq(exclude="net.6")
    trainer(tmp_path, callback, max_epochs=2).fit(
        resumed, loader(), ckpt_path=tmp_path / "last.ckpt", **weights_only(False)
    )
    assert_mixed(resumed, callback)
    assert enabled_bits(model) == enabled_bits(again) == enabled_bits(resumed) and type(again.net[6]) is nn.Linear


def test_a_compiled_network_loads_from_its_checkpoint(tmp_path):
    class Compiled(Classifier):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(mlp(16), backend="eager")

    model, fitted = Compiled(), trainer(tmp_path, hawq())
    fitted.fit(model, loader())
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    assert enabled_bits(load_from_checkpoint(Compiled, tmp_path / "x.ckpt")) == enabled_bits(model)


def test_a_checkpoint_brings_its_quantizers_options(tmp_path):
    model = Classifier()
    fitted = trainer(tmp_path, hawq(quantizer="int_only", options={"momentum": 0.5}, weight_bits=8, budget="3x"))
    fitted.fit(model, loader())
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    again = load_from_checkpoint(Classifier, tmp_path / "x.ckpt")
    assert plan_of(again).quantizer_options == plan_of(model).quantizer_options == {"momentum": 0.5}

    class Smaller(Classifier):
        def __init__(self, width=16):
            super().__init__(width)
            self.net = self.net[:-1]

    with pytest.raises(HawqError, match=r"'net\.6', which Smaller lacks"):
        load_from_checkpoint(Smaller, tmp_path / "x.ckpt")


@pytest.mark.feature("Modules", "`deepcopy` and pickle of the fitted module", "works")
def test_the_fitted_module_copies_and_pickles(tmp_path):
    model, callback = Classifier(), hawq()
    fit_beside(tmp_path, model, callback, [], True, max_epochs=1)
    model.trainer = None
    twin = copy.deepcopy(model)
    assert enabled_bits(twin) == enabled_bits(model)
    torch.save(model.net, tmp_path / "net.pt")
    net = torch.load(tmp_path / "net.pt", weights_only=False).eval()
    x = torch.randn(5, 12)
    model.eval()
    assert torch.equal(net(x), model(x)) and torch.equal(twin.eval()(x), model(x))
