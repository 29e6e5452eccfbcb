"""Quantizers by name: in the callback, plans, checkpoints, packed files; and one of the user's own."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from hawq_lightning import (
    ApplyPlan,
    HawqError,
    Plan,
    PlanSite,
    load_from_checkpoint,
    load_packed,
    quantize,
    save_packed,
    sites,
)
from hawq_lightning.export import deploy, packed_overhead, read_packed
from hawq_lightning.quantization import (
    WeightQuantizer,
    enabled_bits,
    import_quantizers,
    plan_of,
    prepare,
    quantized_layers,
    quantizer_named,
    register_quantizer,
    unquantize,
    with_quantizer,
)
from tests.trainers import Classifier, hawq, loader, trainer
from tests.unit.export.test_packed import built, random_plan

PAPERS = ("uniform", "lsq", "pact", "dorefa", "lq_nets", "int_only", "fqn", "kmeans", "rvq")
LEARNED = ("lsq", "pact")
UNEVEN = {"lq_nets": "codebook", "kmeans": "table", "rvq": "outliers30"}  # their code formats

USER_FILE = '''
import torch
from hawq_lightning.quantization import WeightQuantizer, register_quantizer

@register_quantizer("shrunk")
class Shrunk(WeightQuantizer):
    """Even steps of three quarters of the fitted size."""

    def fit(self, weight, bits, code):
        super().fit(weight, bits, code)
        self.scale.mul_(0.75)
        return float((self(weight) - weight).square().sum())
'''


def planned(net, x, seed, name):
    plan = random_plan(sites(net, x), seed)
    return with_quantizer(plan, quantizer_named(name))


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("seed", [1, 2])
def test_packed_files_give_the_same_logits(tmp_path, name, seed):
    torch.manual_seed(seed)
    net, x = built(), torch.randn(3, 3, 8, 8)
    table = sites(net, x)
    plan = planned(net, x, seed, name)
    quantize(net, plan)
    assert plan_of(net).quantizer == name
    net.train()  # what is saved is what evaluation sees, and saving moves no range
    before = {k: v.clone() for k, v in net.state_dict().items()}
    size = save_packed(net, plan, tmp_path / "net")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.eval()
    numbers = {s.name: s.channels * (plan.bits[s.name] if name == "lq_nets" else 1) for s in table.weights}
    if name == "kmeans":
        numbers = {s.name: 2 ** plan.bits[s.name] for s in table.weights}  # a layer
    variable = sum((s.numel * plan.bits[s.name] + 7) // 8 + 4 * numbers[s.name] for s in table.weights)
    if name == "rvq":  # values and places of outliers, and how many there are in each block
        variable += sum(6 * round(0.03 * s.numel) + 4 * -(-s.numel // 65536) for s in table.weights)
    assert size == packed_overhead(net, table, name) + variable
    back = load_packed(tmp_path / "net", built())
    with torch.no_grad():
        assert torch.equal(net(x), back(x))
        if name in UNEVEN:
            with pytest.raises(HawqError, match=f"{UNEVEN[name]}, for which ONNX and torch.export have no type"):
                deploy(net, plan, x)
        else:
            assert torch.equal(deploy(net, plan, x, fold=False).model(x), net(x))
    again = save_packed(back, plan_of(back), tmp_path / "again")
    assert abs(again - size) < 600
    assert {s.name: s.code for s in read_packed(tmp_path / "again").plan.weights} == {
        s.name: s.code for s in plan.weights
    }


@pytest.mark.parametrize("name", [n for n in PAPERS if n != "rvq"])  # whose outliers are no whole numbers
def test_integer_arithmetic_on_packed_codes_is_the_fake_quantized_layer(tmp_path, name):
    """Products and sums of whole numbers alone (exact in float64), scaled afterwards: every width and code kind."""
    torch.manual_seed(0)
    for bits in range(1, 9):
        conv, head = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Linear(6, 4, bias=False)
        net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
        a, zero = max(2, bits), 1 if bits < 8 else 100
        chosen = [
            PlanSite(f"{n}.weight", "weight", (n,), tuple(m.weight.shape), m.weight.numel(), bits, "affine")
            for n, m in (("0", conv), ("4", head))
        ] + [PlanSite(f"{n}.input", "activation", (n,), (), 0, a, "affine", 0.05, zero) for n in ("0", "4")]
        chosen = [s if s.kind != "weight" or bits > 1 else PlanSite(**{**vars(s), "code": "midrise"}) for s in chosen]
        plan = with_quantizer(Plan(tuple(chosen)), quantizer_named(name))
        quantize(net, plan)
        save_packed(net, plan, tmp_path / "net")
        file = read_packed(tmp_path / "net")
        layers = quantized_layers(net)
        for layer, x in (("0", torch.randn(2, 3, 5, 5)), ("4", torch.randn(2, 6))):
            q, site = layers[layer].input_quantizer, file.plan[f"{layer}.weight"]
            grid = file.plan[f"{layer}.input"]
            codes = torch.round(q(x).detach() / grid.scale).double()  # less the zero point
            run = (lambda u, w: nn.functional.conv2d(u, w, padding=1)) if layer == "0" else nn.functional.linear
            stored = file.codes[site.name]
            along = [-1] + [1] * (stored.ndim - 1)
            if site.code == "codebook":  # one integer product for every member of the basis
                basis = file[site.name].storage.tensors["basis"].double()
                number = stored + (1 << (bits - 1))
                out = 0
                for k in range(bits):
                    sign = ((number >> k) & 1) * 2 - 1
                    shape = [1, -1] + [1] * (x.ndim - 2)
                    out = out + run(codes, sign.double()) * basis[:, k].view(shape)
            elif site.code == "table":  # sums of the inputs that share an entry, one product for every entry
                table = file[site.name].storage.tensors["table"].double()
                number = stored + (1 << (bits - 1))
                out = sum(run(codes, (number == k).double()) * table[k] for k in range(len(table)))
            else:
                double = (
                    2 * stored + 1
                    if site.code == "midrise"
                    else 2 * (stored - int(file[site.name].storage.tensors.get("zero_point", 0)))
                )
                scale = file[site.name].storage.tensors["scale"].double().view(along) / 2
                whole = run(codes, double.double())
                assert torch.equal(whole, whole.round())
                out = whole * scale.view([1, -1] + [1] * (x.ndim - 2))
            with torch.no_grad():
                expected = layers[layer].module(x)
            assert torch.allclose(
                out * grid.scale, expected.double(), rtol=1e-4, atol=1e-5 * float(expected.abs().max())
            )


@pytest.mark.parametrize("name", PAPERS)
def test_fit_checkpoint_and_resume_with_each(tmp_path, name):
    torch.manual_seed(0)
    budget = "5x" if name == "rvq" else "8x"  # outliers count
    callback = hawq(
        quantizer=name, activation_bits=4, dirpath=tmp_path, budget=budget, selector="uniform", weight_bits=4
    )
    model = Classifier()
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(model, loader(), loader(shuffle=False))
    assert callback.plan.quantizer == name and Plan.load(tmp_path / "plan.json").quantizer == name
    assert set(enabled_bits(model).values()) == {4, 8}
    learned = [p for layer in quantized_layers(model).values() for p in layer.input_quantizer.parameters()]
    assert bool(learned) == (name in LEARNED)
    if name in LEARNED:
        given = {s.layers[0]: s.scale for s in callback.plan.activations}
        moved = [float(quantized_layers(model)[n].input_quantizer.scale) != pytest.approx(s) for n, s in given.items()]
        assert any(moved)
    run.save_checkpoint(tmp_path / "last.ckpt")
    back = load_from_checkpoint(Classifier, tmp_path / "last.ckpt").eval()
    x = next(iter(loader(shuffle=False)))[0]
    model.eval()
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
    assert plan_of(back).quantizer == name
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.ckpt")
    fresh = Classifier()
    again = trainer(tmp_path, hawq(quantizer=name), max_epochs=2)
    again.fit(fresh, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert enabled_bits(fresh) == enabled_bits(model)
    if name != "uniform":
        with pytest.raises(HawqError, match=f"trained with quantizer {name!r}.*has 'uniform'"):
            other = Classifier()
            prepare(other)
            other.load_state_dict(model.state_dict())


def test_float_checkpoints_are_refused_where_steps_are_parameters(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(HawqError, match="float training, and quantizer 'lsq' learns parameters"):
        trainer(tmp_path, hawq(quantizer="lsq"), max_epochs=2).fit(
            Classifier(), loader(), ckpt_path=tmp_path / "float.ckpt"
        )


class Branches(nn.Module):
    """Two layers that read one tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.relu(self.a(x)) + self.b(x))


