"""Tables and figure of a sweep, also of one that is not complete: ``python recipes/compare/table.py OUT [TARGET]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from hawq_lightning.errors import HawqError
from hawq_lightning.report.compare_page import write_comparison


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the sweep")
    parser.add_argument("target", type=Path, nargs="?", help="folder to write to; that of the sweep by default")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap samples")
    parser.add_argument("--title", default="Methods at equal size", help="heading of the page")
    asked = parser.parse_args()
    try:
        write_comparison(asked.out, asked.target, asked.draws, asked.title)
    except HawqError as error:
        raise SystemExit(f"error: {error}") from None
    print(((asked.target or asked.out) / "compare.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
