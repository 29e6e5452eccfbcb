"""torch.compile on the quantized network: the same outputs and gradients, and plans that change are noticed."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hawq_lightning import Plan, PlanSite, sites
from hawq_lightning.quantization import disable, quantize, quantized_layers, quantizer_named, with_quantizer
from tests.cases import ConvNet, build, image_batch
from tests.unit.quantization.test_post_training import weight_plan

OTHERS = ["lsq", "pact", "dorefa", "lq_nets", "int_only"]


class NoTies(ConvNet):
    """Sums of few products of few codes are often equal, and max pooling may then send the gradient to either."""

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = F.avg_pool2d(x + self.relu(self.grouped(x)), 2)
        x = self.relu(self.same(x)) + 0.5 * x
        return self.fc(x.mean((2, 3)))


def plan_for(model, weight_bits=3, quantizer="uniform"):
    weights = weight_plan(model, weight_bits).sites
    names = [s.layers[0] for s in weights]
    reads = [PlanSite(f"{n}.input", "activation", (n,), (), 0, 4, "affine", 0.2, 7) for n in names]
    return Plan(sites=(*weights, *reads), quantizer=quantizer)


def full_plan(model, x, quantizer):
    """With what some quantizers look at: which BatchNorm follows, and which activations are never negative."""
    plan = plan_for(model)
    chosen = [replace(s, zero_point=0) if s.kind == "activation" and s.layers != ("stem",) else s for s in plan.sites]
    plan = plan.replace(sites=tuple(chosen), layers=sites(model, x).layers)
    return with_quantizer(plan, quantizer_named(quantizer))


def step(model, x, y):
    model.zero_grad()
    out = model(x)
    F.cross_entropy(out, y).backward()
    return out.detach(), {n.replace("_orig_mod.", ""): p.grad.clone() for n, p in model.named_parameters()}


def check(backend, quantizer="uniform", tolerance=0.0):
    torch._dynamo.reset()
    x, y = image_batch()
    x = x.float()
    model = build(NoTies).float()
    quantize(model, full_plan(model, x, quantizer))
    eager, slopes = step(copy.deepcopy(model), x, y)  # some quantizers move with every step
    compiled = torch.compile(model, backend=backend)
    out, grads = step(compiled, x, y)
    assert torch.allclose(out, eager, rtol=0, atol=tolerance)
    for name, grad in grads.items():
        assert torch.allclose(grad, slopes[name], rtol=1e-4, atol=1e-6), name
    disable(model)  # bits are state: compiled code must notice
    assert torch.allclose(compiled(x), build(NoTies).float()(x), rtol=0, atol=max(tolerance, 1e-6))
    assert quantized_layers(compiled).keys() == quantized_layers(model).keys()


@pytest.mark.parametrize("quantizer", ["uniform", pytest.param("lsq", marks=pytest.mark.stress)])
def test_compiled_and_eager_agree(quantizer):
    check("aot_eager", quantizer, tolerance=1e-6)


@pytest.mark.parametrize(
    "quantizer", ["uniform", *(pytest.param(q, marks=pytest.mark.stress) for q in ("dorefa", "int_only"))]
)
def test_the_graph_of_a_quantized_network_is_whole(quantizer):
    torch._dynamo.reset()
    x, _ = image_batch()
    model = build(ConvNet).float()
    quantize(model, full_plan(model, x.float(), quantizer))
    found = torch._dynamo.explain(model)(x.float())
    assert found.graph_break_count == 0, found.break_reasons


@pytest.mark.stress
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("quantizer", ["uniform", *OTHERS])
def test_other_backends(backend, quantizer):
    check(backend, quantizer, tolerance=1e-5)
