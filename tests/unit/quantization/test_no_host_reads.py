"""A training step reads nothing back from the device: on ``meta`` a read is an error, and every branch is the GPU's."""

import pytest
import torch
from torch import nn

import hawq_lightning as hl
from hawq_lightning.quantization import quantizer_names


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head(self.depth(x).relu().mean((2, 3)))


def prepared(quantizer, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    net = Net()
    batch = torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))

    def loss_fn(model, b):
        return nn.functional.cross_entropy(model(b[0]), b[1])

    table = hl.sites(net, batch)
    traces = hl.measure(net, [batch], loss_fn, sites=table, progress=False, rtol=0.9)
    choices = hl.candidates(
        net, [batch], traces, table, loss_fn, quantizer=quantizer, weight_bits=(4,), activation_bits=(4,)
    )
    plan = hl.select(hl.Problem(table, choices, traces), "2x")
    hl.quantize(net, plan.replace(quantizer=quantizer))
    return net.to("meta", dtype).train()


@pytest.fixture
def fused_on_meta():
    """torch has no such kernels for its fused fake-quantizers."""
    library = torch.library.Library("aten", "IMPL", "Meta")
    for name in (
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        "fake_quantize_per_channel_affine_cachemask",
    ):
        library.impl(name, lambda x, *rest: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)))
    yield
    library._destroy()


HALF = [pytest.param(q, torch.bfloat16, marks=pytest.mark.stress) for q in quantizer_names()]


@pytest.mark.parametrize("quantizer, dtype", [*((q, torch.float32) for q in quantizer_names()), *HALF])
def test_a_training_step_reads_nothing_back(fused_on_meta, quantizer, dtype):
    net = prepared(quantizer, dtype)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x, y = torch.empty(4, 3, 8, 8, device="meta", dtype=dtype), torch.empty(4, device="meta", dtype=torch.long)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x).float(), y).backward()
        optimizer.step()
