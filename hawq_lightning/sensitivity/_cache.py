"""What a measurement belongs to, and measurements that many runs share.

These are files named by a hash of what was measured, locked while they are made.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from filelock import BaseFileLock, FileLock, Timeout
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import Batch
from hawq_lightning.layers import quantizers_by_attribute
from hawq_lightning.sensitivity._batch_hash import hash_batch, hash_values
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._first_loss import check_first_loss
from hawq_lightning.sensitivity._loss_signature import loss_signature
from hawq_lightning.sensitivity._on_device import OnDevice
from hawq_lightning.sensitivity._result import VERSION, Sensitivity

_POLL = 0.2  # seconds


class TraceCache:
    """A folder of measurements. A process that finds none holds the lock until :meth:`store` or :meth:`release`.

    Args:
        folder: made when first needed; may lie on a file system that several machines share.
        sites: what is measured; the same weights and data with other sites excluded are another measurement.
        report: called with a sentence before waiting for another process.
    """

    def __init__(
        self, folder: str | Path, sites: SiteTable, report: Callable[[str], object] = lambda text: None
    ) -> None:
        self.folder = Path(folder).expanduser() / f"traces-{VERSION}"
        self._sites = {s.name: s.numel for s in sites}
        self._report = report
        self._lock: BaseFileLock | None = None

    def path(self, fingerprint: str) -> Path:
        """Where the measurement with this fingerprint is or will be."""
        text = fingerprint + "".join(f"\n{name} {numel}" for name, numel in self._sites.items())
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.json"

    def partial(self, fingerprint: str) -> Path:
        """Where an unfinished measurement is kept."""
        return self.path(fingerprint).with_suffix(".partial")

    def find(self, fingerprint: str) -> Sensitivity | None:
        """An earlier measurement; ``None`` leaves the lock with the caller, who is to measure.

        Raises:
            HawqError: the folder cannot be written to.
        """
        measured = self._read(fingerprint)
        if measured is not None:
            return measured
        self.release()
        path = self.path(fingerprint)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self._report("another run measures the same traces; this one waits for them.")
                lock.acquire(poll_interval=_POLL)
        except OSError as error:
            raise HawqError(
                f"The cache of traces at {self.folder} cannot be used ({error.strerror or error}); choose another "
                "folder (paths.cache=/path)."
            ) from error
        self._lock = lock
        measured = self._read(fingerprint)  # it may have come while this process waited
        if measured is not None:
            self.release()
        return measured

    def store(self, measured: Sensitivity) -> None:
        """Keep a measurement for the others, and let them in."""
        try:
            if self._lock is not None:
                measured.save(self.path(measured.fingerprint))
        finally:
            self.release()

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _read(self, fingerprint: str) -> Sensitivity | None:
        path = self.path(fingerprint)
        if not path.is_file() or not os.access(path, os.R_OK):
            return None
        measured = read_intact(path)
        if measured is None:
            return None
        same = {r.name: r.numel for r in measured} == self._sites
        return measured if same and measured.fingerprint == fingerprint else None


def read_intact(path: Path) -> Sensitivity | None:
    """An earlier measurement; ``None``, with a warning, if its file is not as it was written: then it is made anew."""
    try:
        measured, changed = Sensitivity.read(path)
    except HawqError as error:
        warnings.warn(f"{error} The traces are measured anew.", stacklevel=2)
        return None
    if changed:
        warnings.warn(
            f"The sensitivity file at {path} was changed after it was written: the traces are measured anew.",
            stacklevel=2,
        )
    return None if changed else measured


def fingerprint(
    context: MeasureContext, batches: OnDevice, samples: Sequence[int], first: Batch, settings: str, seed: int
) -> str:
    """Hash of weights, batches, what the loss does, and settings: what a measurement belongs to.

    The loss itself goes into the diagnostics, as ``loss``.

    Args:
        context: model, loss and sites.
        batches: all of them.
        samples: number of samples of each.
        first: a batch that memory holds, for the value of the loss.
        settings: whatever else the traces depend on.
        seed: of all random draws.
    """
    digest = hashlib.sha256(f"{settings} {seed} {list(samples)}".encode())
    idle = tuple(_idle_quantizers(context.model))
    for name, value in context.model.state_dict().items():
        if name.startswith(idle):
            continue
        digest.update(name.encode())
        if not isinstance(value, torch.Tensor):  # of get_extra_state, which may return anything
            hash_batch(value, digest)
            continue
        hash_values(value, digest)
    for batch in batches.kept:
        hash_batch(batch, digest)
    with torch.enable_grad():
        loss = check_first_loss(context, first)
    context.diagnostics.figures["loss"] = loss
    digest.update(loss_signature(context, first, batches, seed).encode())
    return f"sha256:{digest.hexdigest()}"


def _idle_quantizers(model: nn.Module) -> Iterator[str]:
    # a fake-quant layer whose quantizers are off has the traces of the float layer, whichever quantizers it holds
    for name, layer in model.named_modules():
        for key, quantizer in quantizers_by_attribute(layer).items():
            if not quantizer.bits or quantizer.fake_quant_disabled:
                yield f"{name}.{key}." if name else f"{key}."
