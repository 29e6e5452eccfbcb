"""Plans edited by hand, batches and precisions of all kinds, callbacks used again: nothing may go wrong silently."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning import HawqError, batch_images
from hawq_lightning.callbacks import HAWQ, ApplyPlan
from hawq_lightning.quantization import enabled_bits
from tests.trainers import Classifier, assert_mixed, fit, hawq, loader, mlp, trainer


class Small(nn.Module):
    """A layer in a ModuleDict, a padding mode, a grouped transposed convolution, a Linear on 4-D input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "conv": nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
                "up": nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2, output_padding=1),
            }
        )
        self.rows = nn.Linear(17, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.body["up"](F.relu(self.body["conv"](x))))
        return self.head(F.relu(self.rows(x).mean((1, 2))))


def images(dtype=torch.float32, count=8):
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 8, 8, generator=g).to(dtype), torch.randint(0, 4, (count,), generator=g)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def small_plan(model, dtype=torch.float32, loss_fn=cross_entropy, batch=None, forward=None, weight_bits=(2, 4, 8)):
    batch = images(dtype) if batch is None else batch
    table = hl.sites(model, batch, **({} if forward is None else {"forward": forward}))
    traces = hl.measure(model, [batch], loss_fn, sites=table, progress=False, max_probes=4, rtol=0.5)
    choices = hl.options(
        model, [batch], traces, table, loss_fn, weight_bits=weight_bits, activation_bits=(4, 8), input_bits=None
    )
    return hl.select(hl.Problem(table, choices, traces), {"weights": "6x", "act": "5x"})


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


# ---------------------------------------------------------------- batches


@dataclass
class Batch:
    """As collate functions make them."""

    image: torch.Tensor
    label: torch.Tensor


def test_batches_as_dataclass_and_defaultdict():
    x, y = images()
    listed = defaultdict(list, image=x, label=y)
    expected = small_plan(Small()).bits.keys()
    kinds = {
        Batch: (Batch(x, y), lambda b: (b.image, b.label)),
        defaultdict: (listed, lambda b: (b["image"], b["label"])),
    }
    for kind, (batch, read) in kinds.items():
        model = Small()

        def loss(module, b, kind=kind, read=read):
            assert type(b) is kind
            image, label = read(b)
            return F.cross_entropy(module(image), label)

        plan = small_plan(model, loss_fn=loss, batch=batch, forward=lambda m, b, read=read: m(read(b)[0]))
        assert plan.bits.keys() == expected


def test_two_inputs_are_not_two_images():
    a, y = torch.zeros(8, 5), torch.zeros(8)
    assert batch_images(((a, a), y)) == 8
    assert batch_images({"pair": [a, a], "label": y}) == 8
    assert batch_images(Batch(a, y)) == 8
    # a detector's: one image an entry
    boxes = [{"boxes": torch.zeros(2, 4)}] * 5
    assert batch_images(([torch.zeros(3, 4, 4)] * 5, boxes)) == 5
    assert batch_images(([torch.zeros(3, 4, 4)] * 3, torch.zeros(3))) == 3


# ---------------------------------------------------------------- plans edited by hand


def edited(plan, change):
    raw = json.loads(json.dumps(plan.to_dict()))
    for site in raw["sites"]:
        change(site)
    return hl.Plan.from_dict(raw)


def test_edited_bits_bring_their_own_grid_and_code():
    torch.manual_seed(0)
    plan = small_plan(Small())
    other = {4: 8, 8: 4, 2: 8}
    assert {4, 8} <= {o.bits for s in plan.activations for o in s.options}

    def swap(site):
        site["bits"] = other[site["bits"]]

    changed = edited(plan, swap)
    model = hl.quantize(Small(), changed)
    layers = dict(model.named_modules())
    for site in changed.activations:
        option = next(o for o in site.options if o.bits == site.bits)
        quantizer = layers[site.layers[0]].input_quantizer
        assert (
            float(quantizer.scale) == pytest.approx(option.scale) and float(quantizer.zero_point) == option.zero_point
        )
        assert option.scale != site.scale
    assert all(layers[s.layers[0]].weight_quantizer.code == "affine" for s in changed.weights)
    applier = ApplyPlan(changed)
    assert applier._given.costs["weight_bytes"] == sum(s.numel * s.bits for s in changed.weights) / 8
    assert plan.settled() is plan


def test_a_grid_of_ones_own_stays():
    plan = small_plan(Small())

    def move(site):
        if site["kind"] == "activation":
            site["scale"], site["zero_point"] = 0.125, 3

    model = hl.quantize(Small(), edited(plan, move))
    assert float(model.head.input_quantizer.scale) == 0.125 and float(model.head.input_quantizer.zero_point) == 3


def test_edited_to_one_bit_is_midrise_and_packs(tmp_path):
    plan = small_plan(Small(), weight_bits=(4, 8))

    def one(site):
        if site["name"] == "head.weight":
            site["bits"] = 1

    changed = edited(plan, one)
    model = hl.quantize(Small(), changed)
    assert model.head.weight_quantizer.code == "midrise"
    assert all(len(row.abs().unique()) == 1 for row in model.head.quantized_weight)
    hl.save_packed(model, changed, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(code="codebook"), "code format 'codebook'"),
        (lambda s: s.update(zero_point="a") if s["kind"] == "activation" else None, "zero_point is 'a'"),
        (lambda s: s.update(zero_point=20, scale=0.5, bits=4) if s["kind"] == "activation" else None, "cannot hold"),
        (lambda s: s.update(bits=5) if s["kind"] == "activation" else None, "the nearest is 4"),
    ],
)
def test_plans_that_cannot_be_installed_say_so(change, message):
    plan = small_plan(Small())
    model = Small()
    with pytest.raises(HawqError, match=message):
        hl.quantize(model, edited(plan, change))
    assert not enabled_bits(model)


