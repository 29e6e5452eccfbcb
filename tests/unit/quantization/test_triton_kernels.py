"""The fused kernels by Triton's interpreter, on the CPU: levels and gradients are those of the present functions."""

import copy
import importlib.util
import sys
import warnings

import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, QuantizerConfig
from hawq_lightning.quantization import Quantizer, quantize, quantizers, use_kernel
from tests.cases import ConvNet, build, image_batch
from tests.internals import internal
from tests.unit.quantization.test_compile import plan_for, step

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch came without triton")
fake_quantize = internal("quantization._fake_quantize")
KERNELS = "hawq_lightning.quantization._triton_kernels"


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels that are made while the variable is set run as Python."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(KERNELS, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of infinity times zero
        yield
    sys.modules.pop(KERNELS, None)  # else a GPU's tests would meet them


# first in the file: Triton 3.5 does not compile any more in a process in which it has interpreted
@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # 3.9, whose default is still the one that could fuse
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA is Linux's")
@pytest.mark.parametrize(
    "card", [pytest.param(75, marks=pytest.mark.stress), 80, pytest.param(90, marks=pytest.mark.stress)]
)
def test_the_kernels_compile_for_a_card_and_fuse_no_product(card):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernels = __import__(KERNELS, fromlist=["x"])
    for kernel in (kernels._levels_kernel, kernels._gradient_kernel):
        for channelwise in (False, True):
            constants = {"CHANNELWISE": channelwise, "INTERPRETED": False, "BLOCK": 1024}
            types = {
                n: "*fp32" if n.endswith("_at") else "constexpr" if n in constants else "i32" for n in kernel.arg_names
            }
            made = compile(ASTSource(kernel, types, constexprs=constants), target=GPUTarget("cuda", card, 32))
            assert made.asm["cubin"] and "fma." not in made.asm["ptx"] and "cvt.rni.f32.f32" in made.asm["ptx"]


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 2),
    "every second": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "one value": lambda x: x[:1, :1, :1, :1],
    "nothing": lambda x: x[:0],
}

FORMS = [pytest.param(n, marks=() if n == "every second" else pytest.mark.stress) for n in LAYOUTS]


def values(seed, step, dtype):
    """Random ones, ties of rounding, and those that are no numbers."""
    g = torch.Generator().manual_seed(seed)
    x = 4 * step * torch.randn(3, 6, 7, 5, generator=g)
    x.view(-1)[:300] = (torch.arange(300) - 150) * step / 4
    x.view(-1)[300:306] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3.4e38, 1e-40])
    return x.to(dtype)


def both(function, x, *grid):
    out = []
    for kernel in ("torch", "triton"):
        leaf = x.detach().requires_grad_()
        levels = function(leaf, *grid, kernel)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        levels.backward(grad)
        out.append((levels.detach(), leaf.grad))
    return out


def agree(x, torchs, ours, signs=True, odd=True, ties=False):
    (levels, grads), (mine, slopes) = torchs, ours
    assert mine.shape == levels.shape and mine.dtype == levels.dtype
    assert all(a == b for a, b, n in zip(mine.stride(), levels.stride(), x.shape) if n > 1 and x.numel())
    known = torch.isfinite(x) if not odd else torch.ones_like(x, dtype=torch.bool)
    if signs:
        assert torch.equal(bits(mine)[known], bits(levels)[known])
    assert torch.equal(mine[known].nan_to_num(7.0), levels[known].nan_to_num(7.0))
    # on NaN torch's own kernels let the gradient through or not, as the layout has it
    known &= ~torch.isnan(x) & ~torch.as_tensor(ties)
    assert torch.equal(slopes[known], grads[known])


@needs_triton
@pytest.mark.parametrize("layout", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_step_a_tensor(interpreted, dtype, layout):
    for seed, (step_, zero, top) in enumerate(
        [(0.25, 0, 15), (0.3, 7, 15), (1e-3, 128, 255), (0.25, 3, 7), (2e-3, 1, 3)]
    ):
        x = LAYOUTS[layout](values(seed, step_, dtype))
        grid = torch.tensor(step_), torch.tensor(float(zero)), top
        # torch's own operation makes integers of NaN, drops signs of zeros, and rounds ties at the ends into the range
        half = dtype == torch.float16
        ties = half & ((x.float() / step_).frac().abs() == 0.5)
        agree(x, *both(fake_quantize.fake_quantize_tensor, x, *grid), signs=not half, odd=not half, ties=ties)


@needs_triton
@pytest.mark.parametrize("layout", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_a_channel(interpreted, dtype, layout):
    for seed, (zero, half) in enumerate([(0.0, 8), (-0.5, 8), (-0.5, 1), (0.0, 128), (3.0, 8)]):
        x = LAYOUTS[layout](values(seed, 0.25, dtype))
        for axis in (0, 1, 3):
            steps = torch.rand(x.shape[axis], generator=torch.Generator().manual_seed(seed)) + 0.01
            grid = steps, torch.tensor(zero), axis, half
            same = dtype == torch.float32
            agree(x, *both(fake_quantize.fake_quantize_channels, x, *grid), signs=same, odd=same)


@needs_triton
def test_a_network_trains_as_without_it_and_back(interpreted):
    x, y = image_batch()
    model = build(ConvNet).float()
    quantize(model, plan_for(model))
    fused = use_kernel(copy.deepcopy(model))
    assert {q.kernel for q in quantizers(fused)} == {"triton"}
    out, slopes = step(fused, x.float(), y)
    expected, grads = step(model, x.float(), y)
    assert torch.equal(out, expected) and all(torch.equal(slopes[n], grads[n]) for n in grads)
    assert {q.kernel for q in quantizers(use_kernel(fused, "torch"))} == {"torch"}


@needs_triton
def test_second_derivatives(interpreted):
    x = values(0, 0.3, torch.float32).nan_to_num(0.0, 1.0, -1.0).clamp(-9, 9)
    found = []
    for kernel in ("torch", "triton"):
        leaf = x.clone().requires_grad_()
        levels = fake_quantize.fake_quantize_tensor(leaf, torch.tensor(0.3), torch.tensor(7.0), 15, kernel)
        (slope,) = torch.autograd.grad((levels**3).sum(), leaf, create_graph=True)
        found += torch.autograd.grad(slope.sum(), leaf)
    assert torch.equal(*found)


@needs_triton
def test_quantizers_with_rules_of_their_own_stay_with_torch(interpreted):
    model = build(ConvNet).float()
    quantize(model, plan_for(model, quantizer="int_only"))
    assert {q.kernel for q in quantizers(use_kernel(model))} == {"torch"}


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HawqError, match="needs an NVIDIA GPU|needs triton"):
        use_kernel(nn.Linear(2, 2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HawqError, match="needs triton"):
        use_kernel(nn.Linear(2, 2))
    with pytest.raises(HawqError, match="triton"):
        QuantizerConfig(kernel="cuda")
    assert Quantizer.kernel == "torch" and use_kernel(nn.Linear(2, 2), "torch")
