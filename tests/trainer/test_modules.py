"""Somebody else's LightningModule, data and Trainer: it works, or one sentence says what to do."""

import csv
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel, RandomDataset
from lightning.pytorch.demos.boring_classes import Net as DemoNet
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from hawq_lightning import ApplyPlan, HawqError, Plan, Sensitivity
from hawq_lightning.quantization import enabled_bits
from tests.trainers import (
    CLASSES,
    FEATURES,
    Augmented,
    Classifier,
    assert_mixed,
    blobs,
    fit,
    hawq,
    loader,
    measuring,
    mlp,
    same_states,
    trainer,
    weight_widths,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


# ------------------------------------------------------------ Lightning's demos


class BoringDeep(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))


class ManualDeep(ManualOptimBoringModel):
    def __init__(self):
        super().__init__()
        self.layer = BoringDeep().layer


@pytest.mark.feature("Modules", "Lightning's BoringModel and its manual twin, with some depth", "works")
@pytest.mark.parametrize("kind", [BoringDeep, ManualDeep])
def test_boring_models_with_some_depth(tmp_path, kind):
    fit(tmp_path, kind(), DataLoader(RandomDataset(32, 32), 8))


def test_one_layer_gets_one_width(tmp_path):
    model, callback = BoringModel(), hawq(budget="8x")
    trainer(tmp_path, callback).fit(model, DataLoader(RandomDataset(32, 32), 8))
    assert weight_widths(model) == {4}  # a single layer cannot be mixed
    assert callback.plan["layer.weight"].bits == 4


def test_a_loss_without_curvature_is_refused(tmp_path):
    model = DemoModel()
    with pytest.raises(HawqError, match="no curvature"):
        trainer(tmp_path, hawq()).fit(model, DataLoader(RandomDataset(32, 32), 8))
    assert not enabled_bits(model)


class MnistStyle(LightningModule):
    """Lightning's convolutional demo network, log-softmax and nll_loss."""

    def __init__(self):
        super().__init__()
        self.net = DemoNet()
        self.net.fc1 = nn.Linear(64 * 4, 16)
        self.net.fc2 = nn.Linear(16, 10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.nll_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adadelta(self.parameters(), lr=0.1)


@pytest.mark.feature("Modules", "Lightning's convolutional demo network", "works")
def test_demo_conv_net(tmp_path):
    data = TensorDataset(torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,)))
    fit(tmp_path, MnistStyle(), DataLoader(data, 8), rtol=1.0, images=16)


# ------------------------------------------------------------ shapes of batches


class Reshaped(Dataset):
    """The same images as tuple, list, dict, or nested."""

    def __init__(self, form):
        self.data, self.form = blobs(), form

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return {
            "tuple": (x, y), "list": [x, y], "dict": {"x": x, "y": y}, "nested": {"in": {"x": x}, "out": [y]},
            "text": {"name": f"image {i}", "x": x, "y": y},
        }[self.form]  # fmt: skip


class AnyBatch(Classifier):
    def loss(self, batch):
        if isinstance(batch, dict):
            x, y = (batch["in"]["x"], batch["out"][0]) if "in" in batch else (batch["x"], batch["y"])
        else:
            x, y = batch
        return F.cross_entropy(self(x), y)


@pytest.mark.feature("Data", "batches as tuple, list, dict, nested, with text", "works")
@pytest.mark.parametrize("form", ["tuple", "list", "dict", "nested", "text"])
def test_batches_of_any_form(tmp_path, form):
    fit(tmp_path, AnyBatch(), DataLoader(Reshaped(form), 16))


# ------------------------------------------------------------ nothing changes


