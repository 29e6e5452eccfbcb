"""torch.func, torch.fx, tracing and scripting of a network whose quantizers are on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn import functional as F

from hawq_lightning import HawqError
from hawq_lightning.quantization import prepare, quantizer_names

NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (4,)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)),
        (2, 3, 3),
    ),
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Conv1d(5, 3, 1), nn.Flatten()), (5, 4)),
}  # fmt: skip


def quantized(build, shape, name):
    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(6, *shape)
    for layer in prepare(net, quantizer=name).values():
        weight, inputs = layer.weight_quantizer, layer.input_quantizer
        weight.fit(layer.weight, 4, weight.code_formats(4)[0])
        inputs.enable(4, *inputs.calibrate(torch.linspace(-2, 2, 99), -2.0, 2.0, 4))
    return net, x


@pytest.mark.filterwarnings(
    "ignore:Using len", "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning"
)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", quantizer_names())
def test_transformations_give_what_the_network_gives(name, network, tmp_path):
    net, x = quantized(*NETWORKS[network], name)
    y = torch.arange(6) % 3
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(net, (parameters, buffers), (x[None],)), y[None])

    if name in ("lsq", "pact") and network == "linear":  # features of one image go into a factor of learned steps
        assert torch.allclose(vmap(loss, (None, 0, 0))(parameters, x, y).mean(), F.cross_entropy(net(x), y))
    single = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    F.cross_entropy(net(x), y).backward()
    for key, parameter in net.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(single[key].mean(0), parameter.grad, atol=1e-6), key

    tangent, weights = torch.randn_like(x), torch.randn(6, net(x).shape[1])
    out, moved = jvp(net, (x,), (tangent,))
    wanted = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad((net(wanted) * weights).sum(), wanted)
    assert torch.equal(out, net(x)) and torch.allclose((moved * weights).sum(), (slope * tangent).sum(), atol=1e-5)

    graph = torch.fx.symbolic_trace(net)
    assert torch.equal(graph(x), net(x)) and any(n.target == "0.weight_quantizer" for n in graph.graph.nodes)
    torch.jit.trace(net, x).save(tmp_path / "traced.pt")
    assert torch.allclose(torch.jit.load(tmp_path / "traced.pt")(x), net(x), atol=1e-6)
    with pytest.raises(
        HawqError, match=r"torch\.jit\.script cannot compile a quantized network: use torch\.jit\.trace"
    ):
        torch.jit.script(net)


@pytest.mark.parametrize("name", ["uniform", "lsq", "lq_nets", "int_only"])
def test_transformations_in_training_move_no_range(name):
    net, x = quantized(*NETWORKS["linear"], name)
    before = copy.deepcopy(net.state_dict())
    net.train()
    vmap(lambda x: net(x[None]))(x)
    jvp(net, (x,), (x,))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_an_ensemble_runs_as_one():
    nets = [quantized(*NETWORKS["linear"], "uniform")[0] for _ in range(3)]
    for i, net in enumerate(nets):
        net[0].weight.data.add_(0.1 * i)
    parameters, buffers = stack_module_state(nets)
    x = torch.randn(5, 4)
    out = vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(parameters, buffers)
    assert torch.allclose(out, torch.stack([net(x) for net in nets]), atol=1e-6)
