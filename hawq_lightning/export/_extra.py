"""The packages that only the extra ``export`` installs."""

from __future__ import annotations

import importlib
from typing import Any

from hawq_lightning._errors import HawqError


def require(name: str) -> Any:
    """Import a package of the extra.

    Raises:
        HawqError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise HawqError(
            f"This needs {name.partition('.')[0]} ({error}): pip install 'hawq-lightning[export]'."
        ) from error
