"""A run folder that a run comes back to: a finished run is not repeated, an unfinished one goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hawq_lightning._errors import HawqError
from hawq_lightning._io import read_json, write_text
from hawq_lightning._types import JsonObject
from hawq_lightning.export import EXPORTERS

UNFINISHED = "unfinished.json"
_RESULTS = (UNFINISHED, "metrics.json", "plan.json", "frontier.csv", "loss_check.csv",
            "per_image.npz", "export.json", "figures/landscape.csv",
            "checkpoints/float/last.ckpt", "checkpoints/fine_tuning/last.ckpt")  # fmt: skip
_SAME = ("paths", "resume", "report", "phase")  # what changes no result


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

    def __init__(self, folder: Path, settings: str) -> None:
        self.folder, self.settings = folder, settings

    def finished(self) -> JsonObject | None:
        """The record of a run that came to its end."""
        record = self._read("metrics.json")
        return record if record is not None and (self.folder / "model.safetensors").is_file() else None

    def unfinished(self) -> JsonObject | None:
        """The record of a run that was cut short, as far as it came."""
        return self._read(UNFINISHED)

    def checkpoint(self, phase: str) -> Path | None:
        """The last checkpoint of ``float`` or ``fine_tuning``."""
        path = self.folder / "checkpoints" / phase / "last.ckpt"
        return path if path.is_file() else None

    def keep(self, record: JsonObject) -> None:
        """Write down how far the run is."""
        write_text(self.folder / UNFINISHED, json.dumps(record | {"settings": self.settings}))

    def done(self) -> None:
        """The run has come to its end."""
        (self.folder / UNFINISHED).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what a run with other settings left in this folder."""
        for name in (*_RESULTS, *(f"model{EXPORTERS[e].suffix}" for e in EXPORTERS)):
            (self.folder / name).unlink(missing_ok=True)

    def _read(self, name: str) -> JsonObject | None:
        try:
            record = read_json(self.folder / name, "record")
        except (HawqError, OSError):
            return None
        return record if isinstance(record, dict) and record.get("settings") == self.settings else None
