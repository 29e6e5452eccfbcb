"""Deep Compression: a table of shared weights a layer, found by k-means and trained (Han et al., ICLR 2016)."""

from __future__ import annotations

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._torch_state import traced
from hawq_lightning.quantization._fake_quantize import with_zero_grads
from hawq_lightning.quantization._quantizers import WeightQuantizer
from hawq_lightning.quantization._ranges import HUGE, check_finite
from hawq_lightning.quantization._registry import register_quantizer
from hawq_lightning.quantization._storage import Storage
from hawq_lightning.quantization.methods._basis import decision_thresholds

_MOST_LEVELS = 256
_SWEEPS = 100
_NONE = -1.0  # a band that no magnitude lies in


@register_quantizer("kmeans")
class WeightKMeans(WeightQuantizer):
    """A table of 2^b shared weights a layer: k-means from linear starts, then trained by its members' gradients.

    Starts lie evenly between the least and the greatest weight (section 3.2), so that large weights keep a shared
    weight near. Then every weight belongs to one entry for good: the entry's gradient is the sum over its members
    (eq. 3), and the weights themselves have a gradient of zero. Weight decay alone moves them: keep them out of it in
    long training, or out of the optimizer. A sum over so many members wants a learning rate some tens of times
    smaller than that of weights.

    Args:
        channels: length of the channel axis.
        axis: channel axis of the weight.
        prune: share of the weights, by magnitude, that is zero and stays so (section 2); one entry is zero then.
    """

    thresholds: torch.Tensor
    band: torch.Tensor

    def __init__(self, channels: int, axis: int = 0, *, prune: float = 0.0) -> None:
        super().__init__(channels, axis)
        if isinstance(prune, bool) or not isinstance(prune, (int, float)) or not 0 <= prune < 1:
            raise HawqError(f"prune is {prune!r}; it is a share of the weights, 0 or more and less than 1.")
        self.prune = float(prune)
        self.centroids = nn.Parameter(torch.zeros(_MOST_LEVELS, dtype=torch.float32))
        self.register_buffer("thresholds", torch.full((_MOST_LEVELS - 1,), torch.inf, dtype=torch.float32))
        self.register_buffer("band", torch.tensor(_NONE, dtype=torch.float32))

    @property
    def code(self) -> str:
        """Code format."""
        return "table"

    def code_formats(self, bits: int) -> tuple[str, ...]:
        """Codes are numbers of entries."""
        return ("table",)

    @property
    def even_steps(self) -> bool:
        """Levels lie anywhere."""
        return False

    @torch.no_grad()
    def enable_table(self, bits: int, centroids: torch.Tensor, band: float = _NONE) -> None:
        """Switch on, in place.

        Args:
            bits: code width.
            centroids: ascending, up to 2^b of them, or one less beside a band.
            band: weights of at most this magnitude are zero, an entry of its own behind the centroids.

        Raises:
            HawqError: NaN or infinity.
        """
        if not bool(torch.isfinite(centroids).all()):
            raise HawqError("A table of levels must be finite.")
        self.enable(bits, torch.ones_like(self.scale))
        self.centroids.zero_()
        self.centroids[: len(centroids)] = centroids.to(self.centroids)
        self.thresholds.fill_(torch.inf)
        self.thresholds[: len(centroids) - 1] = _between(centroids.to(self.thresholds))
        self.band.fill_(band)

    @torch.no_grad()
    def fit(self, weight: torch.Tensor, bits: int, code: str) -> float:
        """Lloyd's iterations until no weight changes its entry; see :meth:`WeightQuantizer.fit`."""
        check_finite(weight)
        flat, band, entries = weight.detach().float().reshape(-1), _NONE, 1 << bits
        if self.prune and flat.numel():
            magnitudes = flat.abs()
            band = float(magnitudes.kthvalue(max(1, round(self.prune * flat.numel()))).values)
            flat, entries = flat[magnitudes > band], entries - 1
        self.enable_table(bits, _lloyd(flat.double().sort().values, entries).float(), band)
        return float((self._levels(weight).double() - weight.double()).square().sum())

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Every weight's entry; its gradient goes to the entry, and none to the weight."""
        levels = self._levels(weight)
        return levels if traced() else with_zero_grads(levels, weight)

    @torch.no_grad()
    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Numbers of entries in ascending order, less 2^(b-1); see :meth:`WeightQuantizer.codes`."""
        self.refresh()
        if self.bits == 0:
            raise HawqError("This quantizer is off; it has no codes.")
        order = self._entries().argsort(stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        members = self._members(weight)
        if self.prune:
            members = torch.where(self._pruned(weight), len(order) - 1, members)
        return (rank[members] - (1 << (self.bits - 1))).to(torch.int32)

    @torch.no_grad()
    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """The float32 weight that ``codes`` stand for, bit-identical to ``self(weight)``."""
        return self.table()[codes.long() + (1 << (self.bits - 1))]

    @torch.no_grad()
    def table(self) -> torch.Tensor:
        """The shared weights, ``[2^b]``, ascending."""
        return self._entries().sort().values

    @torch.no_grad()
    def storage(self) -> Storage:
        """The table, ``[2^b]``."""
        return Storage({"table": self.table().cpu().contiguous()}, plain=False)

    @torch.no_grad()
    def from_storage(self, bits: int, code_format: str, storage: Storage) -> None:
        """See :meth:`Quantizer.from_storage`."""
        storage.only("table")
        if code_format != "table":
            raise HawqError(f"code format {code_format!r} is none of quantizer {self.name!r}")
        table = storage.tensor("table", (1 << bits,))
        if bool((table[1:] < table[:-1]).any()):
            raise HawqError("table is not ascending")
        self.enable_table(bits, table)

    def _entries(self) -> torch.Tensor:
        return self._bounded().detach()[: 1 << self.bits]

    def _bounded(self) -> torch.Tensor:
        return self.centroids.clamp(-HUGE, HUGE)  # an optimizer may take them anywhere

    def _members(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self.thresholds, weight.detach().float().contiguous())

    def _pruned(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().float().abs() <= self.band

    def _levels(self, weight: torch.Tensor) -> torch.Tensor:
        members = self._members(weight)
        levels = self._bounded().index_select(0, members.reshape(-1)).reshape(members.shape)
        if self.prune:
            levels = torch.where(self._pruned(weight), 0.0, levels)
        return levels.to(weight.dtype)


def _between(ascending: torch.Tensor) -> torch.Tensor:
    """Decision thresholds; a value at one belongs below, so that none may be rounded up to the level above."""
    middle = decision_thresholds(ascending)
    return torch.where(middle < ascending[1:], middle, ascending[:-1])


def _lloyd(values: torch.Tensor, entries: int) -> torch.Tensor:
    """Centroids of k-means in one dimension, ascending; those without members stay where they were.

    Args:
        values: float64, ascending.
        entries: number of centroids.
    """
    if not len(values):
        return torch.zeros(entries, dtype=values.dtype, device=values.device)
    peak = values.abs().amax().clamp_min(1e-300)  # sums of large weights stay finite
    unit = values / peak
    sums = torch.cat([unit.new_zeros(1), unit.cumsum(0)])
    shares = torch.arange(entries, dtype=torch.float32, device=unit.device) / max(1, entries - 1)
    centroids = unit[0] + (unit[-1] - unit[0]) * shares.to(unit)
    ends = torch.tensor([0, len(unit)], device=unit.device)
    for _ in range(_SWEEPS):
        inside = torch.searchsorted(unit, decision_thresholds(centroids), right=True)
        bounds = torch.cat([ends[:1], inside, ends[1:]])
        counts = bounds.diff()
        means = (sums[bounds[1:]] - sums[bounds[:-1]]) / counts.clamp_min(1)
        moved = torch.where(counts > 0, means, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids.cummax(0).values * peak
