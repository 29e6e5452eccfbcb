"""``hawq-lightning-collect``: one table and one picture of all runs of a sweep."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from hawq_lightning._errors import HawqError
from hawq_lightning.cli._entry import explain, stop
from hawq_lightning.cli._run_folder import MANIFEST, RunFolder

_WHAT = """Reads every run folder below a sweep's folder and writes sweep.html, sweep.md, sweep.csv and
figures/accuracy_size.png there. Unfinished and unreadable runs are listed with the reason."""
_WRITTEN = ("sweep.html", "sweep.md", "sweep.csv", "figures/accuracy_size.png", "figures/accuracy_size.csv")
_KIND = "Sweep of mixed-precision quantization"  # in every sweep.html


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    parser = argparse.ArgumentParser("hawq-lightning-collect", description=_WHAT)
    parser.add_argument("folder", type=Path, help="of the sweep, such as runs/digits_resnet20/sweep")
    parser.add_argument("--out", type=Path, default=None, help="folder to write to; the sweep's own by default")
    options = parser.parse_args(arguments)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from hawq_lightning.report import collect, mean_table, sweep_facts

    place = RunFolder(options.out or options.folder, _WRITTEN)
    try:
        if not _of_an_earlier_release(place.folder):
            place.refuse_strangers()
        # a run's manifest may be beside the tables; a folder that is not there is not made
        with place.locked() if options.folder.is_dir() else nullcontext():
            sweep = collect(options.folder, options.out)
            place.note_files()
    except (HawqError, OSError) as error:
        stop(explain(error) or error)
    columns, rows = mean_table(sweep)
    table = Table(title=sweep_facts(sweep))
    # what is the same in every row only takes width
    places = [i for i, c in enumerate(columns) if c not in ("name", "metric") or len({r[i] for r in rows}) > 1]
    for i in places:
        table.add_column(escape(columns[i]))
    for row in rows:
        table.add_row(*(escape(row[i]) for i in places))
    Console().print(table)
    for name, reason in sweep.left_out.items():
        print(f"left out: {name}: {reason}")
    print(f"written: {(options.out or options.folder) / 'sweep.html'}, sweep.md, sweep.csv, figures/accuracy_size.png")


def _of_an_earlier_release(folder: Path) -> bool:
    """Whether an earlier release, which noted no names, wrote a sweep's page there."""
    page = folder / "sweep.html"
    return not (folder / MANIFEST).is_file() and page.is_file() and _KIND in page.read_text("utf-8", "replace")


if __name__ == "__main__":
    main()
