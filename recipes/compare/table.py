"""Tables and figure of a sweep, also of one that is not complete: ``python recipes/compare/table.py OUT [TARGET]``.

With ``--keep`` also ``runs.tar.xz``: what the tables are made of. Unpacked into a folder, it gives the same tables, and
``sweep.py`` goes on from there.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

from comparison_page import write_comparison

from hawq_lightning import HawqError

KEPT = ("job.json", "metrics.json", "plan.json", "per_image.npz")


def keep(out: Path, path: Path) -> None:
    """Pack the results of all jobs below ``out``, without this machine's folders."""
    with tarfile.open(path, "w:xz") as archive:
        for file in sorted(f for f in out.rglob("*") if f.name in KEPT):
            data = file.read_bytes()
            if file.name in ("job.json", "metrics.json"):
                record = json.loads(data)
                record.pop("command", None)
                data = json.dumps(record, indent=1).replace(str(out.resolve()), "${OUT}").encode()
            entry = tarfile.TarInfo(file.relative_to(out).as_posix())
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the sweep")
    parser.add_argument("target", type=Path, nargs="?", help="folder to write to; that of the sweep by default")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap samples")
    parser.add_argument("--title", default="Methods at equal size", help="heading of the page")
    parser.add_argument("--keep", action="store_true", help="write runs.tar.xz as well")
    arguments = parser.parse_args()
    target = arguments.target or arguments.out
    try:
        write_comparison(arguments.out, target, arguments.draws, arguments.title)
    except HawqError as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.keep:
        keep(arguments.out, target / "runs.tar.xz")
    print((target / "compare.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
