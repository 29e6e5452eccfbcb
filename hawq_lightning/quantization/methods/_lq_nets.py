"""LQ-Nets: levels spanned by a learned basis (Zhang et al., ECCV 2018)."""

from __future__ import annotations

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._torch_state import transformed
from hawq_lightning.quantization._quantizers import WeightQuantizer
from hawq_lightning.quantization._ranges import TINY, check_finite, weight_step
from hawq_lightning.quantization._registry import register_quantizer
from hawq_lightning.quantization._storage import Storage
from hawq_lightning.quantization.methods._basis import (
    AVERAGE,
    basis_levels,
    bit_table,
    decision_thresholds,
    step_to_least_squares,
)
from hawq_lightning.quantization.methods._learned import straight_through
from hawq_lightning.quantization.methods._lq_activations import ActivationLQ

_SWEEPS = 20


@register_quantizer("lq_nets", activation=ActivationLQ)
class WeightLQ(WeightQuantizer):
    """Levels ``sum_k e_k v_k`` with signs ``e`` in {-1, 1} and a basis ``v`` of b numbers a channel (eq. 3).

    The basis is fitted by the paper's quantization error minimisation (algorithm 1): the nearest level for every
    weight, then the basis of least squared error for these codes. It goes on in training, as a moving average, one
    round a step. Bit k of a code is the sign of ``v_k``.

    Args:
        channels: length of the channel axis.
        axis: channel axis of the weight.
    """

    updates_range = True
    basis: torch.Tensor

    def __init__(self, channels: int, axis: int = 0) -> None:
        super().__init__(channels, axis)
        self.register_buffer("basis", torch.zeros(channels, 8, dtype=torch.float32))

    @property
    def code(self) -> str:
        """Code format."""
        return "codebook"

    def code_formats(self, bits: int) -> tuple[str, ...]:
        """Codes are numbers of levels in a table."""
        return ("codebook",)

    @torch.no_grad()
    def enable_basis(self, bits: int, basis: torch.Tensor) -> None:
        """Switch on, in place.

        Args:
            bits: code width.
            basis: ``[channels, bits]``, finite.

        Raises:
            HawqError: NaN or infinity.
        """
        if not bool(torch.isfinite(basis).all()):
            raise HawqError("A basis of levels must be finite.")
        self.enable(bits, torch.ones_like(self.scale))
        self.basis.zero_()
        self.basis[:, :bits] = basis.to(self.basis)

    def levels(self) -> torch.Tensor:
        """Level of every code, ``[channels, 2^b]``; always summed in the same order."""
        return basis_levels(self.basis, self._signs())

    @torch.no_grad()
    def fit(self, weight: torch.Tensor, bits: int, code: str) -> float:
        """Alternate from even steps until nothing changes; see :meth:`WeightQuantizer.fit`."""
        check_finite(weight)
        step, _ = weight_step(weight, bits, "midrise", self.axis)
        halves = 2.0 ** torch.arange(-1, bits - 1, dtype=torch.float32, device=weight.device)
        self.enable_basis(bits, step[:, None] * halves)
        rows = self._rows(weight)
        best, least = self.basis.clone(), self._error(rows)
        for _ in range(_SWEEPS):
            self.basis.copy_(self._refit(rows, 1.0))
            error = self._error(rows)
            if not bool((error < least * (1 - 1e-6)).any()):
                break
            better = error < least
            best = torch.where(better[:, None], self.basis, best)
            least = torch.minimum(error, least)
        self.basis.copy_(best)
        return float((self._levels_of(weight).double() - weight.double()).square().sum())

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest level; the gradient passes through."""
        if self.training and self.range_updates_enabled and not transformed():
            with torch.no_grad():
                self.basis.copy_(self._refit(self._rows(weight), AVERAGE))
        return straight_through(weight, self._levels_of(weight))

    @torch.no_grad()
    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Numbers of levels, less 2^(b-1), so that they pack as other codes do; see :meth:`WeightQuantizer.codes`."""
        self.refresh()
        if self.bits == 0:
            raise HawqError("This quantizer is off; it has no codes.")
        indices = self._nearest(self._rows(weight))
        return (self._shaped(indices, weight) - (1 << (self.bits - 1))).to(torch.int32)

    @torch.no_grad()
    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """The float32 weight that ``codes`` stand for, bit-identical to ``self(weight)``."""
        rows = codes.transpose(0, self.axis).reshape(codes.shape[self.axis], -1).long() + (1 << (self.bits - 1))
        return self._shaped(self.levels().gather(1, rows), codes)

    @property
    def even_steps(self) -> bool:
        """Levels lie anywhere."""
        return False

    @torch.no_grad()
    def storage(self) -> Storage:
        """The basis of every channel, ``[channels, bits]``."""
        return Storage({"basis": self.basis[:, : self.bits].detach().cpu().contiguous()}, plain=False)

    @torch.no_grad()
    def from_storage(self, bits: int, code_format: str, storage: Storage) -> None:
        """See :meth:`Quantizer.from_storage`."""
        storage.only("basis")
        if code_format != "codebook":
            raise HawqError(f"code format {code_format!r} is none of quantizer {self.name!r}")
        self.enable_basis(bits, storage.tensor("basis", (len(self.basis), bits)))

    def _signs(self) -> torch.Tensor:
        return bit_table(self.bits, -1.0, self.basis.device)

    def _rows(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().transpose(0, self.axis).reshape(weight.shape[self.axis], -1).float().contiguous()

    def _shaped(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return rows.reshape(like.transpose(0, self.axis).shape).transpose(0, self.axis)

    def _nearest(self, rows: torch.Tensor) -> torch.Tensor:
        ascending, order = self.levels().sort(dim=1, stable=True)
        return order.gather(1, torch.searchsorted(decision_thresholds(ascending).contiguous(), rows))

    @torch.no_grad()
    def _levels_of(self, weight: torch.Tensor) -> torch.Tensor:
        rows = self._rows(weight)
        return self._shaped(self.levels().gather(1, self._nearest(rows)), weight).to(weight.dtype)

    def _error(self, rows: torch.Tensor) -> torch.Tensor:
        peak = rows.abs().amax(1, keepdim=True).clamp_min(TINY)
        return ((self.levels().gather(1, self._nearest(rows)) - rows) / peak).double().square().sum(1)

    def _refit(self, rows: torch.Tensor, share: float) -> torch.Tensor:
        """The basis moved by ``share`` towards that of least squared error for the present codes."""
        # in units of each channel's peak, and as a change: directions that no weight shows stay as they are
        peak = rows.abs().amax(1, keepdim=True).clamp_min(TINY).double()
        nearest = self._nearest(rows)
        residual = rows / peak - self.levels().gather(1, nearest) / peak
        change = step_to_least_squares(residual, nearest, self._signs())
        moved = self.basis.clone()
        moved[:, : self.bits] += (share * change * peak).float()
        return moved
