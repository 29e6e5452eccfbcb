"""Twins in odd company: fused Transformer layers, weights made by hooks, torch.func, options, trials."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from hawq_lightning import Candidate, HawqError, Plan, PlanSite, quantize, sites
from hawq_lightning.layers import layer_type, must_be_called
from hawq_lightning.quantization import (
    check_bits,
    enabled_bits,
    import_quantizers,
    loss_of_plan,
    loss_per_site,
    plan_of,
    quantized_layers,
    quantizer_named,
    quantizers,
    temporarily_quantized,
    unquantize,
    with_quantizer,
)


def plan_for(model, bits=2, activations=True, **how):
    found = []
    for name, m in model.named_modules():
        if layer_type(m) in (nn.Linear, nn.Conv2d):
            shape, numel = tuple(m.weight.shape), m.weight.numel()
            found.append(PlanSite(f"{name}.weight", "weight", (name,), shape, numel, bits, "affine"))
            if activations:
                found.append(PlanSite(f"{name}.input", "activation", (name,), (), 0, 4, "affine", 0.25, 8))
    return Plan(sites=tuple(found), **how)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_fused_transformer_layer_does_not_read_past_the_twin(layers):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), layers).eval()
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    with torch.no_grad():
        before = model(x), model(x, src_key_padding_mask=mask)
    quantize(model, plan_for(model))
    trained = model(x)  # with gradients on, torch takes the slow path
    with torch.no_grad():
        assert torch.allclose(model(x), trained, atol=1e-5) and (trained - before[0]).abs().max() > 0.05
        assert (model(x, src_key_padding_mask=mask)[1:] - before[1][1:]).abs().max() > 0.05
    whole = io.BytesIO()
    torch.save(model, whole), whole.seek(0)
    again = torch.load(whole, weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
        unquantize(model)
        assert torch.equal(model(x), before[0])
    assert not any(m._forward_pre_hooks for m in model.modules())


HOOKS = {"weight norm": weight_norm, "spectral norm": spectral_norm, "pruning": lambda m: prune.identity(m, "weight")}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")  # but in use
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_steps_are_fitted_to_the_weight_that_a_hook_will_make(hook):
    torch.manual_seed(0)
    trained, fresh = (nn.Sequential(hook(nn.Linear(8, 8))).eval() for _ in range(2))
    trained(torch.randn(2, 8))
    with torch.no_grad():
        for p in trained.parameters():
            p.mul_(3.0)
    fresh.load_state_dict(trained.state_dict())
    plan = plan_for(trained, 4, activations=False)
    quantize(fresh, plan)  # before any call
    trained(torch.randn(2, 8))
    quantize(trained, plan)
    assert torch.allclose(fresh[0].weight_quantizer.scale, trained[0].weight_quantizer.scale, rtol=1e-5)


def test_parametrized_layers_are_sites():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 2))
    assert [s.name for s in sites(model, torch.randn(2, 8)).weights] == ["0.weight", "1.weight"]


def test_gradients_by_torch_func():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    quantize(model, plan_for(model, 4))
    x = torch.randn(4, 6)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    parameters = {k: v.detach() for k, v in model.named_parameters()}
    found = torch.func.grad(loss)(parameters)
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-6), name


def test_other_options_are_another_quantizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    quantize(model, plan_for(model, 4))
    mse = model[0].weight_quantizer.scale.clone()
    quantize(model, plan_for(model, 4, quantizer_options={"ranges": "minmax"}))
    assert not torch.equal(model[0].weight_quantizer.scale, mse)
    assert plan_of(model).quantizer_options == {"ranges": "minmax"}
    spec = quantizer_named("uniform", {"ranges": "minmax"})
    with pytest.raises(HawqError, match="no option 'nonsense'"):
        quantizer_named(spec, {"nonsense": 1})
    assert quantizer_named(spec, {"reestimate": 5}).options == {"ranges": "minmax", "reestimate": 5}


def test_a_trial_leaves_an_armed_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 3)).eval()
    plan = plan_for(model, 4)
    plan = plan.replace(sites=tuple(s for s in plan.sites if s.layers != ("3",)), quantizer="lsq")
    quantize(model, plan)
    x = torch.randn(16, 6)
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    table = sites(nn.Sequential(*[copy.deepcopy(m) for m in unquantize(copy.deepcopy(model))]), x)
    options = {s.name: (Candidate(2, "affine", 1.0, 1.0, 0.25, 1),) for s in table}

    def loss_fn(m, batch):
        return m(batch).square().mean()

    for quantizer in (None, "uniform"):
        rows = loss_per_site(model, [x], loss_fn, table, options, quantizer=quantizer)
        assert len(rows) == len(table) and max(abs(r["measured"]) for r in rows) > 0
        with loss_of_plan(model, [x], loss_fn, quantizer=quantizer) as loss_of:
            assert loss_of(plan_for(unquantize(copy.deepcopy(model)), 2)) > 0
    with pytest.raises(RuntimeError), temporarily_quantized(model):
        assert not enabled_bits(model)
        raise RuntimeError
    assert set(quantized_layers(model)) == {"0", "2"} and type(model[3]) is nn.Linear
    assert torch.equal(model(x), before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["int_only", "lq_nets", "pact"])
def test_a_trial_leaves_what_a_quantizer_knows_beside_its_tensors(name):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3)),
        torch.randn(4, 2, 9, 9),
    )
    spec, table = quantizer_named(name), sites(model, x)
    plan = Plan(sites=plan_for(model, 3).sites, layers=table.layers)
    quantize(model, with_quantizer(plan, spec))
    known = [{k: v for k, v in q.__dict__.items() if not k.startswith("_") or k in ("_norm", "_tied_to")}
             for q in quantizers(model)]  # fmt: skip
    options = {s.name: (Candidate(8, "affine", 1.0, 1.0, 0.1, 1),) for s in table}
    loss_per_site(model, [x], lambda m, b: m(b).square().mean(), table, options)
    assert [{k: q.__dict__[k] for k in had} for q, had in zip(quantizers(model), known)] == known


def test_parameters_stay_the_optimizers_when_options_change():
    model = nn.Sequential(nn.Linear(6, 5))
    quantize(model, with_quantizer(plan_for(model, 4), quantizer_named("lsq")))
    before = dict(model.named_parameters())
    quantize(model, plan_for(model, 4, quantizer="lsq", quantizer_options={"ranges": "minmax"}))
    assert all(p is before[n] for n, p in model.named_parameters())


def test_twins_of_an_earlier_version_are_brought_up_to_date():
    model = nn.Sequential(nn.Linear(6, 5))
    quantize(model, plan_for(model, 4))
    old = dict(model[0].__dict__)
    del old["quantizer_options"]
    old["_forward_pre_hooks"] = type(old["_forward_pre_hooks"])()
    again = type(model[0]).__new__(type(model[0]))
    again.__setstate__(old)
    assert plan_of(nn.Sequential(again)).bits == plan_of(model).bits
    assert list(again._forward_pre_hooks.values()) == [must_be_called]


def test_widths_may_be_numpys():
    assert check_bits(np.array([4, 2]), "weight") == (2, 4) and type(check_bits(np.int64(4), "weight")[0]) is int


def test_a_quantizer_file_with_the_name_of_another_module_is_refused(tmp_path):
    (tmp_path / "types.py").write_text("")
    with pytest.raises(HawqError, match=r"hidden by another module 'types'.*rename"):
        import_quantizers([str(tmp_path / "types.py")])
