"""Reads ``per_image.npz`` of a run folder, which ``hawq-lightning`` writes: the validation result of every image."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_lightning import HawqError

NAME = "per_image.npz"


def read_per_image(folder: str | Path, stage: str) -> dict[str, NDArray[Any]]:
    """The arrays of a stage (``quantized``, ``fine_tuned``) by name; empty where the run kept none.

    Raises:
        HawqError: the file is damaged.
    """
    stored = _read(Path(folder) / NAME)
    out: dict[str, NDArray[Any]] = {}
    for key, values in stored.items():
        name = key.removeprefix(f"{stage}/")
        if name == key or name.endswith(".shape"):
            continue
        if name.endswith(".bits"):
            shape = stored[f"{stage}/{name.removesuffix('.bits')}.shape"]
            count = int(np.prod(shape))
            out[name.removesuffix(".bits")] = np.unpackbits(values, count=count).astype(bool).reshape(shape)
        else:
            out[name] = values
    return out


def _read(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # numpy leaves a damaged archive open
            return {k: file[k] for k in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise HawqError(f"{path} is damaged: {error}.") from error
