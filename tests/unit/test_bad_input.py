"""Bad input: one clear sentence before training starts, and the model as it was."""

import copy
import math
import re
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning import ApplyPlan, HawqError, Plan, Sensitivity, load_packed, measure, save_packed
from hawq_lightning.quantization import enabled_bits, quantized_layers
from tests.trainers import CLASSES, FEATURES, Classifier, assert_mixed, blobs, fit, hawq, loader, same_states, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Steps:
    """Counts optimizer steps."""

    def __init__(self, model):
        self.taken, original = 0, model.optimizer_step

        def counted(*args, **kwargs):
            self.taken += 1
            return original(*args, **kwargs)

        model.optimizer_step = counted


def refused(folder, model, data, match, callback=None, **settings):
    """``fit`` raises HawqError with ``match``, takes no step, and leaves weights, modes and gradients alone."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules() if "quantizer" not in str(type(m)).lower()]
    needs = [p.requires_grad for p in model.parameters()]
    steps = Steps(model)
    with pytest.raises(HawqError, match=match) as caught:
        trainer(folder, callback or hawq(), **settings).fit(model, data)
    assert str(caught.value).count("\n") == 0
    assert steps.taken == 0
    assert not enabled_bits(model)
    after = model.state_dict()
    own = {k: v for k, v in after.items() if "_quantizer." not in k}
    assert own.keys() == before.keys()
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in own.items())
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(p.grad is None for p in model.parameters())
    assert len(modes) <= len(list(model.modules()))
    return str(caught.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    model = Classifier()
    callback = fit(folder, model, loader())
    save_packed(model, callback.plan, folder / "model.safetensors")
    return folder, model, callback


# ------------------------------------------------------------ budgets


def test_a_budget_that_no_plan_meets_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.setattr("hawq_lightning.callbacks._measure.measure", lambda *a, **k: pytest.fail("measured first"))
    message = refused(tmp_path, Classifier(), loader(), "40x", hawq(budget="40x"))
    assert "16x" in message or "16.0" in message  # two bits everywhere


@pytest.mark.parametrize(
    "budget, match",
    [
        ("8", r'"8x"'), (8, "8x"), ("eight", "number"), ("-3x", "-3"), ("8 parsecs", "parsecs"), ({}, "empty"),
        ({"bop": "50%"}, "bops"), ({"bops": "50 apples"}, "bops"), (None, "needs a budget"), ("1B", "1B"), ("0x", "0"),
    ],
    ids=str,
)  # fmt: skip
def test_budgets_that_are_none(tmp_path, budget, match):
    try:
        callback = hawq(budget=budget)
    except HawqError as error:
        assert re.search(match, str(error)) and "\n" not in str(error)
    else:  # it takes a network to tell
        refused(tmp_path, Classifier(), loader(), match, callback)


@pytest.mark.parametrize("selector", ["l2", "uniform", "direct", "random", "max_perturbation", "top_eigenvalue"])
def test_every_selectors_budget_is_tried_before_measuring(tmp_path, monkeypatch, selector):
    monkeypatch.setattr("hawq_lightning.callbacks._measure.measure", lambda *a, **k: pytest.fail("measured first"))
    refused(tmp_path, Classifier(), loader(), "40x", hawq(budget="40x", selector=selector))


def test_a_budget_is_tried_before_the_float_epochs(tmp_path):
    refused(tmp_path, Classifier(), loader(), "40x", hawq(budget="40x", start_epoch=1), max_epochs=2)


def test_bits_by_hand_are_tried_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr("hawq_lightning.callbacks._measure.measure", lambda *a, **k: pytest.fail("measured first"))
    by_hand = {"selector": "manual", "bits": {"*.weight": 4, "*.input": 8}}
    refused(tmp_path, Classifier(), loader(), "exceeds the budget '12x'", hawq(budget="12x", **by_hand))
    by_hand["bits"] = {"*.weight": 3, "*.input": 8}
    refused(tmp_path, Classifier(), loader(), "cannot have 3 bits", hawq(budget=None, **by_hand))


def test_what_the_network_reads_has_its_own_bits_before_measuring_too(tmp_path, monkeypatch):
    """The first input has 8 bits beside activations of 4: neither refused as 4 bits, nor promised as 4 bits."""
    monkeypatch.setattr("hawq_lightning.callbacks._measure.measure", lambda *a, **k: pytest.fail("measured first"))
    given = {"activation_bits": 4, "budget": {"act": "8x"}}
    refused(tmp_path, Classifier(), loader(), "act: 8x.*cannot be met", hawq(**given))
    monkeypatch.undo()
    rows = ["layer,weight_bits,activation_bits,ms"]
    rows += [f"net.{n},{w},{a},{w}" for n, a in ((0, 8), (4, 4), (6, 4)) for w in (2, 4)]
    (tmp_path / "latency.csv").write_text("\n".join(rows))
    timed = hawq(activation_bits=4, budget={"latency": "8ms"}, latency=tmp_path / "latency.csv")
    trainer(tmp_path, timed).fit(Classifier(), loader())
    plan = timed.plan
    assert plan.costs["latency_ms"] <= 8 and plan["net.0.input"].bits == 8
    fixed = hawq(activation_bits=4, constraints={"fixed": {"net.0.input": 8}})
    trainer(tmp_path, fixed).fit(Classifier(), loader())
    assert fixed.plan["net.0.input"].bits == 8


# ------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"weight_bits": 9}, r"weight_bits has 9.*nearest is 8"),
        ({"weight_bits": (0, 4)}, r"weight_bits has 0.*nearest is 1"),
        ({"weight_bits": 3.5}, "3.5"),
        ({"weight_bits": ()}, "empty"),
        ({"weight_bits": True}, "True"),
        ({"weight_bits": "4"}, "'4'"),
        ({"activation_bits": 1}, r"activation_bits has 1.*nearest is 2"),
        ({"activation_bits": (4, 16)}, "16"),
        ({"input_bits": 12}, "12"),
        ({"estimator": "hutchinsen"}, "hutchinson"),
        ({"selector": "paretto"}, "pareto"),
        ({"selector": "manual"}, "needs bits"),
        ({"selector": "manual", "bits": "/no/file.json"}, "/no/file.json"),
        ({"code_format": "afine"}, "affine"),
        ({"rtol": 0.0}, "rtol is 0.0"),
        ({"max_probes": 0}, "max_probes is 0"),
        ({"constraints": {"fixd": {}}}, "no constraint 'fixd'.*'fixed'"),
        ({"budget": "nonsense"}, "does not start with a number"),
        ({"images": 0}, "images is 0"),
        ({"start_epoch": -1}, "start_epoch is -1"),
        ({"start_epoch": 0.5}, "start_epoch is 0.5"),
        ({"start_epoch": True}, "start_epoch is True"),
    ],
    ids=str,
)
def test_arguments_out_of_range_at_once(arguments, match):
    with pytest.raises(HawqError, match=match):
        hawq(**arguments)


def test_start_that_leaves_no_epoch(tmp_path):
    refused(tmp_path, Classifier(), loader(), "start_epoch=5 leaves none of the 1 epochs", hawq(start_epoch=5))


@pytest.mark.parametrize("which", ["include", "exclude"])
def test_an_unknown_pattern_suggests(tmp_path, which):
    refused(
        tmp_path, Classifier(), loader(), r"'net\.5' matches no quantizable layer.*'net\.4'", hawq(**{which: "net.5"})
    )


def test_a_constraint_on_an_unknown_site(tmp_path):
    refused(tmp_path, Classifier(), loader(), "net.9", hawq(constraints={"fixed": {"net.9": 4}}))


# ------------------------------------------------------------ models and losses


class NoLayer(LightningModule):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.table = nn.Embedding(4, 4, sparse=True)

    def training_step(self, batch):
        return (batch[0] * self.scale).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_no_quantizable_layer(tmp_path):
    refused(tmp_path, NoLayer(), loader(), "NoLayer has no quantizable layer")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_name_the_layer(tmp_path, value):
    model = Classifier()
    with torch.no_grad():
        model.net[4].weight[0, 0] = value
    refused(tmp_path, model, loader(), r"Layer 'net\.4': its weight holds NaN or infinity")


def test_a_plan_on_weights_that_are_no_numbers_names_the_layer(tmp_path, finished):
    model = Classifier()
    with torch.no_grad():
        model.net[4].weight[0, 0] = math.nan
    refused(tmp_path, model, loader(), r"net\.4", hawq(plan=finished[2].plan))


def mine(loss):
    class Mine(Classifier):
        def training_step(self, batch, batch_idx):
            return loss(self, *batch)

    return Mine()


@pytest.mark.parametrize(
    "loss, match",
    [
        (lambda m, x, y: F.cross_entropy(m(x), y) * math.nan, "loss is nan"),
        (lambda m, x, y: F.cross_entropy(m(x), y) / 0.0, "loss is inf"),
        (lambda m, x, y: F.cross_entropy(m(x).detach(), y), "does not depend"),
        (lambda m, x, y: torch.ones((), requires_grad=True) * 2.0, "called none of the quantizable layers"),
        (lambda m, x, y: F.cross_entropy(m(x), y, reduction="none"), r"shape \[16\], not a scalar"),
        (lambda m, x, y: m(x).sum(), "no curvature"),
        (lambda m, x, y: 0.7, "loss_fn"),
    ],
    ids=["nan", "inf", "detached", "unused", "vector", "linear", "number"],
)
def test_losses_that_cannot_be_measured(tmp_path, loss, match):
    refused(tmp_path, mine(loss), loader(), match)


def test_loss_fn_of_no_tensor(tmp_path):
    refused(tmp_path, Classifier(), loader(), "loss_fn returned NoneType", hawq(loss_fn=lambda module, batch: None))


def test_a_loss_that_turns_bad_after_the_first_batch(tmp_path):
    data = blobs()
    rows = DataLoader(TensorDataset(torch.cat([data.tensors[0][:32], torch.full((32, FEATURES), math.nan)]),
                                    data.tensors[1]), 16)  # fmt: skip
    refused(tmp_path, Classifier(), rows, "nan|NaN", hawq(images=64))


# ------------------------------------------------------------ data


def test_an_empty_dataloader(tmp_path):
    empty = DataLoader(TensorDataset(torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.long)), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(tmp_path, Classifier(), empty, "train dataloader is empty")


def test_an_empty_iterable(tmp_path):
    refused(tmp_path, Classifier(), [iter(())], "empty|holds no tensor")


def test_batches_without_tensors(tmp_path):
    refused(tmp_path, Classifier(), DataLoader([f"row {i}" for i in range(8)], 4), "no tensor")


def test_measuring_no_batches():
    with pytest.raises(HawqError, match="No batches"):
        measure(Classifier(), [], lambda m, b: m.loss(b))


# ------------------------------------------------------------ plans and files


def test_a_plan_for_another_model_says_which_sites_differ(tmp_path, finished):
    plan = finished[2].plan
    message = refused(tmp_path, Classifier(width=20), loader(), "made for another model", hawq(plan=plan))
    assert "net.0.weight [16, 12] against [20, 12]" in message

    class Other(Classifier):
        def __init__(self):
            super().__init__()
            self.net[6] = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    for callback in (hawq(plan=plan), ApplyPlan(plan)):
        message = refused(tmp_path, Other(), loader(), "made for another model", callback)
        assert "only in the plan: net.6.weight" in message and "only in the model: net.6.0.weight" in message


def test_layers_that_a_plan_leaves_out_stay_float_with_a_warning(tmp_path, finished):
    class Deeper(Classifier):
        def __init__(self):
            super().__init__()
            self.net.append(nn.ReLU())
            self.net.append(nn.Linear(CLASSES, CLASSES))

    model, callback = Deeper(), hawq(plan=finished[2].plan)
    with pytest.warns(UserWarning, match=r"says nothing of net\.8"):
        trainer(tmp_path, callback).fit(model, loader())
    assert_mixed(model, callback)
    assert "net.8.weight" not in enabled_bits(model)


def test_traces_of_another_model(tmp_path, finished):
    class Renamed(Classifier):
        def __init__(self):
            super().__init__()
            self.body, self.net = self.net, None

        def forward(self, x):
            return self.body(x)

    refused(
        tmp_path, Renamed(), loader(), r"measured on another model.*net\.0", hawq(sensitivity=finished[2].sensitivity)
    )


def test_traces_of_other_shapes(tmp_path, finished):
    given = finished[2].sensitivity
    refused(tmp_path, Classifier(width=20), loader(), r"another model.*net\.0", hawq(sensitivity=given))


@pytest.mark.parametrize("damage", ["cut", "empty", "binary", "version", "format", "bits", "missing"])
@pytest.mark.parametrize("kind", ["plan", "sensitivity"])
def test_damaged_files_are_refused_at_once(tmp_path, finished, kind, damage):
    path = tmp_path / f"{kind}.json"
    text = (finished[0] / f"{kind}.json").read_text()
    if damage == "missing":
        pass
    elif damage == "binary":
        path.write_bytes(bytes(range(256)))
    else:
        text = {
            "cut": text[: len(text) // 2], "empty": "", "format": text.replace("hawq_lightning.", "other."),
            "version": re.sub('"version": [12]', '"version": 99', text),
            "bits": text.replace('"bits": 8', '"bits": 88').replace('"numel": ', '"numel": -'),
        }[damage]  # fmt: skip
        path.write_text(text)
    with pytest.raises(HawqError, match=kind if damage in ("cut", "empty", "binary", "missing", "format") else "."):
        hawq(**{kind: path})
    with pytest.raises(HawqError):
        (Plan if kind == "plan" else Sensitivity).load(path)


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "missing"])
def test_damaged_packed_files_leave_the_model_alone(tmp_path, finished, damage):
    path = tmp_path / "model.safetensors"
    raw = bytearray((finished[0] / "model.safetensors").read_bytes())
    if damage == "flip":
        raw[-5] ^= 1
    if damage != "missing":
        path.write_bytes({"cut": raw[: len(raw) - 40], "empty": b"", "flip": bytes(raw)}[damage])
    model = Classifier()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(HawqError):
        load_packed(path, model)
    assert same_states(before, model.state_dict()) and not quantized_layers(model)


class NoBias(Classifier):
    """Nothing but quantized weights: no other tensor tells the precision."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 16, bias=False), nn.ReLU(), nn.Linear(16, 24, bias=False), nn.ReLU(),
            nn.Linear(24, CLASSES, bias=False),
        )  # fmt: skip


