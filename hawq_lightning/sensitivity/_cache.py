"""Measurements that many runs share: one file each, named by a hash of what was measured, locked while it is made."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from hawq_lightning._errors import HawqError
from hawq_lightning._site_table import SiteTable
from hawq_lightning.sensitivity._result import VERSION, Sensitivity

_POLL = 0.2  # seconds


class TraceCache:
    """A folder of measurements. A process that finds none holds the lock until :meth:`store` or :meth:`release`.

    Args:
        folder: made when first needed; may lie on a file system that several machines share.
        sites: what is measured; the same weights and data with other sites excluded are another measurement.
        tell: called with a sentence before waiting for another process.
    """

    def __init__(self, folder: str | Path, sites: SiteTable, tell: Callable[[str], Any] = lambda text: None) -> None:
        self.folder = Path(folder).expanduser() / f"traces-{VERSION}"
        self._sites = {s.name: s.numel for s in sites}
        self._tell = tell
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
        known = self._read(fingerprint)
        if known is not None:
            return known
        self.release()
        path = self.path(fingerprint)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self._tell("another run measures the same traces; this one waits for them.")
                lock.acquire(poll_interval=_POLL)
        except OSError as error:
            raise HawqError(
                f"The cache of traces at {self.folder} cannot be used ({error.strerror or error}); choose another "
                "folder (paths.cache=/path)."
            ) from error
        self._lock = lock
        known = self._read(fingerprint)  # it may have come while this process waited
        if known is not None:
            self.release()
        return known

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
        try:
            known = Sensitivity.load(path)
        except HawqError:
            return None  # damaged: measured again, and overwritten
        same = {r.name: r.numel for r in known} == self._sites
        return known if same and known.fingerprint == fingerprint else None
