"""A run folder that a run comes back to: a finished run is not repeated, an unfinished one goes on."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_text
from hawq_lightning._types import JsonObject
from hawq_lightning.cli._records import read_record, sealed_text
from hawq_lightning.cli._run_folder import UNFINISHED, RunFolder
from hawq_lightning.export import read_packed

_SAME = ("paths", "resume", "overwrite", "report", "phase")  # what changes no result


def settings_hash(cfg: DictConfig) -> str:
    """Hash of everything in a configuration that a result depends on; where folders are does not matter."""
    copy: Any = cfg.copy()
    OmegaConf.set_struct(copy, False)
    copy.phase = ""
    for key in copy.paths:
        copy.paths[key] = ""
    try:
        plain: Any = OmegaConf.to_container(copy, resolve=True)
    except OmegaConfBaseException:  # an environment variable that nothing else needs, for example
        plain = OmegaConf.to_container(copy, resolve=False)
    relevant = {k: v for k, v in plain.items() if k not in _SAME}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:32]


class RunState:
    """What a run folder knows of an earlier run with the same settings.

    Args:
        folder: of the run.
        settings: their hash.
    """

    def __init__(self, folder: RunFolder, settings: str) -> None:
        self.folder, self.settings = folder, settings

    def check(self, overwrite: bool) -> None:
        """Refuse a folder that holds what this run would destroy. Nothing is written.

        Args:
            overwrite: results of other settings may go.

        Raises:
            HawqError: files that no run made, or the results of a run with other settings.
        """
        self.folder.refuse_strangers()
        other = self.folder.settings
        if other not in (None, self.settings) and self.folder.committed and not overwrite:
            there = "a finished" if "metrics.json" in self.folder.present() else "an unfinished"
            raise HawqError(
                f"{self.folder.folder} holds {there} run with other settings: choose another folder "
                "(hydra.run.dir=/path), or replace its results (overwrite=true)."
            )

    def finished(self) -> JsonObject | None:
        """The record of a run that came to its end, and whose network can be read.

        Raises:
            HawqError: the record is damaged.
        """
        record = self._read("metrics.json")
        return record if record is not None and self.damage() is None else None

    def damage(self) -> str | None:
        """Why the packed file cannot be read."""
        try:
            read_packed(self.folder.folder / "model.safetensors")
        except HawqError as error:
            return str(error)
        return None

    def unfinished(self) -> JsonObject | None:
        """The record of a run that was cut short, as far as it came; also of one whose packed file got lost since.

        Raises:
            HawqError: the record, or the last checkpoint, is damaged.
        """
        record = self._read(UNFINISHED)
        if record is None and self.checkpoint("fine_tuning") is not None:
            record = self._read("metrics.json")
        return record if self.folder.committed else None

    def checkpoint(self, phase: str) -> Path | None:
        """The last checkpoint of ``float`` or ``fine_tuning``.

        Raises:
            HawqError: it is cut short.
        """
        path = self.folder.folder / "checkpoints" / phase / "last.ckpt"
        if not path.is_file():
            return None
        check_checkpoint(path)
        return path

    def begin(self, stays: Iterable[str] = ()) -> None:
        """Set aside what an earlier run left in this folder."""
        if changed := self.folder.changed():
            raise HawqError(
                f"Somebody changed {', '.join(changed)} in {self.folder.folder} since the run wrote it: move it, or "
                "choose another folder (hydra.run.dir=/path)."
            )
        self.folder.begin(self.settings, stays)

    def commit(self) -> None:
        """There are new results: the old ones go."""
        self.folder.commit()

    def keep(self, record: JsonObject) -> None:
        """Write down how far the run is."""
        write_text(self.folder.folder / UNFINISHED, sealed_text(record | {"settings": self.settings}))

    def done(self) -> None:
        """The run has come to its end."""
        (self.folder.folder / UNFINISHED).unlink(missing_ok=True)

    def _read(self, name: str) -> JsonObject | None:
        path = self.folder.folder / name
        if not path.is_file():
            return None
        record = read_record(path)
        return record if record.get("settings") == self.settings else None


def check_checkpoint(path: str | Path) -> None:
    """Raise HawqError if a checkpoint file is cut short: torch writes an archive whose index comes last."""
    if "://" in str(path) or not Path(path).is_file():
        return
    if not zipfile.is_zipfile(path):
        raise HawqError(
            f"The checkpoint {path} is cut short or damaged ({Path(path).stat().st_size} bytes): remove it, or repeat "
            "the run (resume=false)."
        )
