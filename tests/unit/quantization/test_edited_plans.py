"""Plans edited by hand, and a plan in the place of another."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import hawq_lightning as hl
from hawq_lightning import HawqError
from hawq_lightning.callbacks import ApplyPlan
from hawq_lightning.quantization import enabled_bits
from tests.small_network import Small, small_plan


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
    assert applier.given_plan.costs["weight_bytes"] == sum(s.numel * s.bits for s in changed.weights) / 8
    assert plan.reconciled() is plan


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


def test_a_restored_plan_keeps_shared_weights_together():
    from hawq_lightning.quantization import plan_of

    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    plan = small_plan(model, batch=(torch.randn(8, 6), torch.randint(0, 6, (8,))))
    assert plan_of(hl.quantize(model, plan)).weights[0].layers == plan.weights[0].layers == ("0", "2")


def test_a_site_whose_layer_was_renamed_and_whose_other_site_was_removed_is_refused() -> None:
    """As many sites as the model could have, so that counting alone does not show it."""
    net = nn.Sequential(nn.Linear(4, 3))
    plan = hl.Plan((hl.PlanSite("0.weight", "weight", ("nowhere",), (3, 4), 12, 4, "affine"),))
    with pytest.raises(HawqError, match="'0.weight' of the plan names a layer 'nowhere' that the model lacks"):
        hl.quantize(net, plan)
