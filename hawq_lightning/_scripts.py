"""The console scripts: each imports its program when it is started, so that a package that is missing is one line."""

from __future__ import annotations

import sys
from importlib import import_module

from hawq_lightning._errors import HawqError


def train() -> None:
    """``hawq-lightning``."""
    _run("train_main")


def analyze() -> None:
    """``hawq-lightning-analyze``."""
    _run("analyze_main")


def export() -> None:
    """``hawq-lightning-export``."""
    _run("export_main")


def collect() -> None:
    """``hawq-lightning-collect``."""
    _run("collect_main")


def _run(name: str) -> None:
    try:
        program = getattr(import_module("hawq_lightning.cli"), name)
    except HawqError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:  # any other failed import is a fault that a user should report whole
        sys.exit(f"error: {error}, which the console scripts need: pip install --upgrade hawq-lightning.")
    program()