class Observed(Classifier):
    """Logs, updates metrics, keeps lists and counters, draws random numbers, runs buffers: all in training_step."""

    def __init__(self):
        super().__init__()
        self.acc = MulticlassAccuracy(CLASSES)
        self.many = MetricCollection({"top2": MulticlassAccuracy(CLASSES, top_k=2), "auroc": MulticlassAUROC(CLASSES)})
        self.mean = MeanMetric()
        self.register_buffer("steps", torch.zeros(()))
        self.seen, self.count, self.draws, self.nested = [], 0, [], {"batches": []}
        self.net[0].requires_grad_(False)
        self.net[0].eval()

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x + 0.01 * torch.randn_like(x))
        loss = F.cross_entropy(logits, y)
        self.acc(logits, y)
        self.many.update(logits.softmax(1), y)
        self.mean.update(loss)
        self.steps += 1
        self.count += 1
        self.seen.append(float(loss))
        self.nested["batches"].append(batch_idx)
        self.draws.append((random.random(), float(np.random.rand()), self.training, self.net[1].training))
        self.log("acc", self.acc, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss, "count": float(self.count)}, prog_bar=True)
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        return {"loss": loss, "logits": logits.detach()}

    def on_train_epoch_end(self):
        self.log_dict(self.many.compute())
        self.many.reset()


def run_observed(folder, *callbacks, **kwargs):
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    model = Observed()
    logger = CSVLogger(folder, name="", version="")
    t = trainer(folder, *callbacks, max_epochs=2, logger=logger, log_every_n_steps=1, num_sanity_val_steps=1, **kwargs)
    t.fit(model, loader(), loader(shuffle=False))
    with (folder / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("hawq/")} for row in csv.DictReader(file)]
    rows = [r for r in rows if set(r) - {"step", "epoch"}]
    return model, rows, {k: v.item() for k, v in t.callback_metrics.items()}


def test_measuring_leaves_training_bitwise_alone(tmp_path):
    measure_callback = measuring()
    alone, rows, metrics = run_observed(tmp_path / "alone")
    beside, rows2, metrics2 = run_observed(tmp_path / "beside", measure_callback)
    assert measure_callback.plan is not None and len({s.bits for s in measure_callback.plan.weights}) >= 2
    assert rows == rows2 and len(rows) > 8
    assert metrics == metrics2
    assert same_states(alone.state_dict(), beside.state_dict())
    for name in ("seen", "count", "draws", "nested"):
        assert getattr(alone, name) == getattr(beside, name)
    assert [m.training for m in alone.modules()] == [m.training for m in beside.modules()]
    assert [p.requires_grad for p in alone.parameters()] == [p.requires_grad for p in beside.parameters()]
    assert type(beside.net[0]) is nn.Linear  # this callback changes no layer


@pytest.mark.feature(
    "Modules", "metrics, counters, lists and random draws in `training_step`", "left as they were by the measurement"
)
def test_hawq_also_leaves_random_states_and_counters_alone(tmp_path):
    callback = hawq()
    alone, _, _ = run_observed(tmp_path / "alone")
    beside, _, _ = run_observed(tmp_path / "beside", callback)
    assert_mixed(beside, callback)
    assert alone.draws == beside.draws and alone.count == beside.count and len(beside.seen) == 8
    assert torch.equal(alone.steps, beside.steps)
    assert "log" not in beside.__dict__ and "manual_backward" not in beside.__dict__


# ------------------------------------------------------------ manual optimization


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        self.log("loss", loss)


class Gan(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, FEATURES))
        self.critic = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        g, d = self.optimizers()
        x = batch[0]
        ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        self.toggle_optimizer(g)
        fake = self.generator(torch.randn(len(x), 6))
        loss = F.binary_cross_entropy_with_logits(self.critic(fake), ones)
        self.manual_backward(loss)
        g.step()
        g.zero_grad()
        self.untoggle_optimizer(g)
        self.toggle_optimizer(d)
        loss = F.binary_cross_entropy_with_logits(self.critic(x), ones)
        loss = loss + F.binary_cross_entropy_with_logits(self.critic(fake.detach()), zeros)
        self.manual_backward(loss)
        d.step()
        d.zero_grad()
        self.untoggle_optimizer(d)

    def configure_optimizers(self):
        return [torch.optim.Adam(self.generator.parameters(), 1e-3), torch.optim.Adam(self.critic.parameters(), 1e-3)]


