"""The one door past the faces: modules into which tests inject faults (a full disk, a lost signal, a changed constant).

What a test *checks* comes from a package's face; only what it breaks on purpose is reached by this.
"""

from importlib import import_module
from types import ModuleType


def internal(name: str) -> ModuleType:
    """The module ``hawq_lightning.<name>``, to patch."""
    return import_module(f"hawq_lightning.{name}")
