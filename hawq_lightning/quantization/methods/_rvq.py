"""Value-aware quantization: a few large values stay float, the others have a grid (Park et al., ECCV 2018)."""

from __future__ import annotations

import math

import torch

from hawq_lightning._code_formats import CODE_FORMATS
from hawq_lightning._errors import HawqError
from hawq_lightning.layers import deterministic
from hawq_lightning.quantization._fake_quantize import MIDRISE_ZERO
from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer
from hawq_lightning.quantization._ranges import Ranges, check_finite, weight_step
from hawq_lightning.quantization._registry import register_quantizer
from hawq_lightning.quantization._storage import Storage
from hawq_lightning.quantization.methods._learned import straight_through

_BLOCK = 1 << 16  # places within it take two bytes
_PREFIX = "outliers"
SHARES = {CODE_FORMATS[n].share: n for n in CODE_FORMATS if n.startswith(_PREFIX)}
"""Shares of values at full precision -> the code format of each."""


def _checked(share: float) -> float:
    if share not in SHARES:
        close = min(SHARES, key=lambda s: abs(s - share)) if isinstance(share, (int, float)) else 0.03
        raise HawqError(f"share is {share!r}; use one of {', '.join(map(str, SHARES))}; the nearest is {close}.")
    return share


def _share_of(code_format: str) -> float:
    shares = {name: share for share, name in SHARES.items()}
    if code_format not in shares:
        raise HawqError(f"code format {code_format!r} is none of quantizer 'rvq'")
    return shares[code_format]