@pytest.mark.parametrize("name", ["lsq", "pact", "int_only"])
def test_layers_of_one_site_keep_one_grid(tmp_path, name):
    torch.manual_seed(0)
    net, x = Branches(), torch.randn(16, 4)
    table = sites(net, x)
    shared = next(s for s in table.activations if len(s.layers) == 2)
    chosen = [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 4, "affine") for s in table.weights]
    chosen += [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 4, "affine", 0.3, 7) for s in table.activations]
    plan = with_quantizer(Plan(tuple(chosen)), quantizer_named(name))
    prepare(net, quantizer=name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    quantize(net, plan)
    net.train()
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())  # as DistributedDataParallel wants
        optimizer.step()
    state = net.state_dict()
    first, second = (net.get_submodule(n).input_quantizer for n in shared.layers)
    assert float(first.scale) == float(second.scale) != pytest.approx(0.3)
    size = save_packed(net, plan, tmp_path / "net")
    net.eval()
    back = load_packed(tmp_path / "net", Branches()).eval()
    fresh = Branches()
    prepare(fresh, quantizer=name)
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(back(x), net(x)) and torch.equal(fresh.eval()(x), net(x)) and size
    twin = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(twin(x), net(x))


def test_learned_steps_off_are_touched_and_weight_decay_spares_them():
    net = Branches()
    prepare(net, quantizer="lsq")
    x = torch.randn(5, 4)
    plain = copy.deepcopy(net)
    unquantize(plain)
    net.train()
    out = net(x)
    assert torch.equal(out, plain(x))
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(p.ndim <= 1 for n, p in net.named_parameters() if "quantizer" in n)


