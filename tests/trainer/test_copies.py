"""Copies of the network that follow its weights, made before ``setup``: quantized like it, widths never averaged."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hawq_lightning import load_packed, save_packed
from hawq_lightning.export import deploy
from hawq_lightning.quantization import quantized_layers
from tests.trainers import Classifier, assert_mixed, fit, hawq, loader, trainer

DECAY = 0.5
# copies and teachers in the module, which the loss does not train
pytestmark = pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")


HELD: dict[str, torch.nn.Module] = {}  # by a global variable


class Global(Classifier):
    """Its average is in a global variable, where nobody else looks."""

    def __init__(self):
        super().__init__()
        HELD["average"] = copy.deepcopy(self.net)

    def on_train_batch_end(self, *args):
        blend(HELD["average"].parameters(), self.net.parameters())


def test_a_copy_in_a_global_variable_is_told_of_and_one_that_does_not_move_is_not(tmp_path):
    HELD["teacher"] = Classifier().net
    model = Global()
    with pytest.warns(UserWarning, match="global variable holds a copy") as told:
        trainer(tmp_path, hawq(), max_epochs=1).fit(model, loader())
    assert sum("global variable" in str(w.message) for w in told) == 1
    assert not quantized_layers(HELD["average"]) and not quantized_layers(HELD["teacher"])
    HELD.clear()


def blend(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        a.detach().copy_(DECAY * a.detach() + (1 - DECAY) * b.detach())


def by_state_dict(average, net):
    blend(average.state_dict().values(), net.state_dict().values())


def by_parameters(average, net):
    blend(average.parameters(), net.parameters())


def by_parameters_and_buffers(average, net):
    tensors = (itertools.chain(m.parameters(), m.buffers()) for m in (average, net))
    blend(*([t for t in ts if t.is_floating_point()] for ts in tensors))


def by_names(average, net):
    theirs = dict(net.named_parameters())
    for name, parameter in average.named_parameters():
        parameter.data = DECAY * parameter.data + (1 - DECAY) * theirs[name].data


class Submodule(Classifier):
    update = staticmethod(by_state_dict)

    def __init__(self):
        super().__init__()
        self.hold(copy.deepcopy(self.net))

    def hold(self, average):
        self.average = average

    def on_train_batch_end(self, *args):
        self.update(self.average, self.net)

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-2)


class Attribute(Submodule):
    def hold(self, average):
        object.__setattr__(self, "average", average)


class Listed(Submodule):
    def hold(self, average):
        self.averages = [average]

    @property
    def average(self):
        return self.averages[0]


class TorchAverage(Submodule):
    """``AveragedModel`` with buffers."""

    def __init__(self):
        Classifier.__init__(self)
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)

    def update(self, average, net):
        average.update_parameters(net)


class Ema:
    """No module, and what it holds is a copy of all."""

    def __init__(self, module):
        self.module = copy.deepcopy(module)

    def update(self, module):
        by_state_dict(self.module, module)


class EmaCallback(Callback):
    def __init__(self, module):
        self.ema = Ema(module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.ema.update(pl_module)


def bits_of(module):
    layers = quantized_layers(module)
    return {n: (x.weight_quantizer.bits, x.input_quantizer.bits) for n, x in layers.items()}


def same_bits(average, net):
    widths = {k: float(v) for k, v in average.state_dict().items() if k.endswith("num_bits")}
    return bits_of(average) == bits_of(net) and all(v == int(v) for v in widths.values()) and any(widths.values())


def variant(kind, update):
    return type(f"{kind.__name__}_{update.__name__}", (kind,), {"update": staticmethod(update)})


@pytest.mark.feature("Other callbacks", "EMA and target networks made by hand, in the module or beside it", "quantized")
@pytest.mark.parametrize(
    "kind",
    [
        Submodule, Attribute, Listed, TorchAverage, variant(Submodule, by_parameters), variant(Attribute, by_names),
        variant(Attribute, by_parameters_and_buffers),
    ],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_a_copy_is_quantized_like_the_network(tmp_path, kind):
    torch.manual_seed(0)
    model = kind()
    callback = fit(tmp_path, model, loader(), max_epochs=2)
    average = getattr(model.average, "module", model.average)
    assert same_bits(average, model.net)
    assert all(n.startswith("net.") for s in callback.plan.sites for n in s.layers)
    weights = (average[0].weight, model.net[0].weight)
    assert not torch.equal(*weights) and torch.allclose(*weights, atol=0.2)
    if torch.equal(average[1].running_mean, torch.zeros(16)):  # parameters alone were averaged
        return
    model.eval()
    average.eval()
    x = torch.stack([row[0] for row in loader().dataset])
    assert (average(x).argmax(1) == model.net(x).argmax(1)).float().mean() > 0.8


def test_a_copy_of_the_module_in_a_callback(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    averaging = EmaCallback(model)
    trainer(tmp_path, averaging, hawq(), max_epochs=2).fit(model, loader())
    assert same_bits(averaging.ema.module, model)


def test_learned_steps_of_a_copy_are_averaged(tmp_path):
    torch.manual_seed(0)
    model = variant(Attribute, by_parameters)()
    fit(tmp_path, model, loader(), quantizer="lsq", max_epochs=2)
    assert same_bits(model.average, model.net)
    steps = model.average[0].weight_quantizer.step, model.net[0].weight_quantizer.step
    assert not torch.equal(*steps) and torch.allclose(*steps, atol=0.1)


def test_a_teacher_of_the_same_make_stays_float(tmp_path):
    class Taught(Submodule):
        def on_train_batch_end(self, *args):
            pass

        def loss(self, batch):
            with torch.no_grad():
                target = self.average(batch[0]).softmax(1)
            return torch.nn.functional.cross_entropy(self.net(batch[0]), target)

    torch.manual_seed(0)
    model = Taught()
    fit(tmp_path, model, loader(), max_epochs=2)
    assert not any(any(bits) for bits in bits_of(model.average).values())


@pytest.mark.parametrize("frozen_epochs", [0, 2])
def test_a_twin_that_learns_is_no_copy(tmp_path, frozen_epochs):
    """As the auxiliary head of InceptionV3, whose convolutions have the form of others: left out, and trained."""

    class Twins(Submodule):
        def on_train_epoch_start(self):
            self.average.requires_grad_(self.current_epoch >= frozen_epochs)

        def on_train_batch_end(self, *args):
            pass

        def loss(self, batch):
            return sum(torch.nn.functional.cross_entropy(net(batch[0]), batch[1]) for net in (self.net, self.average))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    torch.manual_seed(0)
    model = Twins()
    before = model.average[0].weight.clone()
    callback = hawq(exclude=("average.*",))
    # a validation clears the gradients before it begins
    trainer(tmp_path, callback, max_epochs=4).fit(model, loader(), loader(shuffle=False))
    assert not torch.equal(before, model.average[0].weight)
    assert not any(any(bits) for bits in bits_of(model.average).values())
    assert_mixed(model, callback)


def test_a_copy_goes_on_from_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = Submodule()
    first = trainer(tmp_path, hawq(), max_epochs=1)
    first.fit(model, loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    again = Submodule()
    callback = hawq()
    trainer(tmp_path, callback, max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "one.ckpt")
    assert same_bits(again.average, again.net) and bits_of(again.net) == bits_of(model.net)
    assert all(n.startswith("net.") for s in callback.plan.sites for n in s.layers)


@pytest.mark.parametrize("kind", [Submodule, TorchAverage, variant(Submodule, by_parameters)], ids=lambda k: k.__name__)
def test_a_module_with_a_copy_is_packed_whole_and_a_fresh_one_loads_it(tmp_path, kind):
    torch.manual_seed(0)
    model = kind()
    plan = fit(tmp_path, model, loader(), max_epochs=1).plan
    model.eval()
    save_packed(model, plan, tmp_path / "whole.safetensors")
    fresh = load_packed(tmp_path / "whole.safetensors", kind().eval())
    x = torch.stack([row[0] for row in loader().dataset])
    assert torch.equal(fresh.net(x), model.net(x)) and torch.equal(fresh.average(x), model.average(x))
    assert same_bits(getattr(fresh.average, "module", fresh.average), fresh.net)
    deployed = deploy(model.net, plan, x)
    assert torch.allclose(deployed.model(x), model.net(x), atol=1e-4)
