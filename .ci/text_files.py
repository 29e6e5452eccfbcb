"""Trailing spaces and missing last newlines are mended, conflict marks named; exits 1 if there was anything.

Usage: ``python .ci/text_files.py FILE ...``
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CONFLICT = re.compile(r"^(<{7}|>{7}|={7})( |$)", re.M)


def mended(text: str) -> str:
    """``text`` without spaces at the ends of lines, with one newline at its end."""
    lines = [line.rstrip() for line in text.split("\n")]
    return "\n".join(lines).rstrip("\n") + "\n" if text.strip() else ""


def main(paths: list[str]) -> int:
    """The exit status."""
    status = 0
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        if CONFLICT.search(text):
            print(f"{path}: a conflict is not resolved")
            status = 1
        elif mended(text) != text:
            path.write_text(mended(text), encoding="utf-8")
            print(f"{path}: mended")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
