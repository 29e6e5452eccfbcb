"""Whose files a run folder holds: a manifest of what runs made, a lock, and results that outlast a failed new run.

Runs touch names of :func:`result_names` only, and of those only what a run of this program made. Results that are to be
replaced are set aside, and come back when the new run ends before it has anything to put in their place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hawq_lightning._errors import HawqError, some
from hawq_lightning._io import write_text
from hawq_lightning._types import JsonObject
from hawq_lightning.cli._records import MANIFEST_FORMAT, read_manifest, read_record, sealed_text
from hawq_lightning.export import EXPORTERS

MANIFEST = ".hawq_lightning.json"
LOCK = ".hawq_lightning.lock"
ASIDE = ".hawq_lightning.old"
UNFINISHED = "unfinished.json"
TRACES = "sensitivity.json"
HYDRA = tuple(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides"))
_DRAWN = ("outlook", "bits", "traces", "frontier", "loss_check", "training", "convergence_images",
          "convergence_steps_weight", "convergence_steps_activation", "eigenvalues", "landscape")  # fmt: skip
_BY_PHASE = ("checkpoints/{}/last.ckpt", "logs/{}/metrics.csv", "logs/{}/hparams.yaml")
RESULTS = (
    UNFINISHED, TRACES, "metrics.json", "plan.json", "frontier.csv", "forecast.json", "loss_check.csv",
    "per_image.npz", "export.json", "report.html", "README.md",
    *(f"figures/{name}.{end}" for name in _DRAWN for end in ("png", "csv")),
    *(name.format(phase) for name in _BY_PHASE for phase in ("float", "fine_tuning")),
)  # fmt: skip
_AFTER_THE_END = ("README.md", "report.html", "export.json")  # no run makes them before its metrics.json
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# a killed process's data workers keep its lock until they see that it has gone, which torch looks for every 5 seconds
_PATIENCE = 8.0


def result_names() -> tuple[str, ...]:
    """Names of all files that a run may write, the files of exporters that are known now among them."""
    return (*RESULTS, *(f"model{EXPORTERS[name].suffix}" for name in EXPORTERS))


def _exported(name: str) -> bool:
    return name.startswith("model.") and name != "model.safetensors"


class RunFolder:
    """The manifest of a folder. Every method reads it from the disk, so that processes of one run agree.

    Args:
        folder: of the run; it need not exist.
        names: of the files that runs write into it.
    """

    def __init__(self, folder: Path, names: Iterable[str] | None = None) -> None:
        self.folder, self.names = folder, result_names() if names is None else tuple(names)

    @property
    def settings(self) -> str | None:
        """Hash of the settings of the run that the folder belongs to; ``None``: of no run."""
        return self._manifest().get("settings")

    @property
    def committed(self) -> bool:
        """Whether that run has got to something that is worth keeping."""
        return bool(self._manifest().get("committed"))

    def present(self) -> list[str]:
        """Those of the names that are there."""
        return sorted(n for n in self.names if os.path.lexists(self.folder / n))

    def strangers(self) -> list[str]:
        """Those of them that no run made."""
        manifest, present = self._manifest(), self.present()
        made = manifest.get("files")
        if made is not None:
            return [n for n in present if n not in made and not (n == UNFINISHED and self._goes_on(manifest))]
        if "settings" not in manifest:
            return present
        ended = (self.folder / "metrics.json").exists()
        return [] if ended else [n for n in present if n in _AFTER_THE_END or _exported(n)]

    def changed(self) -> list[str]:
        """Pages that somebody wrote over since the run did."""
        pages = self._manifest().get("pages", {})
        return sorted(n for n, digest in pages.items() if self._digest(n) not in (None, digest))

    def refuse_strangers(self) -> None:
        """Raise HawqError rather than write over what no run made."""
        if strangers := self.strangers():
            raise HawqError(
                f"{self.folder} holds {some(strangers)}, which no run of hawq-lightning made: "
                "move it, or choose another folder (hydra.run.dir=/path)."
            )

    def note_files(self) -> None:
        """Write down what there is now: what comes later, or is changed later, is not the run's."""
        manifest, changed = self._manifest(), self.changed()
        made = manifest.get("files")
        if made is None and "settings" in manifest:
            made = RunFolder(self.folder, (*result_names(), *HYDRA)).present()
        manifest["files"] = sorted({*self.present(), *(n for n in made or () if (self.folder / n).exists())})
        if "README.md" in manifest["files"] and "README.md" not in changed:
            manifest["pages"] = {"README.md": self._digest("README.md")}
        self._write(manifest)

    def note_card(self) -> None:
        """The program itself wrote README.md again."""
        self._write(self._manifest() | {"pages": {"README.md": self._digest("README.md")}})

    def begin(self, settings: str, stays: Iterable[str] = ()) -> None:
        """Set the results aside that the run with these settings replaces.

        Args:
            settings: their hash.
            stays: names that the new run reads, which are copied.
        """
        old = self.folder / ASIDE
        names = [n for n in self.present() if n not in self.strangers()]
        before = self._manifest() if (self.folder / MANIFEST).is_file() or names else None
        self._write({"settings": settings, "committed": False, "before": before})
        keep = {TRACES, *stays}  # traces are looked at by their fingerprint
        for name in names:
            target = old / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copy2 if name in keep else os.replace)(self.folder / name, target)

    def commit(self) -> None:
        """The new run has something to show: what was set aside goes."""
        manifest = self._manifest()
        if not manifest.get("committed"):
            manifest.pop("before", None)
            self._write(manifest | {"committed": True})
            shutil.rmtree(self.folder / ASIDE, ignore_errors=True)

    def put_back(self) -> None:
        """Undo :meth:`begin`, unless the run has been committed."""
        manifest, old = self._manifest(), self.folder / ASIDE
        if "settings" not in manifest or manifest.get("committed") or "before" not in manifest:
            return
        for name in self.present():
            if name != TRACES or (old / name).exists():
                (self.folder / name).unlink()
        for path in sorted(p for p in old.rglob("*") if p.is_file()):
            target = self.folder / path.relative_to(old)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        shutil.rmtree(old, ignore_errors=True)
        for name in ("checkpoints/float", "checkpoints/fine_tuning", "checkpoints", "figures", ".hydra"):
            with suppress(OSError):  # there are files in it
                (self.folder / name).rmdir()
        if manifest["before"] is not None:
            self._write(manifest["before"])
        elif self.present():  # traces: the next run takes them if they are its own
            self._write({"settings": manifest["settings"], "committed": False, "files": self.present()})
        else:
            (self.folder / MANIFEST).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else is at the folder meanwhile; a process that dies gives the lock back.

        Raises:
            HawqError: somebody is, or the folder cannot be written to.
        """
        lock = FileLock(self.folder / LOCK)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_PATIENCE, poll_interval=0.1)
        except Timeout:
            raise HawqError(
                f"Another run is at work in {self.folder}: wait for its end, or choose another folder "
                "(hydra.run.dir=/path)."
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS_HERE:
                raise HawqError(f"Cannot write {self.folder}: {error.strerror or error}.") from error
            warnings.warn(
                f"HAWQ: the file system of {self.folder} has no locks: nothing keeps two runs apart.", stacklevel=2
            )
        try:
            yield
        finally:
            lock.release()

    def _goes_on(self, manifest: JsonObject) -> bool:
        """Whether the folder's run, which had ended, went on (its packed file was lost) and was killed in that."""
        with suppress(HawqError):
            return read_record(self.folder / UNFINISHED).get("settings") == manifest.get("settings")
        return False

    def _manifest(self) -> JsonObject:
        path = self.folder / MANIFEST
        if path.is_file():
            return read_manifest(path, result_names())
        for name in (UNFINISHED, "metrics.json"):  # of a release that wrote no manifest
            with suppress(HawqError):
                if settings := read_record(self.folder / name).get("settings"):
                    return {"settings": settings, "committed": True}
        return {}

    def _write(self, manifest: JsonObject) -> None:
        write_text(self.folder / MANIFEST, sealed_text(manifest | {"format": MANIFEST_FORMAT}))

    def _digest(self, name: str) -> str | None:
        path = self.folder / name
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