class ActivationRVQ(ActivationQuantizer):
    """Even steps up to the value that a share of the calibration images' values exceeds; what lies beyond stays float.

    The grid ends there, so values beyond it are those that it would have clipped. How many there are depends on the
    images; sizes count the share. The gradient passes everywhere.

    Args:
        share: of values at full precision, 0.005 to 0.05.
    """

    def __init__(self, *, share: float = 0.03) -> None:
        super().__init__(ranges="minmax")
        self.share = _checked(share)

    @property
    def code(self) -> str:
        """Code format, which tells the share."""
        return SHARES[self.share]

    @property
    def even_steps(self) -> bool:
        """Not beyond the grid."""
        return not self.bits

    def calibrate(self, sample: torch.Tensor, low: float, high: float, bits: int) -> tuple[float, int]:
        """Between the extremes of what is no outlier; see :meth:`ActivationQuantizer.calibrate`."""
        if sample.numel() and bool(torch.isfinite(sample).all()):
            kept = sample.numel() - round(self.share * sample.numel())
            most = float(sample.abs().float().kthvalue(max(1, kept)).values)
            low, high = max(low, -most), min(high, most)
        return super().calibrate(sample, low, high, bits)

    def levels_at(self, x: torch.Tensor, step: float, zero: int, bits: int) -> torch.Tensor:
        """What is not beyond the grid, on it."""
        levels = super().levels_at(x, step, zero, bits)
        return torch.where(
            self._beyond(
                x, torch.tensor(step, dtype=torch.float32), torch.tensor(float(zero), dtype=torch.float32), bits
            ),
            x,
            levels,
        )

    @deterministic
    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest level, or the value itself."""
        levels = torch.where(self._beyond(x, self.scale, self.zero_point, self.bits), x, super().quantize(x))
        return straight_through(x, levels)

    def storage(self) -> Storage:
        """Scale and zero point; outliers are of an image, and the code format tells their share."""
        return Storage(facts=super().storage().facts, plain=False)

    @torch.no_grad()
    def from_storage(self, bits: int, code_format: str, storage: Storage) -> None:
        """See :meth:`Quantizer.from_storage`."""
        self.share = _share_of(code_format)
        super().from_storage(bits, code_format, storage)

    def _beyond(self, x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
        top = (1 << bits) - 1
        return (x > (top - zero + 0.5) * step) | (x < (-zero - 0.5) * step)


@register_quantizer("rvq", activation=ActivationRVQ)
class WeightRVQ(WeightQuantizer):
    """Even steps a channel for most weights; the largest of the layer, by magnitude, keep full precision.

    Which these are is settled when the quantizer is fitted, and both kinds go on learning. The paper uses 3 and 4 bits
    with 1 % to 3 % of large values. An outlier takes four bytes for its value and two for its place, beside one count
    of 32 bits for every 65,536 weights, and its code; every size counts them.

    Args:
        channels: length of the channel axis.
        axis: channel axis of the weight.
        ranges: how steps of the others are chosen: ``mse``, ``minmax`` or ``percentile``.
        share: of weights at full precision, 0.005 to 0.05.
    """

    places: torch.Tensor
    values: torch.Tensor

    def __init__(self, channels: int, axis: int = 0, *, ranges: Ranges = "mse", share: float = 0.03) -> None:
        super().__init__(channels, axis, ranges=ranges)
        self.share = _checked(share)
        self.blocks = 0
        self.register_buffer(
            "places", torch.zeros(0, 2, dtype=torch.float32)
        )  # block, and place in it: exact in float32
        self.register_buffer("values", torch.zeros(0, dtype=torch.float32), persistent=False)  # as of the last codes

    @property
    def code(self) -> str:
        """Code format, which tells the share."""
        return SHARES[self.share]

    @property
    def even_steps(self) -> bool:
        """Not where the outliers are."""
        return False

    def code_formats(self, bits: int) -> tuple[str, ...]:
        """Codes on an even grid, with outliers beside them."""
        return (SHARES[self.share],)

    def shaped(self, shape: tuple[int, ...]) -> None:
        """See :meth:`WeightQuantizer.shaped`."""
        self._hold(torch.zeros(self._number(shape), dtype=torch.long))
        self.blocks = -(-math.prod(shape) // _BLOCK)

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """See :meth:`WeightQuantizer.check_fits`."""
        elements, places = math.prod(shape), self.outliers()
        outside = len(places) and int(places[-1]) >= elements
        if len(places) != self._number(shape) or self.blocks != -(-elements // _BLOCK) or outside:
            raise HawqError(f"its outliers are not those of {elements} weights")

    @torch.no_grad()
    def fit(self, weight: torch.Tensor, bits: int, code: str) -> float:
        """Outliers first, then steps for the others; see :meth:`WeightQuantizer.fit`."""
        check_finite(weight)
        flat = weight.detach().float().reshape(-1)
        self.shaped(tuple(weight.shape))
        self._hold(flat.abs().topk(len(self.places)).indices.sort().values)
        others = flat.index_fill(0, self.outliers(), 0.0).reshape(weight.shape)
        step, _ = weight_step(others, bits, "midrise" if bits <= 2 else "affine", self.axis, self.ranges)
        self.enable(bits, step, MIDRISE_ZERO if bits <= 2 else 0.0)
        return float((self.eval_weight(weight).double() - weight.double()).square().sum())

    def outliers(self) -> torch.Tensor:
        """Where the outliers are in the flat weight, ascending."""
        places = self.places.round().long()
        return places[:, 0] * _BLOCK + places[:, 1]

    @deterministic
    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Rounded to the grid, outliers as they are; the gradient passes to outliers and inside of the range."""
        return torch.where(self._mask(weight), weight, super().quantize(weight))

    @torch.no_grad()
    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes on the grid, 0 for outliers, whose values are noted; see :meth:`WeightQuantizer.codes`."""
        self.refresh()
        codes = super().codes(weight)
        self.values = weight.detach().float().reshape(-1)[self.outliers()]
        return codes.masked_fill(self._mask(weight), 0)

    @torch.no_grad()
    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """The float32 weight that ``codes`` and the outliers of the last :meth:`codes` stand for."""
        levels = super().dequantize(codes)
        return levels.reshape(-1).index_copy(0, self.outliers(), self.values).reshape(levels.shape)

    @torch.no_grad()
    def storage(self) -> Storage:
        """Scales; values of the outliers, their places in blocks of 65,536 weights, and how many each block has."""
        places = self.outliers().cpu()
        tensors = {
            "scale": self.scale.detach().float().cpu().reshape(-1),
            "values": self.values.detach().cpu().clone(),
            "places": (places % _BLOCK).to(torch.uint16),
            "blocks": torch.bincount(places // _BLOCK, minlength=self.blocks)[: self.blocks].to(torch.int32),
        }
        return Storage(tensors, plain=False)

    @torch.no_grad()
    def from_storage(self, bits: int, code_format: str, storage: Storage) -> None:
        """See :meth:`Quantizer.from_storage`."""
        storage.only("scale", "values", "places", "blocks")
        self.share = _share_of(code_format)
        scale = storage.tensor("scale", tuple(self.scale.shape))
        if not bool((scale > 0).all()):
            raise HawqError("scale is not positive")
        places, blocks = storage.tensors.get("places"), storage.tensors.get("blocks")
        if places is None or blocks is None or (places.dtype, blocks.dtype) != (torch.uint16, torch.int32):
            raise HawqError("places or blocks of outliers are missing, or of another type")
        values = storage.tensor("values", tuple(places.shape))
        if places.ndim != 1 or bool((blocks < 0).any()) or int(blocks.sum()) != len(places):
            raise HawqError("its blocks hold another number of outliers than there are")
        block = torch.repeat_interleave(torch.arange(len(blocks)), blocks.long())
        flat = block * _BLOCK + places.long()
        if bool((flat.diff() <= 0).any()):
            raise HawqError("places of outliers do not ascend")
        self._hold(flat)
        self.values, self.blocks = values.to(self.scale.device), len(blocks)
        self.enable(bits, scale, MIDRISE_ZERO if bits <= 2 else 0.0)

    def _number(self, shape: tuple[int, ...]) -> int:
        return CODE_FORMATS[self.code].kept(math.prod(shape))

    def _hold(self, places: torch.Tensor) -> None:
        pair = torch.stack([places // _BLOCK, places % _BLOCK], 1)
        self.places = pair.to(self.scale.device, torch.float32)
        self.values = torch.zeros(len(places), dtype=torch.float32, device=self.scale.device)

    def _mask(self, weight: torch.Tensor) -> torch.Tensor:
        # torch.jit.trace has no index_fill of truth values
        mask = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device).index_fill(
            0, self.outliers(), 1.0
        )
        return mask.reshape(weight.shape) > 0

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        held = state_dict.get(f"{prefix}places")
        if held is not None and held.shape != self.places.shape:
            self.places = torch.zeros_like(held, device=self.places.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if len(self.values) != len(self.places):
            self.values = torch.zeros(len(self.places), dtype=torch.float32, device=self.places.device)