class Untoggled(Manual):
    """Calls ``loss.backward()`` itself."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


@pytest.mark.feature("Optimizers", "manual optimization, several optimizers (GAN), `loss.backward()` by hand", "works")
@pytest.mark.parametrize("kind", [Manual, Untoggled, Gan])
def test_manual_optimization(tmp_path, kind):
    model = kind()
    fit(tmp_path, model, loader())
    assert all(p.requires_grad for p in model.parameters())


def test_measuring_takes_no_manual_step(tmp_path):
    results = []
    for name in ("alone", "beside"):
        torch.manual_seed(1)
        model = Gan()
        extra = [measuring()] if name == "beside" else []
        trainer(tmp_path / name, *extra).fit(model, loader())
        results.append(model.state_dict())
    assert extra[0].plan is not None
    assert same_states(*results)


# ------------------------------------------------------------ layers built late


class InSetup(Classifier):
    def __init__(self):
        super().__init__()
        self.net = None

    def setup(self, stage):
        if self.net is None:
            self.net = mlp()


class InConfigureModel(Classifier):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = mlp()


class InBoth(LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(FEATURES, 16)
        self.middle = self.head = None

    def setup(self, stage):
        self.middle = self.middle or nn.Linear(16, 24)

    def configure_model(self):
        self.head = self.head or nn.Linear(24, CLASSES)

    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.head(self.middle(self.body(x).relu()).relu()), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.feature("Modules", "layers built in `setup` or `configure_model`", "works")
@pytest.mark.parametrize("kind", [InSetup, InConfigureModel, InBoth])
def test_layers_built_late(tmp_path, kind):
    model = kind()
    callback = fit(tmp_path, model, loader())
    assert len(callback.plan.weights) == 3


def test_patterns_on_layers_built_late(tmp_path):
    model = InSetup()
    fit(tmp_path, model, loader(), exclude="net.0")
    assert not any(n.startswith("net.0") for n in enabled_bits(model))


class Lazy(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, CLASSES))
        self.net(torch.zeros(2, FEATURES))


@pytest.mark.feature("Modules", "lazy layers after their dry run", "works")
def test_lazy_layers_after_their_dry_run(tmp_path):
    fit(tmp_path, Lazy(), loader())


# ------------------------------------------------------------ loaders


class TwoLoaders(Classifier):
    def loss(self, batch):
        pairs = list(batch.values()) if isinstance(batch, dict) else list(batch)
        return sum(F.cross_entropy(self(x), y) for x, y in pairs)


class FromHooks(Classifier):
    """The data comes from the module's own hook."""

    def train_dataloader(self):
        return loader()


@pytest.mark.feature("Data", "several dataloaders, CombinedLoader", "works")
@pytest.mark.parametrize("form", ["dict", "list", "min_size", "max_size_cycle"])
def test_several_loaders(tmp_path, form):
    one, two = loader(), loader(8)
    data = {
        "dict": {"a": one, "b": two}, "list": [one, two], "min_size": CombinedLoader([one, two], "min_size"),
        "max_size_cycle": CombinedLoader({"a": one, "b": two}, "max_size_cycle"),
    }[form]  # fmt: skip
    fit(tmp_path, TwoLoaders(), data)


class Stream(IterableDataset):
    """A stream that keeps its position: whoever reads from it moves it on."""

    def __init__(self, count=64):
        self.rows, self.at, self.count = blobs(), 0, count
        self.given = []

    def __iter__(self):
        for _ in range(self.count):
            i = self.at % len(self.rows)
            self.at += 1
            self.given.append(i)
            yield self.rows[i]


class OwnIterable:
    """No DataLoader at all."""

    def __iter__(self):
        rows = blobs()
        for start in torch.randperm(4).tolist():
            yield rows[start * 16 : start * 16 + 16]

    def __len__(self):
        return 4


LOADERS = {
    "iterable": lambda: DataLoader(Stream(), 16),
    "generator": lambda: loader(generator=torch.Generator().manual_seed(5)),
    "weighted": lambda: DataLoader(blobs(), 16, sampler=WeightedRandomSampler(torch.rand(64) + 0.1, 64)),
    "weighted_generator": lambda: DataLoader(
        blobs(), 16, sampler=WeightedRandomSampler(torch.ones(64), 64, generator=torch.Generator().manual_seed(1))
    ),
    "augmented": lambda: DataLoader(Augmented(), 16, shuffle=True),
    "workers": lambda: loader(num_workers=1, persistent_workers=True),
    "own_iterable": OwnIterable,
    "hook": lambda: None,
}


