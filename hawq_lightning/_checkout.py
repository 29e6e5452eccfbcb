"""The configuration of a checkout: ``conf/`` stands beside the package there and inside of it in a wheel."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_NAME = "hawq_lightning.conf"


def find_conf(package: Path = _PACKAGE) -> None:
    """Make ``hawq_lightning.conf`` a package, from the folder beside ours, where ours has none.

    An editable install that maps folders would do the same by an import hook, which type checkers cannot see.

    Args:
        package: the folder of ``hawq_lightning``.
    """
    file = package.parent / "conf" / "__init__.py"
    if (package / "conf").exists() or not file.is_file() or _NAME in sys.modules:
        return
    spec = spec_from_file_location(_NAME, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None and spec.loader is not None, f"{file} is no module"
    module = module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
