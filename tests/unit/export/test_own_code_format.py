"""A user's quantizer with a code format of its own goes from plan to file and back without a change to the package."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, Plan, PlanSite, load_packed, quantize, save_packed, sites
from hawq_lightning.export import export, packed_overhead
from hawq_lightning.quantization import Storage, WeightQuantizer, register_code_format, register_quantizer

register_code_format("test_powers", lambda channels, bits: 4 * channels)


@register_quantizer("test_powers_of_two")
class PowersOfTwo(WeightQuantizer):
    """Levels ``sign * peak * 2^-k``: shifts in the place of products."""

    code = "test_powers"  # type: ignore[assignment]

    def code_formats(self, bits: int) -> tuple[str, ...]:
        return ("test_powers",)

    @property
    def even_steps(self) -> bool:
        return False

    @torch.no_grad()
    def fit(self, weight: torch.Tensor, bits: int, code: str) -> float:
        self.enable(bits, weight.transpose(0, self.axis).flatten(1).abs().amax(1).clamp_min(1e-8))
        return float((self(weight) - weight).square().sum())

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.dequantize(self.codes(weight)) - weight).detach()

    @torch.no_grad()
    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        half = 1 << (self.bits - 1)
        ratio = weight.abs() / self._along(weight)
        exponent = (-torch.log2(ratio.clamp_min(1e-30))).round().clamp(0, half - 1)
        return torch.where(weight < 0, -1 - exponent, exponent).to(torch.int32)

    @torch.no_grad()
    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        exponent = torch.where(codes < 0, -1 - codes, codes)
        return torch.where(codes < 0, -1.0, 1.0) * self._along(codes) * torch.exp2(-exponent.float())

    @torch.no_grad()
    def eval_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return self.dequantize(self.codes(weight))

    def _along(self, like: torch.Tensor) -> torch.Tensor:
        return self.scale.view([-1 if i == self.axis else 1 for i in range(like.ndim)])

    def storage(self) -> Storage:
        return Storage({"peak": self.scale.detach().cpu().clone()}, {"base": 2}, plain=False)

    def from_storage(self, bits: int, code_format: str, storage: Storage) -> None:
        storage.only("peak", "base")
        if code_format != self.code or storage.number("base") != 2:
            raise HawqError(f"{code_format!r} of base {storage.number('base')} is none of ours")
        self.enable(bits, storage.tensor("peak", tuple(self.scale.shape)))


def test_from_plan_to_file_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval(), torch.rand(2, 2, 6, 6)
    table = sites(net, x)
    chosen = tuple(
        PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, b, "test_powers") for s, b in zip(table.weights, (3, 4))
    )
    Plan(chosen, quantizer="test_powers_of_two").save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    overhead = packed_overhead(net, table.weights, "test_powers_of_two")
    quantize(net, plan)
    size = save_packed(net, plan, tmp_path / "m.safetensors")
    codes = sum((s.numel * b + 7) // 8 + 4 * s.channels for s, b in zip(table.weights, (3, 4)))
    assert size == overhead + codes
    fresh = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    assert torch.equal(load_packed(tmp_path / "m.safetensors", fresh)(x), net(x))
    with pytest.raises(HawqError, match="'test_powers', which 'onnx' cannot express"):
        export(net, plan, tmp_path / "m.onnx", example_input=x)
    with pytest.raises(HawqError, match="code format 'test_power' is unknown.*Did you mean 'test_powers'"):
        Plan.from_dict({**plan.to_dict(), "sites": [{**plan.to_dict()["sites"][0], "code": "test_power"}]})
