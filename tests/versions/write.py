"""``python -m tests.versions.write newest.txt``: the versions of what pyproject.toml names, as they are installed."""

from __future__ import annotations

import platform
import re
import sys
import tomllib
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXTRAS = ("vision", "detection", "export", "dev")


def requirements() -> list[str]:
    """Lines of the dependencies and of the extras that the tests use, each once."""
    project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for x in EXTRAS for line in project["optional-dependencies"][x])]
    return list(dict.fromkeys(lines))


def name_of(requirement: str) -> str:
    """The distribution that a requirement is for."""
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]


def lines() -> list[str]:
    """One ``name==version`` a distribution that is installed here."""
    out = []
    for name in dict.fromkeys(map(name_of, requirements())):
        try:
            out.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            print(f"not installed: {name}", file=sys.stderr)
    return out


if __name__ == "__main__":
    head = f"# What pip offered on {date.today()} for Python {platform.python_version()}; written by make test-newest."
    (HERE / sys.argv[1]).write_text("\n".join([head, *lines()]) + "\n")
