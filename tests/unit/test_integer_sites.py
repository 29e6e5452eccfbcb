"""Results that integer kernels keep as codes, as sites: which they are, and what the network then computes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hawq_lightning as hl
from hawq_lightning import HawqError, Plan, QuantizerConfig
from hawq_lightning.export import load_packed, packed_overhead, save_packed, to_onnx, to_pt2e
from hawq_lightning.layers import forget_calls
from hawq_lightning.quantization import (
    biases_of,
    enabled_bits,
    prepare,
    prepare_results_of,
    quantized_results,
    temporarily_quantized,
    unquantize,
)
from hawq_lightning.selection import Problem, select
from tests.deployed_networks import NETWORKS

BATCH, IMAGE = 6, (3, 8, 8)


class Residual(nn.Module):
    """A stem, a block whose ReLU is called twice, a pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(True)
        self.conv, self.norm2, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.norm2(self.conv(x))
        y += x
        return self.head(self.relu(y).mean((2, 3)))


class Generated(nn.Module):
    """Blocks of random kinds: sums, products, concatenations, poolings, in methods, operators and in place.

    Args:
        seed: which.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def pick(*of: str) -> str:
            return of[int(torch.randint(len(of), (1,), generator=draw))]

        self.kinds = [pick("sum", "in place", "gate", "concat", "pool", "plain") for _ in range(3)]
        self.clamps = [pick("relu", "relu6", "silu", "none") for _ in range(3)]
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, groups=2) for _ in self.kinds)
        self.joined = nn.ModuleList(nn.Conv2d(12, 6, 1) for _ in self.kinds)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for kind, clamp, conv, joined in zip(self.kinds, self.clamps, self.convs, self.joined):
            y = conv(x)
            y = y if clamp == "none" else getattr(F, clamp)(y)
            if kind == "sum":
                x = torch.add(x, y)
            elif kind == "in place":
                y += x
                x = y
            elif kind == "gate":
                x = x * torch.sigmoid(F.adaptive_avg_pool2d(y, 1))
            elif kind == "concat":
                x = joined(torch.cat([x, y], dim=1))
            else:
                x = F.avg_pool2d(y, 3, 1, 1) if kind == "pool" else y
        return self.head(x).mean((2, 3))


def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model(x)
    return out.square().mean()


def quantized(make: Callable[[], nn.Module], shape: tuple[int, ...], bits: int = 8) -> tuple[nn.Module, Plan]:
    """A network with random BatchNorms, quantized with its calibrated grids, and the plan."""
    torch.manual_seed(0)
    net, x = make(), torch.randn(BATCH, *shape)
    with torch.no_grad():
        net.train()(x)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(-1, 1.5)
                m.bias.normal_()
    table = hl.sites(net.eval(), x, integer="shared" if bits == 8 else "own")
    found = hl.quantization.candidates(net, [x], None, table, loss_fn, weight_bits=4, activation_bits=bits)
    plan = select(Problem(table, found, None, packed_overhead(net, table, biases=table.biases)), "1x")
    hl.quantize(net, plan)
    return net, Plan.from_dict(plan.to_dict())


def test_sums_pools_and_results_in_front_of_them_are_sites():
    net = Residual().eval()
    table = hl.sites(net, torch.randn(BATCH, *IMAGE), integer="shared")
    read = {s.name: s.layers for s in table.activations}
    assert read == {
        "stem.input": ("stem",),
        "conv.input": ("conv", ":relu"),  # the skip reads it, too
        "head.input": ("head",),
        "norm2:output": ("norm2:output",),
        ":relu_1": (":relu_1",),
    }
    assert table.biases == {"stem": "norm", "conv": "norm2"}
    assert table["norm2:output"].shape == (6, 8, 8) and table["norm2:output"].numel == 6 * 64
    own = hl.sites(net, torch.randn(BATCH, *IMAGE), integer="own")
    assert {":relu", ":relu_1", "norm2:output"} == {s.name for s in own.activations if s.fixed_bits}
    assert not hl.sites(net, torch.randn(BATCH, *IMAGE)).biases


def test_a_network_without_anything_between_its_layers_has_no_sites_more():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).eval()
    table = hl.sites(net, torch.randn(2, 4), integer="shared")
    assert len(table.activations) == 2 and not table.biases


def test_results_lie_on_their_grids_and_biases_are_whole_steps():
    net, plan = quantized(Residual, IMAGE)
    seen: dict[str, torch.Tensor] = {}
    x = torch.randn(BATCH, *IMAGE)
    net.norm2.register_forward_hook(lambda m, a, out: seen.update(out=out.clone()))
    with torch.no_grad():
        net(x)
    codes = seen["out"] / plan["norm2:output"].scale
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    scale = net.conv.weight_quantizer.scale * net.norm2.weight / (net.norm2.running_var + 1e-5).sqrt()
    bias = net.norm2.bias + (net.conv.bias - net.norm2.running_mean) * scale / net.conv.weight_quantizer.scale
    steps = (bias + net.norm2.integer_bias.change().float()) / (scale * plan["conv.input"].scale)
    assert torch.allclose(steps, steps.round(), atol=0.02) and not torch.allclose(bias, steps, atol=0.02)


def test_files_states_and_copies_bring_them_back(tmp_path: Path):
    net, plan = quantized(Residual, IMAGE)
    x = torch.randn(BATCH, *IMAGE)
    with torch.no_grad():
        wanted = net(x)
        assert save_packed(net, plan, tmp_path / "a.safetensors") == plan.costs["file_bytes"]
        assert torch.equal(load_packed(tmp_path / "a.safetensors", Residual().eval())(x), wanted)
        inside = load_packed(tmp_path / "a.safetensors", nn.ModuleDict({"net": Residual()}).eval())
        assert torch.equal(inside["net"](x), wanted) and biases_of(inside)["net.conv"] == "net.norm2"
        fresh = Residual().eval()
        prepare(fresh)
        prepare_results_of(fresh, net.state_dict())
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(fresh(x), wanted) and enabled_bits(fresh) == enabled_bits(net)
        assert torch.equal(copy.deepcopy(net)(x), wanted)
        with temporarily_quantized(net):
            assert not quantized_results(net)
        assert torch.equal(net(x), wanted)
        plain = unquantize(copy.deepcopy(net))
        assert not quantized_results(plain) and not biases_of(plain)
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in plain.modules())
    again = hl.quantization.plan_of(net)
    assert again.biases == plan.biases and again.bits[":relu_1"] == 8


def test_training_moves_what_stands_in_front_of_a_result_and_learned_steps_of_its_layer():
    torch.manual_seed(0)
    net, x = Residual().eval(), torch.randn(BATCH, *IMAGE)
    table = hl.sites(net, x, integer="shared")
    found = hl.quantization.candidates(net, [x], None, table, loss_fn, weight_bits=4, quantizer="lsq")
    hl.quantize(net.train(), select(Problem(table, found), "1x").replace(quantizer="lsq"))
    loss_fn(net, x).backward()
    result, layer = quantized_results(net)[":relu"].input_quantizer, net.conv.input_quantizer
    assert net.stem.weight.grad.abs().sum() > 0 and net.norm2.weight.grad.abs().sum() > 0
    assert result.step.grad is None and layer.step.grad.abs() > 0
    with torch.no_grad():
        layer.step.mul_(2)
        net(x)
    assert float(result.scale) == float(layer.scale)


def test_activation_checkpointing_gives_the_same_gradients():
    net, _ = quantized(Residual, IMAGE)
    x, (whole, again) = torch.randn(BATCH, *IMAGE), (copy.deepcopy(net).train() for _ in range(2))
    loss_fn(whole, x).backward()
    checkpoint(lambda x: loss_fn(again, x), x, use_reentrant=False).backward()
    assert torch.equal(whole.stem.weight.grad, again.stem.weight.grad)


def test_a_pass_that_hooks_are_not_told_the_end_of_leaves_nothing_behind():
    class Cut(BaseException):
        pass

    def cut(*_: object) -> None:
        raise Cut

    net, _ = quantized(Residual, IMAGE)
    handle = net.head.register_forward_pre_hook(cut)
    with pytest.raises(Cut):
        net(torch.randn(BATCH, *IMAGE))
    handle.remove()
    forget_calls()
    assert not torch.overrides._get_current_function_mode_stack()
    assert "norm2:output" in {s.name for s in hl.sites(net, torch.randn(BATCH, *IMAGE), integer="shared")}


def test_a_config_that_cannot_be_deployed_is_refused():
    assert QuantizerConfig(deploy="integer").integer_grids == "shared"
    assert QuantizerConfig(deploy="integer", activation_bits=(4, 8)).integer_grids == "own"
    assert QuantizerConfig(deploy="integer", input_bits=4).integer_grids == "own"
    assert QuantizerConfig().integer_grids == "none"
    with pytest.raises(HawqError, match="needs activations on grids"):
        QuantizerConfig(deploy="integer", activation_bits=None)
    with pytest.raises(HawqError, match="Did you mean 'integer'"):
        QuantizerConfig(deploy="integr")  # type: ignore[arg-type]


def deployed_as_trained(
    make: Callable[[], nn.Module], shape: tuple[int, ...], bits: int, path: Path, free_batch: bool = True
) -> None:
    """An integer file needs no calibration, and gives what the network gives."""
    pytest.importorskip("onnxruntime")
    from hawq_lightning.export.onnx import session

    net, plan = quantized(make, shape, bits)
    z = torch.randn(BATCH, *shape)
    written = to_onnx(net, plan, z, path, integer=True, calibration=[], free_batch=free_batch)
    assert written.grids == 0, "what integer kernels keep as codes has no grid in the network"
    (given,) = session(path).run(None, {"input": z.numpy()})
    with torch.no_grad():
        wanted = net(z)
    far = (torch.from_numpy(given) - wanted).abs() / wanted.std()
    # what rounds the other way in a tie moves a code by one
    assert far.median() < 1e-5 and far.mean() < 2e-3, f"{far.mean():.2g} of a standard deviation"


def test_an_integer_file_computes_what_the_network_does(tmp_path: Path):
    deployed_as_trained(Residual, IMAGE, 8, tmp_path / "a.onnx")


@pytest.mark.stress
@pytest.mark.parametrize(("seed", "bits"), [*itertools.product(range(12), (4, 8))])
def test_generated_networks_compute_the_same(tmp_path: Path, seed: int, bits: int):
    deployed_as_trained(lambda: Generated(seed), IMAGE, bits, tmp_path / "a.onnx")


@pytest.mark.stress
def test_a_mobile_program_lacks_the_grid_of_the_output_alone():
    net, plan = quantized(Residual, IMAGE)
    x = torch.randn(BATCH, *IMAGE)
    written = to_pt2e(net, plan, x, [x])
    assert written.calibrated == 1 and written.planned == 5
    with torch.no_grad():
        far = (written.program.module()(x[:1]) - net(x[:1])).abs().max()
    assert far <= 0.51 * written.output.scale


@pytest.mark.stress
@pytest.mark.parametrize("name", [n for n in NETWORKS if "transpose" not in n])
def test_networks_of_all_kinds_compute_the_same(tmp_path: Path, name: str):
    deployed_as_trained(*NETWORKS[name], 8, tmp_path / "a.onnx", free_batch=name != "transformer_block")