def test_a_users_own_quantizer_from_a_file(tmp_path, monkeypatch):
    path = tmp_path / "my_quantizers_of_a_test.py"
    path.write_text(USER_FILE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    import_quantizers([str(path)])
    import_quantizers(["my_quantizers_of_a_test"])  # twice, and by its name, changes nothing
    spec = quantizer_named("shrunk")
    assert spec.weight.__module__ == "my_quantizers_of_a_test"
    callback = hawq(quantizer="shrunk", selector="uniform", weight_bits=4, budget="8x", dirpath=tmp_path)
    model = Classifier()
    run = trainer(tmp_path, callback)
    run.fit(model, loader())
    assert Plan.load(tmp_path / "plan.json").quantizer == "shrunk"
    layer = next(iter(quantized_layers(model).values()))
    even = WeightQuantizer(layer.weight.shape[0])
    even.fit(layer.weight, 4, "affine")
    assert type(layer.weight_quantizer) is spec.weight and layer.weight_quantizer.name == "shrunk"
    run.save_checkpoint(tmp_path / "mine.ckpt")
    assert plan_of(load_from_checkpoint(Classifier, tmp_path / "mine.ckpt")).quantizer == "shrunk"
    save_packed(model, callback.plan, tmp_path / "packed")
    x = next(iter(loader()))[0]
    back = load_packed(tmp_path / "packed", Classifier())
    with torch.no_grad():
        assert torch.equal(back.eval()(x), model.eval()(x))


def test_a_quantizer_off_its_grid_is_not_packed(tmp_path):
    @register_quantizer("test_off_grid")
    class OffGrid(WeightQuantizer):
        def quantize(self, weight):
            return super().quantize(weight) + 0.001

    net, x = Branches(), torch.randn(2, 4)
    chosen = [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 4, "affine") for s in sites(net, x).weights]
    plan = with_quantizer(Plan(tuple(chosen)), quantizer_named("test_off_grid"))
    quantize(net, plan)
    with pytest.raises(HawqError, match="'a' is not on the grid of its quantizer 'test_off_grid'"):
        save_packed(net, plan, tmp_path / "x")


def test_names_and_options_are_checked(tmp_path):
    for make, say in (
        (lambda: quantizer_named("lqs"), "no quantizer 'lqs'.*Did you mean 'lsq'"),
        (lambda: quantizer_named("uniform", {"range": "mse"}), "no option 'range'.*Did you mean 'ranges'"),
        (lambda: quantizer_named("uniform", {"ranges": "minmx"}), "ranges 'minmx'.*Did you mean 'minmax'"),
        (lambda: quantizer_named("uniform", {"reestimate": -1}), "reestimate is -1"),
        (lambda: quantizer_named("int_only", {"momentum": 2}), "momentum is 2"),
        (lambda: quantizer_named("lsq", {"reestimate": 3}), "'lsq' has no option 'reestimate'"),
        (lambda: hawq(quantizer="nothing"), "no quantizer 'nothing'"),
        (lambda: register_quantizer("Not A Name")(WeightQuantizer), "no name for a quantizer"),
        (lambda: register_quantizer("lsq")(type("Other", (WeightQuantizer,), {})), "a quantizer 'lsq' already"),
        (lambda: import_quantizers([str(tmp_path / "none.py")]), "No file"),
        (lambda: import_quantizers(["no_such_module_here"]), "Cannot import quantizers from no_such_module_here"),
    ):
        with pytest.raises(HawqError, match=say):
            make()
    (tmp_path / "broken_quantizers.py").write_text("1 / 0")
    with pytest.raises(HawqError, match="ZeroDivisionError"):
        import_quantizers([str(tmp_path / "broken_quantizers.py")])


def test_plans_move_between_quantizers_and_versions(tmp_path):
    net, x = built(), torch.randn(2, 3, 8, 8)
    plan = random_plan(sites(net, x), 3)
    for name in PAPERS:
        moved = with_quantizer(plan, quantizer_named(name))
        assert moved.bits == plan.bits and moved.quantizer == name
        assert ApplyPlan(plan, quantizer=name).given_plan.quantizer == name
        assert ApplyPlan(moved).quantizer.name == name  # the plan's own, unless told otherwise
        moved.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == moved
    old = plan.to_dict()
    old["version"] = 1
    for key in ("quantizer", "quantizer_options", "sha256"):
        old.pop(key, None)
    assert Plan.from_dict(old).quantizer == "uniform"
    with pytest.raises(HawqError, match="version 3 is newer than this release"):
        Plan.from_dict({**old, "version": 3})
    with pytest.raises(HawqError, match="'codebook'; weights of .* with quantizer 'uniform'"):
        quantize(built(), with_quantizer(plan, quantizer_named("lq_nets")).replace(quantizer="uniform"))
