"""Old-style weight and spectral norm and pruning, whose hooks make the weight: every one of a network's, or some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune, spectral_norm, weight_norm

from hawq_lightning import Plan, load_packed, quantize, save_packed
from hawq_lightning.export import deploy, packed_overhead
from hawq_lightning.quantization import enabled_bits, unquantize
from tests.internals import internal
from tests.layer_checks import plan_for

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
Batch = tuple[torch.Tensor, torch.Tensor]


def _pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", 0.4)


def _linear(make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(make(nn.Linear(6, 8)), nn.ReLU(), make(nn.Linear(8, 3)))


def _mixed() -> nn.Module:
    up = weight_norm(nn.ConvTranspose2d(4, 3, 3), dim=1)
    return nn.Sequential(spectral_norm(nn.Conv2d(2, 4, 3)), nn.ReLU(), up, nn.Flatten(), _pruned(nn.Linear(108, 3)))


def _table() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Embedding(6, 8)), nn.Flatten(), nn.Linear(32, 3))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = weight_norm(nn.LSTM(6, 8, batch_first=True), "weight_hh_l0"), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(self.lstm(x[:, None])[0][:, -1])
        return y


MEMBERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "spectral_norm": (lambda: _linear(spectral_norm), torch.randn(4, 6)),
    "weight_norm": (lambda: _linear(weight_norm), torch.randn(4, 6)),
    "pruned": (lambda: _linear(_pruned), torch.randn(4, 6)),
    "mixed": (_mixed, torch.randn(4, 2, 6, 6)),
    "embedding": (_table, torch.randint(0, 6, (4, 4))),
    "recurrent": (_Recurrent, torch.randn(4, 6)),
}


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _quantized(name: str) -> tuple[nn.Module, Plan, torch.Tensor]:
    torch.manual_seed(0)
    make, x = MEMBERS[name]
    net = make().eval()
    plan = plan_for(net, (x, torch.arange(4) % 3), _loss)
    return quantize(net, plan), plan, x


@pytest.mark.parametrize("name", MEMBERS)
def test_checkpoints_and_packed_files_load_into_networks_in_every_state(name: str, tmp_path: Path) -> None:
    net, plan, x = _quantized(name)
    make, want, path = MEMBERS[name][0], net(x), tmp_path / "net"
    size = save_packed(net, plan, path)
    assert size >= packed_overhead(net, plan.sites)
    new, armed, trained = make().eval(), quantize(make().eval(), plan), make().train()
    trained(x)
    armed.load_state_dict(net.state_dict())
    assert torch.equal(armed(x), want)
    for other in (new, armed, quantize(trained, plan).eval()):
        assert torch.equal(load_packed(path, other)(x), want)
        assert not any(k.endswith(("_orig", "_mask", "_g", "_u")) for k in other.state_dict())
    assert torch.equal(load_packed(path, new)(x), want), "a second time"
    new.train()
    new(x).sum().backward()
    assert all(p.grad is not None for p in new.parameters())
    assert torch.allclose(deploy(net, plan, x).model(x), want, atol=1e-5), "after a pass with gradients"
    unquantize(net)(x)
    assert not enabled_bits(net) and torch.equal(quantize(net, plan)(x), want)


def test_files_that_hold_what_a_weight_is_made_of_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, plan, x = _quantized("mixed")
    with monkeypatch.context() as earlier:
        earlier.setattr(internal("_float_rest"), "made_by_hook", lambda module, name: ())
        save_packed(net, plan, tmp_path / "net")
    assert torch.equal(load_packed(tmp_path / "net", _mixed().eval())(x), net(x))