@pytest.mark.parametrize("form", LOADERS)
def test_loaders_are_left_as_they_were(tmp_path, form):
    """Training over two epochs sees the same images in the same order, with and without the measurement."""
    results = []
    for name in ("alone", "beside"):
        torch.manual_seed(2)
        np.random.seed(2)
        random.seed(2)
        model = FromHooks()
        data = LOADERS[form]()
        extra = [measuring()] if name == "beside" else []
        trainer(tmp_path / name, *extra, max_epochs=2).fit(model, data)
        results.append(model.state_dict())
    assert len({s.bits for s in extra[0].plan.weights}) >= 2
    assert same_states(*results)


def test_the_measurement_sees_the_samplers_images(tmp_path):
    weights = torch.zeros(64)
    weights[:8] = 1.0
    data = DataLoader(blobs(), 16, sampler=WeightedRandomSampler(weights, 64))
    seen = []

    def loss_fn(module, batch):
        seen.extend(batch[0].tolist())
        return module.loss(batch)

    fit(tmp_path, Classifier(), data, loss_fn=loss_fn)
    allowed = {tuple(blobs()[i][0].tolist()) for i in range(8)}
    assert seen and {tuple(x) for x in seen} <= allowed


@pytest.mark.feature(
    "Settings", "`overfit_batches`, `limit_train_batches`, `accumulate_grad_batches`, `precision` bf16-mixed", "works"
)
@pytest.mark.parametrize(
    "settings",
    [
        {"overfit_batches": 2}, {"limit_train_batches": 2}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"},
    ],
    ids=lambda s: next(iter(s)),
)  # fmt: skip
def test_trainer_settings(tmp_path, settings):
    callback = fit(tmp_path, Classifier(), loader(), **settings)
    assert callback.sensitivity.settings["images"] == 32


# ------------------------------------------------------------ losses


def smoothed(module, x, y):
    return F.cross_entropy(module(x), y, label_smoothing=0.1)


def weighted(module, x, y):
    return F.cross_entropy(module(x), y, torch.tensor([1.0, 2.0, 0.5, 3.0]))


def ignoring(module, x, y):
    y = torch.where(torch.arange(len(y)) % 3 == 0, torch.full_like(y, 255), y)
    return F.cross_entropy(module(x), y, ignore_index=255)


def dice(module, x, y):
    p, t = module(x).softmax(1), F.one_hot(y, CLASSES)
    return 1 - (2 * (p * t).sum() / (p.sum() + t.sum()))


def elementwise(module, x, y):
    return F.binary_cross_entropy_with_logits(module(x), F.one_hot(y, CLASSES).float())


def squared(module, x, y):
    return F.mse_loss(module(x), F.one_hot(y, CLASSES).float())


@pytest.mark.feature("Modules", "label smoothing, class weights, ignore_index, dice, BCE, MSE", "works")
@pytest.mark.parametrize("loss", [smoothed, weighted, ignoring, dice, elementwise, squared])
def test_losses(tmp_path, loss):
    class Mine(Classifier):
        def training_step(self, batch, batch_idx):
            return {"loss": loss(self, *batch), "extra": None}

    callback = fit(tmp_path, Mine(), loader(), images=64, rtol=0.8)
    coupled = loss is dice  # the others' normaliser is one number a batch: images stay apart in the Hessian
    assert {*callback.sensitivity.row_unit.values()} == ({"batch"} if coupled else {"image"})


