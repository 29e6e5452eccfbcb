"""``per_image.npz`` of a run folder: what validation found on every image, so that runs can be compared in pairs."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_bytes

NAME = "per_image.npz"


def keep_per_image(folder: Path, stage: str, found: Mapping[str, NDArray[Any]]) -> None:
    """Add a stage (``quantized``, ``fine_tuned``) to the file, atomically; what it held of that stage is replaced.

    Args:
        folder: of the run.
        stage: name.
        found: arrays by name, such as ``correct`` ``[N]``; booleans are kept as bits.
    """
    try:
        kept = _read(folder / NAME)
    except HawqError:
        kept = {}
    kept = {k: v for k, v in kept.items() if not k.startswith(f"{stage}/")}
    for name, values in found.items():
        if values.dtype == bool:
            kept[f"{stage}/{name}.bits"] = np.packbits(values)
            kept[f"{stage}/{name}.shape"] = np.asarray(values.shape)
        else:
            kept[f"{stage}/{name}"] = values
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **kept)  # type: ignore[arg-type]
    write_bytes(folder / NAME, buffer.getvalue())


def read_per_image(folder: str | Path, stage: str) -> dict[str, NDArray[Any]]:
    """The arrays of a stage; empty where the run kept none.

    Raises:
        HawqError: the file is damaged.
    """
    kept = _read(Path(folder) / NAME)
    out: dict[str, NDArray[Any]] = {}
    for key, values in kept.items():
        name = key.removeprefix(f"{stage}/")
        if name == key or name.endswith(".shape"):
            continue
        if name.endswith(".bits"):
            shape = kept[f"{stage}/{name.removesuffix('.bits')}.shape"]
            count = int(np.prod(shape))
            out[name.removesuffix(".bits")] = np.unpackbits(values, count=count).astype(bool).reshape(shape)
        else:
            out[name] = values
    return out


def _read(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise HawqError(f"{path} is damaged: {error}.") from error
