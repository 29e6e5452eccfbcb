"""``per_image.npz`` of a run folder: the validation result of every image, so that runs can be compared in pairs."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hawq_lightning._io import write_bytes

NAME = "per_image.npz"


def keep_per_image(folder: Path, stage: str, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Add a stage (``quantized``, ``fine_tuned``) to the file, atomically; what it held of that stage is replaced.

    Args:
        folder: of the run.
        stage: name.
        arrays: by name, such as ``correct`` ``[N]``; booleans are kept as bits.
    """
    path = folder / NAME
    stored: dict[str, NDArray[np.generic]] = {}
    if path.is_file():
        # a damaged file is replaced: the run that is going on matters more than what it held
        with (
            suppress(OSError, ValueError, zipfile.BadZipFile),
            path.open("rb") as raw,  # numpy leaves a damaged archive open
            np.load(raw, allow_pickle=False) as file,
        ):
            stored = {k: file[k] for k in file.files if not k.startswith(f"{stage}/")}
    for name, values in arrays.items():
        if values.dtype == np.bool_:
            stored[f"{stage}/{name}.bits"] = np.packbits(values.astype(np.bool_))
            stored[f"{stage}/{name}.shape"] = np.asarray(values.shape)
        else:
            stored[f"{stage}/{name}"] = values
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **stored)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())