def test_a_packed_file_into_another_precision(tmp_path):
    trained = NoBias()
    callback = fit(tmp_path, trained, loader())
    path = tmp_path / "model.safetensors"
    save_packed(trained, callback.plan, path)
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float64, "F64")):
        model = NoBias().to(dtype)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(HawqError, match=rf"net\.0\.weight F32 against {name}"):
            load_packed(path, model)
        assert same_states(before, model.state_dict()) and not enabled_bits(model)
    trained.trainer = None
    half = copy.deepcopy(trained).bfloat16()
    save_packed(half, callback.plan, path)
    loaded = load_packed(path, NoBias().bfloat16())
    x = torch.randn(8, FEATURES).bfloat16()
    assert torch.equal(loaded.eval()(x), half.eval()(x)) and enabled_bits(loaded) == enabled_bits(half)
    with pytest.raises(HawqError, match="BF16 against F32"):
        load_packed(path, NoBias())


def test_the_undamaged_files_load(tmp_path, finished):
    folder, trained, _callback = finished
    for given in ({"plan": folder / "plan.json"}, {"sensitivity": folder / "sensitivity.json"}):
        model = Classifier()
        other = hawq(**given)
        trainer(tmp_path, other).fit(model, loader())
        assert_mixed(model, other)
    model = Classifier()
    load_packed(folder / "model.safetensors", model)
    assert enabled_bits(model) == enabled_bits(trained)


def test_after_a_refusal_the_same_model_trains(tmp_path):
    model = Classifier()
    refused(tmp_path / "a", model, loader(), "40x", hawq(budget="40x"))
    fit(tmp_path / "b", model, loader())


def test_install_plan_without_a_plan(tmp_path):
    refused(tmp_path, Classifier(), loader(), "ApplyPlan has no plan", ApplyPlan())


def test_measuring_under_sharded_strategies_is_refused():
    from types import SimpleNamespace

    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    from hawq_lightning.callbacks import refuse_sharded

    for strategy in (FSDPStrategy(), ModelParallelStrategy()):  # neither starts without GPUs
        with pytest.raises(HawqError, match=f"{type(strategy).__name__} splits the layers.*hawq-lightning-analyze"):
            refuse_sharded(SimpleNamespace(strategy=strategy))
