"""Earlier traces of the same weights, data and settings: from the run's own folder, or from a cache that runs share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from hawq_lightning._errors import HawqError
from hawq_lightning._site_table import SiteTable
from hawq_lightning.sensitivity import Sensitivity, TraceCache, read_intact


class SharedTraces:
    """What ``measure`` asks before it measures; the first process looks, the others get its answer.

    Args:
        trainer: whose processes measure together.
        folder: of the run.
        cache: shared by runs; ``None``: only the run's own folder is looked at.
        table: the sites.
        images: to measure on, for the line that says that measuring begins.
    """

    def __init__(self, trainer: Trainer, folder: Path, cache: str | Path | None, table: SiteTable, images: int) -> None:
        self._trainer, self._folder, self._images = trainer, folder, images
        self._sites = {s.name: s.numel for s in table}
        self.cache = None if cache is None else TraceCache(cache, table, lambda text: rank_zero_info(f"HAWQ: {text}"))
        self._asked = False

    def find(self, fingerprint: str) -> Sensitivity | None:
        """An earlier measurement, the same answer on every process."""
        if self._asked:  # a process that ran out of memory asks again, which the others do not know
            return None
        self._asked = True
        earlier, usable = None, True
        if self._trainer.is_global_zero:
            try:
                earlier = self._look(fingerprint)
            except HawqError as refused:  # a home that cannot be written to is no reason to stop
                usable = False
                rank_zero_warn(f"HAWQ: {refused}")
        if self._trainer.world_size > 1:
            data = None if earlier is None else earlier.to_dict()
            data, usable = self._trainer.strategy.broadcast((data, usable))
            earlier = None if data is None else Sensitivity.from_dict(data)
        if not usable:
            self.cache = None
        if earlier is None:
            rank_zero_info(
                f"HAWQ: measures the Hessian traces of {len(self._sites)} weights and activations on {self._images} "
                "images, which can take minutes; then bits are chosen."
            )
        return earlier

    def partial(self, fingerprint: str) -> Path:
        """Where unfinished rows are saved."""
        return self._folder / "sensitivity.partial" if self.cache is None else self.cache.partial(fingerprint)

    def forget_partial(self, fingerprint: str) -> None:
        """The result is saved: unfinished rows of it are of no more use."""
        path, rank = self.partial(fingerprint), self._trainer.global_rank
        with suppress(OSError):
            Path(f"{path}.{rank}" if rank else path).unlink(missing_ok=True)

    def store(self, measured: Sensitivity) -> None:
        """Keep a new measurement for other runs."""
        if self.cache is not None and self._trainer.is_global_zero:
            try:
                self.cache.store(measured)
            except (HawqError, OSError) as error:  # a full disk there is no reason to stop
                rank_zero_warn(f"HAWQ: the traces could not be saved for other runs: {error}")

    def _look(self, fingerprint: str) -> Sensitivity | None:
        path = self._folder / "sensitivity.json"
        if path.is_file():
            earlier = read_intact(path)
            if earlier and earlier.fingerprint == fingerprint and {r.name: r.numel for r in earlier} == self._sites:
                return earlier
        if self.cache is None:
            return None
        earlier = self.cache.find(fingerprint)
        if earlier is not None:
            rank_zero_info(f"HAWQ: the traces were measured before, by another run: {self.cache.path(fingerprint)}")
        return earlier


@contextmanager
def shared_traces(
    trainer: Trainer, folder: Path, cache: str | Path | None, table: SiteTable, images: int
) -> Iterator[SharedTraces]:
    """A :class:`SharedTraces` whose lock is given back whatever happens."""
    shared = SharedTraces(trainer, folder, cache, table, images)
    try:
        yield shared
    finally:
        if shared.cache is not None:
            shared.cache.release()
