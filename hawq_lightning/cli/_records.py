"""What a run writes down of itself, read back: metrics.json, unfinished.json, and the manifest of its folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from hawq_lightning._errors import HawqError
from hawq_lightning._fields import (
    CHECKSUM,
    check_names,
    number,
    sealed,
    sequence,
    shown,
    table,
    text,
    was_changed,
    whole,
)
from hawq_lightning._io import RECORD_JSON, json_text, read_json, with_infinity, without_infinity
from hawq_lightning._types import JsonObject

MANIFEST_FORMAT = "hawq_lightning.run_folder"
SCORES = {
    "val/acc": "accuracy",
    "val/acc_top5": "accuracy_top5",
    "val/map": "map",
    "val/map_50": "map_50",
    "val/loss": "loss",
}
"""Lightning's name of a score -> that in metrics.json."""
MONITOR = "monitor"
"""Where metrics.json has the score that the setting ``monitor`` names, with its name."""


def sealed_text(record: JsonObject) -> str:
    """A record as the text of its file, with a checksum of what it says."""
    return json_text(sealed(without_infinity({k: v for k, v in record.items() if k != CHECKSUM})), indent=1)


def read_record(path: Path) -> JsonObject:
    """The record of a run: every field that a run goes on from is checked, what else is in it is handed through.

    Raises:
        HawqError: no such file, no record, or changed since the run wrote it; the message names file and field.
    """
    record: JsonObject = with_infinity(_intact(path, "record of the run", _check_record), ("costs", "bops"))
    return record


def read_manifest(path: Path, names: Collection[str]) -> JsonObject:
    """The manifest of a run folder.

    Args:
        path: of the file.
        names: of files that runs write: those of the manifest are looked at and set aside.

    Raises:
        HawqError: no manifest, or changed since a run wrote it; the message names file and field.
    """
    return _intact(path, "manifest of the run folder", lambda data: _check_manifest(data, names))


def _intact(path: Path, what: str, check: Callable[[JsonObject], None]) -> JsonObject:
    data: JsonObject = read_json(path, what, RECORD_JSON)
    try:
        check(table(data, "it"))
        if was_changed(data):
            raise HawqError("it was changed after it was written")
    except HawqError as error:
        raise HawqError(
            f"The {what} at {path} is damaged: {str(error).rstrip('.')}. Move it away, or choose another folder."
        ) from error
    return data


def _check_record(data: JsonObject) -> None:
    for name in ("settings", "name", "seed", "sizes", "seconds", "history"):
        if name not in data:
            raise HawqError(f"it has no field {name!r}")
    text(data["settings"], "settings")
    for key in ("sizes", "seconds"):
        for name, value in table(data[key], key).items():
            number(value, f"{key} of {shown(name)}", low=0.0)
    for position, row in enumerate(sequence(data["history"], "history")):
        what = f"row {position} of history"
        values = table(row, what)
        whole(values.get("epoch"), f"epoch of {what}")
        _check_numbers(values, what)
    for score in SCORES.values():
        _check_numbers(table(data.get(score, {}), score), score)
    monitored = table(data.get(MONITOR, {}), MONITOR)
    if monitored:
        text(monitored.get("name"), f"name of {MONITOR}")
    _check_numbers({k: v for k, v in monitored.items() if k != "name"}, MONITOR)


def _check_numbers(values: JsonObject, what: str) -> None:
    for name, value in values.items():
        if name != "phase":
            number(value, f"{shown(name)} of {what}")


def _check_manifest(data: JsonObject, names: Collection[str]) -> None:
    if data.get("format") != MANIFEST_FORMAT:
        raise HawqError(f"format is {shown(data.get('format'))}, not {MANIFEST_FORMAT!r}")
    check_names(data, "it", ("format",), (CHECKSUM, "settings", "committed", "before", "files", "pages"))
    if "settings" in data:
        text(data["settings"], "settings")
    if type(data.get("committed", False)) is not bool:
        raise HawqError(f"committed is {shown(data['committed'])}, neither true nor false")
    for name in sequence(data.get("files", []), "files"):
        text(name, "a name of files")
    for name, digest in table(data.get("pages", {}), "pages").items():
        text(digest, f"pages of {shown(name)}")
        if name not in names:  # it would be opened
            raise HawqError(f"pages has {shown(name)}, which no run writes")
    if data.get("before") is not None:
        _check_manifest({"format": MANIFEST_FORMAT, **table(data["before"], "before")}, names)
