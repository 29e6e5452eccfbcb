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
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from hawq_lightning import Plan, select
from hawq_lightning.errors import HawqError, nearest
from hawq_lightning.selection import problem_of

_WAIT = 5.0  # seconds between looks at what another process is doing
_SCORES = ("accuracy", "map")


@dataclass(frozen=True)
class Job:
    """One call of the program.

    Attributes:
        folder: of the run.
        overrides: of the configuration.
        after: jobs whose results it needs.
        facts: setting, method, seed..., kept beside the results for the tables.
        plan: file of the plan that is fine-tuned, if any.
        chooses_from: instead of a run, a choice from the options that this plan lists.
        eigenvalues_of: the plan that lists eigenvalues, for such a choice.
        names: ``${NAME}`` of folders and files in the overrides, so that results are known again elsewhere.
    """

    folder: Path
    overrides: tuple[str, ...]
    after: tuple[Job, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    plan: Path | None = None
    chooses_from: Path | None = None
    eigenvalues_of: Path | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def told(self) -> list[str]:
        """The overrides without this machine's folders."""
        told = list(self.overrides)
        for name, value in self.names.items():
            whole = re.compile(rf"(?<=[='\"]){re.escape(value)}(?=$|[/'\"])")
            told = [whole.sub(lambda _, n=name: f"${{{n}}}", text) for text in told]
        return told

    @property
    def file(self) -> Path:
        """The plan in its folder."""
        return self.folder / "plan.json"

    @property
    def done(self) -> bool:
        """Its results are there, and are those of these overrides."""
        if not (self.folder / "metrics.json").is_file():
            return False
        try:
            known = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return known.get("overrides") == self.told

    def same_as(self) -> str:
        """A hash that jobs share if they fine-tune the same bits in the same way, whoever chose them; ``""``: none."""
        if self.plan is None or not self.plan.is_file():
            return ""
        plan = Plan.load(self.plan)
        chosen = [[s.name, s.bits, s.code, s.scale, s.zero_point] for s in plan.sites]
        how = [o for o in self.told if not o.startswith(("selector=", "selector.", "hawq.plan="))]
        text = json.dumps([plan.quantizer, dict(plan.quantizer_options), chosen, how], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Design:
    """What a YAML file of this folder asks for, with its jobs.

    Args:
        path: of the file.
        out: folder of the sweep.
        given: values of the ``${NAME}`` in it.
        also: overrides for every run.

    Raises:
        HawqError: a name in the file that is not given, a method or setting that does not exist.
    """

    def __init__(self, path: str | Path, out: str | Path, given: Mapping[str, str], also: Sequence[str] = ()) -> None:
        text = Path(path).read_text(encoding="utf-8")
        for name in sorted(set(re.findall(r"\$\{([A-Z_]+)\}", text))):
            if name not in given:
                raise HawqError(f"{path} needs {name}=...; add it to the command.{nearest(name, given)}")
            text = text.replace(f"${{{name}}}", given[name])
        self.asked: dict[str, Any] = yaml.safe_load(text)
        self.out = Path(out).resolve()
        self.names = {"OUT": str(self.out), **given}
        self.common = [*self.asked["common"], *also, f"paths.cache={quoted(self.out / 'cache')}"]
        for setting in self.asked["settings"].values():
            for method in setting["methods"]:
                if method not in self.asked["methods"]:
                    raise HawqError(f"{path} describes no method {method!r}.{nearest(method, self.asked['methods'])}")

    def baseline(self) -> Job:
        """The score of the float network."""
        setting, method = next(iter(self.asked["settings"])), self.asked["reference"]
        plan = self.plan(setting, method, self.asked["seeds"][0])  # any will do: nothing need be measured again
        given = f"hawq.plan={quoted(plan.file)}"
        overrides = (*self.common, *self._overrides(setting, method), *self.asked["baseline"], given)
        return self._job(self.out / "float", overrides, (plan,), {"method": "float"})

    def plan(self, setting: str, method: str, seed: int) -> Job:
        """Traces and bits; once for all seeds unless the method draws its bits.

        The reference measures, and so does a method in the settings that it ``measures``; the others choose from what
        the reference has measured there, or in the setting named by ``options_of``.
        """
        own = self.asked["methods"][method].get("draws", False)
        folder = self.out / "plans" / setting / method / (f"seed={seed}" if own else "")
        seeds = [f"seed={seed}"] if own else []
        overrides = (*self.common, *self._overrides(setting, method), *self.asked["plan"], *seeds)
        reference, measures = self.asked["reference"], self.asked["methods"][method].get("measures", ())
        options_of = self.asked["settings"][setting].get("options_of", setting)
        if setting in measures or (method == reference and options_of == setting):
            return self._job(folder, overrides)
        base = self.plan(options_of, reference, seed)
        values = [self.plan(measures[0], method, seed)] if measures else []
        eigen = values[0].file if values else None
        return self._job(folder, overrides, (base, *values), chooses_from=base.file, eigenvalues_of=eigen)

    def tuning(self, method: str) -> list[tuple[dict[str, Any], Job]]:
        """The grid's points with their jobs; empty without tuning."""
        asked = self.asked.get("tuning")
        if not asked:
            return []
        method = self.asked["methods"][method].get("tuned_as", method)
        plan = self.plan(asked["setting"], method, self.asked["seeds"][0])
        found = []
        for values in itertools.product(*asked["grid"].values()):
            point = dict(zip(asked["grid"], values))
            name = ",".join(f"{k}={v}" for k, v in point.items())
            overrides = (
                *self._training(asked["setting"], method, plan), *asked["overrides"],
                *(f"{k}={v}" for k, v in point.items()), f"seed={self.asked['seeds'][0]}",
            )  # fmt: skip
            found.append((point, self._job(self.out / "tuning" / method / name, overrides, (plan,), {}, plan.file)))
        return found

    def run(self, setting: str, method: str, seed: int) -> Job:
        """Fine-tuning with the best point of the grid; before that is known, the job waits for the grid."""
        plan, grid = self.plan(setting, method, seed), self.tuning(method)
        best = best_point(grid)
        facts = {
            "setting": setting, "method": method, "seed": seed, "tuned": best,
            "labels": {"setting": self.asked["settings"][setting].get("label", setting),
                       "method": self.asked["methods"][method].get("label", method)},
            "reference": method == self.asked["reference"],
        }  # fmt: skip
        overrides = (
            *self._training(setting, method, plan), *(f"{k}={v}" for k, v in (best or {}).items()), f"seed={seed}",
        )  # fmt: skip
        folder = self.out / "runs" / setting / method / f"seed={seed}"
        return self._job(folder, overrides, (plan, *(job for _, job in grid)), facts, plan.file)

    def runs(self) -> Iterator[tuple[str, str, int]]:
        """Setting, method and seed of every run, in the order in which they are wanted."""
        for seed in self.asked["seeds"]:
            for setting, asked in self.asked["settings"].items():
                for method in asked["methods"]:
                    yield setting, method, seed

    def _job(self, folder: Path, overrides: Sequence[str], *more: Any, **named: Any) -> Job:
        return Job(folder, tuple(overrides), *more, **named, names=self.names)

    def _overrides(self, setting: str, method: str) -> list[str]:
        asked = self.asked["settings"][setting]
        own = asked.get("only", {}).get(method, [])
        return [*asked["overrides"], *self.asked["methods"][method]["overrides"], *own]

    def _training(self, setting: str, method: str, plan: Job) -> list[str]:
        given = f"hawq.plan={quoted(plan.file)}"
        return [*self.common, *self._overrides(setting, method), *self.asked["train"], given]


def quoted(path: Path) -> str:
    """A path as a value in Hydra's grammar, to which ``=`` and commas mean something."""
    text = str(path)
    return f"'{text}'" if "'" not in text else f'"{text}"'


def best_point(grid: Sequence[tuple[dict[str, Any], Job]]) -> dict[str, Any] | None:
    """The point with the best score; None as long as one is missing or where there is no grid."""
    scored = []
    for point, job in grid:
        if not job.done:
            return None
        record = json.loads((job.folder / "metrics.json").read_text(encoding="utf-8"))
        metric = next(m for m in _SCORES if m in record)
        scored.append((record[metric]["fine_tuned"], point))
    return max(scored, key=lambda s: s[0])[1] if scored else None


@contextmanager
def claimed(job: Job, locks: Path) -> Iterator[bool]:
    """Whether this process may run the job or its like; the system takes the lock back from a process that dies."""
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / (job.same_as() or re.sub(r"[^\w.=,-]+", "_", str(job.folder))[-200:])).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def carry_out(job: Job, locks: Path) -> str:
    """``done``, ``busy`` (another process has it) or ``failed``."""
    with claimed(job, locks) as mine:
        if job.done:
            return "done"
        if not mine:
            return "busy"
        job.folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        text = json.dumps({**job.facts, "overrides": job.told}, indent=1)
        (job.folder / "metrics.json").unlink(missing_ok=True)
        (job.folder / "job.json").write_text(text, encoding="utf-8")
        alike = locks.parent / "alike" / (job.same_as() or "none")
        code = 0 if borrow(job, alike) else call(job)
        ended = "done" if code == 0 and job.done else "failed"
        if ended == "done" and job.plan is not None and not alike.is_file():
            _made(alike.parent)
            alike.write_text(str(job.folder.relative_to(locks.parent)), encoding="utf-8")
        print(f"{time.strftime('%H:%M:%S')} {ended} in {time.perf_counter() - start:.0f} s: {job.folder}", flush=True)
        if ended == "failed":
            print("  " + (job.folder / "log.txt").read_text(encoding="utf-8").strip().rpartition("\n")[2], flush=True)
        return ended


def borrow(job: Job, alike: Path) -> bool:
    """Take over what the run that ``alike`` names has found; the plan stays the job's own."""
    if job.plan is None or not alike.is_file():
        return False
    other = alike.parent.parent / alike.read_text(encoding="utf-8")
    if other == job.folder or not (other / "metrics.json").is_file():
        return False
    shutil.copyfile(job.plan, job.file)
    for name in ("per_image.npz", "model.safetensors", "metrics.json"):  # the last says that the job is done
        if (other / name).is_file():
            shutil.copyfile(other / name, job.folder / name)
    (job.folder / "log.txt").write_text(f"the same bits as {other}\n", encoding="utf-8")
    return True


def call(job: Job) -> int:
    """Carry out a job in a copy of this process, which has its imports already; the exit code."""
    child = os.fork()
    if child == 0:
        with (job.folder / "log.txt").open("w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            code = 1
            try:
                (choose if job.chooses_from else run)(job)
                code = 0
            except HawqError as error:
                print(f"error: {error}", flush=True)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(job: Job) -> None:
    """As ``hawq-lightning`` with the job's overrides, in its folder."""
    from hawq_lightning.cli.entry import quiet_down
    from hawq_lightning.cli.run import run as carry_out_configuration

    quiet_down()
    cfg = composed([*job.overrides, f"paths.output_dir={quoted(job.folder)}"])
    OmegaConf.save(cfg, _made(job.folder / ".hydra") / "config.yaml")
    OmegaConf.save(OmegaConf.create(list(job.overrides)), job.folder / ".hydra" / "overrides.yaml")
    carry_out_configuration(cfg)


def choose(job: Job) -> None:
    """Choose from the options that another plan lists."""
    assert job.chooses_from is not None
    cfg = composed(job.overrides)
    budget = cfg.selector.budget
    budget = budget if isinstance(budget, str) else OmegaConf.to_container(budget)
    known = Plan.load(job.eigenvalues_of).settings.get("eigenvalues") if job.eigenvalues_of else None
    base = Plan.load(job.chooses_from)
    plan = select(problem_of(base), budget, cfg.selector.name, seed=cfg.seed, eigenvalues=known)
    plan.replace(quantizer=base.quantizer, quantizer_options=base.quantizer_options).save(job.file)
    (job.folder / "metrics.json").write_text(json.dumps({"chosen_from": str(job.chooses_from)}), encoding="utf-8")


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration of ``hawq-lightning`` with these overrides."""
    with initialize_config_module("hawq_lightning.conf", version_base="1.3"):
        return compose("train", list(overrides))


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def needs(job: Job) -> Iterator[Job]:
    """What a job needs, and what that needs, first things first."""
    for one in job.after:
        yield from needs(one)
        yield one


def work(design: Design, only: str = "", limit: int | None = None) -> bool:
    """Carry out all runs whose ``setting/method/seed=N`` matches ``only``; what fails is left out and told.

    Returns:
        whether all were carried out.
    """
    import hawq_lightning.cli.run  # noqa: F401  what every job needs is imported once

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
            time.sleep(_WAIT)
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
        design = Design(asked.design, asked.out, dict(g.split("=", 1) for g in asked.given), asked.also)
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
