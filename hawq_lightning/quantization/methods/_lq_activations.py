"""Activations on a learned basis (LQ-Nets, Zhang et al., ECCV 2018)."""

from __future__ import annotations

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._torch_state import transformed
from hawq_lightning._types import AutogradContext, FunctionInputs
from hawq_lightning.quantization._fake_quantize import clipped_grad, eager
from hawq_lightning.quantization._quantizers import ActivationQuantizer
from hawq_lightning.quantization._ranges import HUGE, TINY, Ranges
from hawq_lightning.quantization._storage import Storage
from hawq_lightning.quantization.methods._basis import (
    AVERAGE,
    basis_levels,
    bit_table,
    decision_thresholds,
    step_to_least_squares,
)

MOST_BITS = 4
_SAMPLE = 1 << 14


class ActivationLQ(ActivationQuantizer):
    """Levels ``sum_k e_k v_k`` with bits ``e`` in {0, 1} and a basis ``v`` of b numbers a tensor, up to 4 bits.

    The basis starts from the calibrated even steps and follows the batches of training: one round of the paper's
    quantization error minimisation (algorithm 1) a step, on an even sample of 16,384 values, and a moving average that
    keeps 0.9. Zero is always a level. The gradient passes between the lowest and the highest level.

    Even steps remain where the paper has nothing: above 4 bits, and for activations with negative values, whose levels
    would need an offset that is no multiple of the others, so that zero (and padding) would be no level.

    Args:
        ranges: of the even steps: ``mse``, ``minmax`` or ``percentile``.

    Attributes:
        basis: v; zeros where steps are even.
    """

    updates_range = True
    basis: torch.Tensor

    def __init__(self, *, ranges: Ranges = "mse") -> None:
        super().__init__(ranges=ranges)
        self.register_buffer("basis", torch.zeros(MOST_BITS, dtype=torch.float32))
        self.learned = False

    @torch.no_grad()
    def enable(self, bits: int, scale: torch.Tensor | float, zero_point: float = 0.0) -> None:
        """See :meth:`Quantizer.enable`."""
        super().enable(bits, scale, zero_point)
        basis = torch.zeros_like(self.basis)
        if bits <= MOST_BITS and zero_point == 0:
            basis[:bits] = self.scale * 2.0 ** torch.arange(bits, dtype=torch.float32, device=basis.device)
        self.enable_basis(basis)

    @torch.no_grad()
    def enable_basis(self, basis: torch.Tensor) -> None:
        """Take another basis, of up to 4 numbers; zeros: even steps."""
        self.basis.zero_()
        self.basis[: len(basis)] = basis.to(self.basis)
        self.refresh()

    def refresh(self) -> None:
        """See :meth:`Quantizer.refresh`."""
        super().refresh()
        self.learned = bool(self.basis.any())

    def levels(self) -> torch.Tensor:
        """Level of every code, ``[2^b]``."""
        return basis_levels(self.basis, self._table())

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest level; in training the basis moves first."""
        if not self.learned:
            return super().quantize(x)
        if self.training and self.range_updates_enabled and not transformed() and x.numel():
            self._refit(x)
        nearest: torch.Tensor = _Nearest.apply(x, self.levels())
        return nearest

    @property
    def even_steps(self) -> bool:
        """Where no basis is learned."""
        return not self.learned

    @torch.no_grad()
    def storage(self) -> Storage:
        """The even steps, and the basis: four numbers whatever the bits, zeros where none is learned."""
        return Storage({"basis": self.basis.detach().cpu().clone()}, super().storage().facts, plain=False)

    @torch.no_grad()
    def from_storage(self, bits: int, code_format: str, storage: Storage) -> None:
        """See :meth:`Quantizer.from_storage`."""
        storage.only("scale", "zero_point", "basis")
        scale, zero_point = self._stored_grid(bits, code_format, storage)
        # a file without a basis is of even steps
        basis = (
            storage.tensor("basis", (MOST_BITS,))
            if "basis" in storage.tensors
            else torch.zeros(MOST_BITS, dtype=torch.float32)
        )
        if bool(basis[bits:].any()) or (bool(basis.any()) and (bits > MOST_BITS or zero_point != 0)):
            raise HawqError(f"basis is {basis.tolist()}, which codes of {bits} bits and zero point {zero_point:g} lack")
        self.enable(bits, scale, zero_point)
        self.enable_basis(basis)

    def _table(self) -> torch.Tensor:
        return bit_table(self.bits, 0.0, self.basis.device)

    @torch.no_grad()
    def _refit(self, x: torch.Tensor) -> None:
        flat = x.detach().reshape(-1)
        # an odd stride does not beat with the row length of the images
        values = flat[:: max(1, flat.numel() // _SAMPLE) | 1].float().nan_to_num(0.0, HUGE, -HUGE)
        peak = values.abs().amax().clamp_min(TINY).double()
        table, levels = self._table(), self.levels()
        ascending, order = levels.sort()
        codes = order[torch.bucketize(values, decision_thresholds(ascending))]
        residual = values.double() / peak - levels[codes].double() / peak
        change = step_to_least_squares(residual[None], codes[None], table)[0] * peak
        moved = self.basis[: self.bits] + AVERAGE * change
        self.basis[: self.bits] = moved.clamp(-HUGE / 16, HUGE / 16).float()

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        if f"{prefix}scale" in state_dict:  # a version without it had even steps
            state_dict.setdefault(f"{prefix}basis", torch.zeros_like(self.basis))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Nearest(torch.autograd.Function):
    """The nearest of some levels; the gradient passes strictly between the first and the last."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        wide, ascending = x.float(), levels.sort().values
        between = decision_thresholds(ascending)
        if not eager(wide):
            return ascending[torch.bucketize(wide, between)].to(x.dtype)
        # whole passes are ten times faster here than a search for every value
        passed, count = torch.empty_like(wide), torch.zeros_like(wide)
        for middle in between.tolist():
            count.add_(torch.gt(wide, middle, out=passed))
        nearest = ascending.index_select(0, count.reshape(-1).to(torch.int32)).view(count.shape)
        return nearest.to(x.dtype)

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: FunctionInputs, output: torch.Tensor) -> None:
        x, levels = inputs
        ctx.save_for_backward(x, levels)
        ctx.save_for_forward(x, levels)

    @staticmethod
    def jvp(ctx: AutogradContext, *tangents: torch.Tensor | None) -> torch.Tensor:
        x, levels = ctx.saved_tensors
        low, high = levels.aminmax()
        return torch.zeros_like(x) if tangents[0] is None else tangents[0] * ((x > low) & (x < high))

    @staticmethod
    def backward(ctx: AutogradContext, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, levels = ctx.saved_tensors
        low, high = levels.aminmax()
        if eager(x):
            return clipped_grad(grads[0], x, float(low.detach()), float(high.detach())), None
        return grads[0] * ((x > low) & (x < high)), None