class Segmenter(LightningModule):
    """As torchvision's reference: two heads, ignore_index, auxiliary loss in training mode only."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 6, 3, padding=1)
        self.head, self.aux = nn.Conv2d(6, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        low = self.stem(x).relu()
        out = {"out": self.head(self.body(low).relu())}
        return out | ({"aux": self.aux(low)} if self.training else {})

    def training_step(self, batch):
        out = self(batch["image"])
        losses = {k: F.cross_entropy(v, batch["mask"], ignore_index=255) for k, v in out.items()}
        return losses["out"] + 0.5 * losses["aux"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.feature("Modules", "a segmentation network with an auxiliary head in training mode", "works")
def test_segmentation_with_an_auxiliary_head(tmp_path):
    masks = torch.randint(0, 3, (24, 6, 6))
    masks[:, 0] = 255
    rows = [{"image": torch.randn(1, 6, 6), "mask": m} for m in masks]
    callback = fit(tmp_path, Segmenter(), DataLoader(rows, 8), rtol=1.0)
    assert {s.layers[0] for s in callback.plan.weights} == {"stem", "body", "head", "aux"}


# ------------------------------------------------------------ refused in one sentence


class ReturnsNothing(Classifier):
    def training_step(self, batch, batch_idx):
        return None


class ReturnsText(Classifier):
    def training_step(self, batch, batch_idx):
        return "loss"


class Iterates(Classifier):
    def training_step(self, dataloader_iter):
        return self.loss(next(dataloader_iter)[0])


class NeedsEarlierHook(Classifier):
    def on_train_start(self):
        self.weighting = torch.ones(CLASSES)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], self.weighting)


@pytest.mark.parametrize("kind", [ReturnsNothing, ReturnsText, Iterates, NeedsEarlierHook])
def test_steps_that_cannot_be_borrowed_ask_for_loss_fn(tmp_path, kind):
    model = kind()
    with pytest.raises(HawqError, match=rf"{kind.__name__}\.training_step.*loss_fn"):
        trainer(tmp_path, hawq()).fit(model, loader())
    assert not enabled_bits(model)
    assert "log" not in model.__dict__ and model._current_fx_name in (None, "on_fit_start")


@pytest.mark.feature(
    "Modules",
    "`training_step(dataloader_iter)`, or one that needs a later hook",
    "one sentence asks for `MeasureConfig(loss_fn=...)`, which works",
)
@pytest.mark.parametrize("kind", [Iterates, NeedsEarlierHook])
def test_loss_fn_is_the_way_out(tmp_path, kind):
    fit(tmp_path, kind(), loader(), loss_fn=lambda module, batch: Classifier.loss(module, batch))


# ------------------------------------------------------------ arguments


class Epochs(Callback):
    def __init__(self):
        self.armed = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.armed.append(bool(enabled_bits(pl_module)))


@pytest.mark.feature("Modules", "float epochs first (`HAWQ(start_epoch=n)`)", "works")
def test_start_after_an_epoch(tmp_path):
    model, callback, epochs = Classifier(), hawq(start_epoch=1), Epochs()
    trainer(tmp_path, callback, epochs, max_epochs=3).fit(model, loader())
    assert epochs.armed == [False, True, True]
    assert_mixed(model, callback)


def test_float_epochs_before_start_are_those_without_the_callback(tmp_path):
    states = []
    for extra in ([], [hawq(start_epoch=1)]):
        torch.manual_seed(4)
        model = Classifier()
        kept = Keep()
        trainer(tmp_path, *extra, kept, max_epochs=2).fit(model, loader())
        states.append(kept.states[0])
    assert same_states(*states)
    assert_mixed(model, extra[0])


class Keep(Callback):
    def __init__(self):
        self.states = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})


@pytest.mark.feature("Checkpoints", "a plan from a file or another run", "works; nothing is measured")
@pytest.mark.parametrize("as_file", [False, True])
def test_a_given_plan_is_installed_unmeasured(tmp_path, as_file):
    torch.manual_seed(0)
    first = fit(tmp_path / "a", Classifier(), loader())
    plan = tmp_path / "a" / "plan.json" if as_file else first.plan
    for callback in (hawq(plan=plan), ApplyPlan(plan)):
        model = Classifier()
        trainer(tmp_path / "b", callback).fit(model, loader())
        assert_mixed(model, callback)
        assert callback.plan.bits == first.plan.bits
        assert not (tmp_path / "b" / "sensitivity.json").exists()


@pytest.mark.parametrize("as_file", [False, True])
def test_given_traces_are_not_measured_again(tmp_path, monkeypatch, as_file):
    first = fit(tmp_path / "a", Classifier(), loader())
    monkeypatch.setattr("hawq_lightning.callbacks._measure.measure", lambda *a, **k: pytest.fail("measured again"))
    given = tmp_path / "a" / "sensitivity.json" if as_file else first.sensitivity
    model = Classifier()
    second = fit(tmp_path / "b", model, loader(), sensitivity=given, budget="6x")
    assert second.plan.costs["weight_bytes"] > first.plan.costs["weight_bytes"]
    assert [r.trace for r in second.sensitivity] == pytest.approx([r.trace for r in first.sensitivity])


@pytest.mark.parametrize(
    "budget",
    ["9x", "3.5bit", {"bops": "45%"}, {"weights": "9x", "act": "4x"}, {"weight_bytes": "330B"}],
    ids=str,
)
def test_forms_of_budgets(tmp_path, budget):
    activation_bits = (4, 8) if isinstance(budget, dict) and "act" in budget else 8
    callback = fit(tmp_path, Classifier(), loader(), budget=budget, activation_bits=activation_bits, input_bits=None)
    assert callback.plan.budget == budget


@pytest.mark.parametrize("unit, size", [("B", 1), ("kB", 1000), ("KiB", 1024)])
def test_budgets_of_the_file(tmp_path, unit, size):
    wanted = fit(tmp_path / "a", Classifier(), loader()).plan.costs["file_bytes"]
    callback = fit(tmp_path / "b", Classifier(), loader(), budget=f"{wanted / size:.6f}{unit}")
    assert callback.plan.costs["file_bytes"] <= wanted


def test_float_activations(tmp_path):
    model = Classifier()
    fit(tmp_path, model, loader(), activation_bits=None)
    assert not any(name.endswith(".input") for name in enabled_bits(model))


@pytest.mark.parametrize(
    "patterns, layers",
    [
        ({"include": "net.[04]"}, {"net.0", "net.4"}),
        ({"exclude": "net.6"}, {"net.0", "net.4"}),
        ({"exclude": lambda name, module: module.in_features == FEATURES}, {"net.4", "net.6"}),
        ({"include": [nn.Linear], "exclude": ["net.0"]}, {"net.4", "net.6"}),
    ],
    ids=["include", "exclude", "callable", "both"],
)
def test_patterns(tmp_path, patterns, layers):
    model = Classifier()
    fit(tmp_path, model, loader(), budget="9x", weight_bits=(2, 4, 8), **patterns)
    assert {name.rpartition(".")[0] for name in enabled_bits(model)} == layers


def test_everything_is_saved(tmp_path):
    callback = fit(tmp_path, Classifier(), loader(), loss_per_site=True)
    assert Plan.load(tmp_path / "plan.json").bits == callback.plan.bits
    assert Sensitivity.load(tmp_path / "sensitivity.json").fingerprint == callback.plan.fingerprint
    assert (tmp_path / "frontier.csv").read_text().count("\n") > 3
    assert len(callback.loss_per_site) >= 3 * len(callback.plan.weights)


@pytest.mark.feature("Loggers", "CSVLogger", "works")
def test_traces_and_bits_reach_the_loggers(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    callback = hawq()
    model = Classifier()
    trainer(tmp_path, callback, logger=logger).fit(model, loader())
    assert_mixed(model, callback)
    with (tmp_path / "metrics.csv").open() as file:
        row = next(r for r in csv.DictReader(file) if r.get("hawq/bits/net.0.weight"))
    assert int(float(row["hawq/bits/net.0.weight"])) == callback.plan["net.0.weight"].bits
    assert float(row["hawq/mean_trace/net.0.weight"]) > 0


@pytest.mark.feature("Settings", "`fast_dev_run`", "works")
def test_fast_dev_run(tmp_path):
    model, callback = Classifier(), hawq()
    trainer(tmp_path, callback, fast_dev_run=2).fit(model, loader())
    assert_mixed(model, callback)


@pytest.mark.feature("Checkpoints", "a second `fit`", "goes on with the same plan")
def test_a_second_fit_goes_on_with_the_same_plan(tmp_path):
    model, callback = Classifier(), hawq()
    trainer(tmp_path, callback).fit(model, loader())
    plan = callback.plan
    trainer(tmp_path, callback).fit(model, loader())
    assert callback.plan is plan
    assert_mixed(model, callback)
    fresh = hawq()
    trainer(tmp_path, fresh).fit(model, loader())
    assert [(s.name, s.bits) for s in fresh.plan.weights] == [(s.name, s.bits) for s in plan.weights]
    for cost in ("weight_bytes", "float_weight_bytes"):
        assert fresh.plan.costs[cost] == plan.costs[cost]
