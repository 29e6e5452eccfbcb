"""One resumable sweep: method x setting x seed, each a run of ``hawq-lightning`` in a folder of its own.

    python recipes/compare/sweep.py recipes/compare/cifar10.yaml OUT DATA=/data WEIGHTS=/data/resnet20_cifar10.pt

A plan does not depend on the seed of fine-tuning, so each is made once (``OUT/plans``): the reference measures traces
and options, from which the other methods choose. Then the grid is tried on images held out of the training split
(``OUT/tuning``), the same small grid for every method; then the runs
(``OUT/runs/<setting>/<method>/seed=N``), ordered so that the table of a sweep cut short is a fair one. What is finished
is not repeated, and methods that chose the same bits share one run. The same command in a second terminal shares the
work. ``table.py`` writes the tables.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from design import ExperimentDesign
from jobs import carry_out, needs

from hawq_lightning import HawqError

WAIT = 5.0  # seconds between looks at what another process is doing


def work(design: ExperimentDesign, only: str = "", limit: int | None = None) -> bool:
    """Carry out all runs whose ``setting/method/seed=N`` matches ``only``; what fails is left out and told.

    Returns:
        whether all were carried out.
    """
    import hawq_lightning.cli  # noqa: F401  what every job needs is imported once

    locks, failed = design.out / "locks", set()
    wanted = [r for r in design.runs() if re.search(only, f"{r[0]}/{r[1]}/seed={r[2]}")][:limit]
    first: list[Any] = [None] if design.asked.get("baseline") else []
    left = [*first, *wanted]
    while left:
        busy = []
        for run in left:
            job = design.baseline() if run is None else design.run(*run)
            ended = "done"
            for needed in needs(job):
                ended = "failed" if needed.folder in failed else carry_out(needed, locks)
                if ended == "failed":
                    failed.add(needed.folder)
                if ended != "done":
                    break
            if ended == "done":
                job = design.baseline() if run is None else design.run(*run)  # now with the best point of its grid
                ended = carry_out(job, locks)
            if ended == "failed":
                failed.add(job.folder)
            if ended == "busy":
                busy.append(run)
        if busy and len(busy) == len(left):
            time.sleep(WAIT)
        left = busy
    return not failed


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("design", type=Path, help="a YAML file of this folder")
    parser.add_argument("out", type=Path, help="folder of the sweep")
    parser.add_argument("given", nargs="*", help="NAME=value of what the file leaves open")
    parser.add_argument("--also", nargs="*", default=[], help="overrides for every run, such as model.box_loss=l1")
    parser.add_argument("--only", default="", help="regular expression on setting/method/seed=N")
    parser.add_argument("--limit", type=int, default=None, help="the first so many runs")
    parser.add_argument("--list", action="store_true", help="show the runs and whether they are done")
    asked = parser.parse_args(arguments)
    try:
        design = ExperimentDesign(asked.design, asked.out, dict(g.split("=", 1) for g in asked.given), asked.also)
        if asked.list:
            for run in design.runs():
                print(f"{'done' if design.run(*run).done else 'open'}  {run[0]}/{run[1]}/seed={run[2]}")
            return
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        complete = work(design, asked.only, asked.limit)
    except HawqError as error:
        raise SystemExit(f"error: {error}") from None
    raise SystemExit(0 if complete else 1)


if __name__ == "__main__":
    main()