def test_another_plan_replaces_the_first():
    model = Small()
    first = small_plan(model)
    hl.quantize(model, first)
    fewer = first.replace(sites=tuple(s for s in first.sites if s.layers != ("head",)))
    hl.quantize(model, fewer)
    assert enabled_bits(model) == fewer.bits
    fresh = hl.quantize(Small(), fewer)
    assert type(fresh.head) is nn.Linear and not any("head" in k for k in fresh.state_dict() if "quantizer" in k)


# ---------------------------------------------------------------- callbacks


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
        resumed, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=False
    )
    assert_mixed(resumed, callback)
    assert enabled_bits(model) == enabled_bits(again) == enabled_bits(resumed) and type(again.net[6]) is nn.Linear


def test_a_callback_used_again_quantizes_the_second_model(tmp_path):
    callback = hawq(start=1)
    for width in (16, 20):
        model = Classifier(width)
        trainer(tmp_path, callback, max_epochs=2).fit(model, loader())
        assert_mixed(model, callback)
        assert callback.plan["net.0.weight"].shape == (width, 12)


def test_a_start_that_is_never_reached_is_told(tmp_path):
    model = Classifier()
    with pytest.warns(UserWarning, match="before start=3"):
        trainer(tmp_path, hawq(start=3), max_epochs=5, max_steps=4).fit(model, loader())
    assert not enabled_bits(model)


def test_a_model_that_is_armed_already_keeps_its_bits_and_says_so(tmp_path):
    model = Classifier()
    fit(tmp_path, model, loader())
    known = enabled_bits(model)
    with pytest.warns(UserWarning, match="keeps their bits"):
        trainer(tmp_path, hawq(budget="5x")).fit(model, loader())
    assert enabled_bits(model) == known


class Late(Classifier):
    """Layers are built in configure_model."""

    def __init__(self):
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = mlp()


@pytest.mark.parametrize("patterns", [{"include": "net.*"}, {"exclude": "net.6"}])
def test_patterns_for_layers_that_are_built_later(patterns, tmp_path):
    fit(tmp_path, Late(), loader(), budget="6x", **patterns)
    with pytest.raises(HawqError, match="matches no quantizable layer"):
        trainer(tmp_path, HAWQ(include="body.*", progress=False)).fit(Late(), loader())


def test_half_precision_and_dataclasses_in_the_trainer(tmp_path):
    class Typed(Classifier):
        def loss(self, batch):
            return F.cross_entropy(self(batch.image), batch.label)

    def collate(items):
        return Batch(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))

    fit(tmp_path, Typed(), loader(collate_fn=collate))
    fit(tmp_path, Classifier(), loader(), precision="16-true")


# ---------------------------------------------------------------- networks beside the network


class Distilled(Classifier):
    """A frozen teacher beside the student, as in knowledge distillation."""

    def __init__(self):
        super().__init__()
        self.teacher = mlp().eval().requires_grad_(False)

    def loss(self, batch):
        with torch.no_grad():
            target = self.teacher(batch[0]).softmax(1)
        return F.kl_div(self.net(batch[0]).log_softmax(1), target, reduction="batchmean")


def test_a_teacher_stays_float(tmp_path):
    model = Distilled()
    callback = fit(tmp_path, model, loader())
    assert enabled_bits(model) and all(name.startswith("net.") for name in enabled_bits(model))
    reasons = {f.name: f.reason for f in callback.sites.floats}
    assert reasons["teacher.0"] == "run without gradients, as teachers are"
    assert not any(p.requires_grad for p in model.teacher.parameters()) and model.net[0].weight.requires_grad


def test_one_layer_with_and_without_gradients():
    """Self-supervision: the target comes from the same layers."""
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

    def loss(module, batch):
        with torch.no_grad():
            target = module(batch[0].flip(1)).softmax(1)
        return F.cross_entropy(module(batch[0]), target)

    traces = hl.measure(model, [(x, y)], loss, estimator="exact", progress=False)
    fixed = model(x.flip(1)).softmax(1).detach()
    expected = hl.measure(
        model, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), fixed), estimator="exact", progress=False
    )
    assert [r.name for r in traces] == [r.name for r in expected]
    for a, b in zip(traces, expected, strict=True):
        assert a.trace == pytest.approx(b.trace, rel=1e-5)


def test_products_of_excluded_layers_are_theirs():
    table = hl.sites(mlp(), torch.randn(4, 12), exclude="6")
    (left,) = [f for f in table.floats if f.reason == "excluded"]
    assert left.macs == 24 * 4 and not any(f.type == "operations" for f in table.floats)


def test_tensors_of_inference_mode_can_be_measured():
    with torch.inference_mode():
        batch = torch.randn(8, 12), torch.randint(0, 4, (8,))
    traces = hl.measure(mlp(), [batch], cross_entropy, progress=False, rtol=0.5)
    assert all(r.trace > 0 for r in traces) and len(traces.records) == len(hl.sites(mlp(), batch))


def test_a_restored_plan_keeps_shared_weights_together():
    from hawq_lightning.quantization import plan_of

    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    plan = small_plan(model, batch=(torch.randn(8, 6), torch.randint(0, 6, (8,))))
    assert plan_of(hl.quantize(model, plan)).weights[0].layers == plan.weights[0].layers == ("0", "2")


def test_a_tie_is_a_list():
    with pytest.raises(HawqError, match="A tie is a list"):
        hl.frontier([[3, 1]], [[1, 2]], ties=[0])
