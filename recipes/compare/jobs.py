"""A job of a sweep: one call of ``hawq-lightning``, a choice from options that another job has measured, or scores.

What is finished is not repeated; jobs that fine-tune the same bits in the same way share one run; a lock keeps two
processes from doing the same work.
"""

from __future__ import annotations

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

from hydra import compose, initialize_config_module
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from hawq_lightning import HawqError, Plan, select
from hawq_lightning.selection import problem_of


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
        batchnorm: instead of a run, the plan's scores without training, also with BatchNorm measured again on so many
            training images; 0: a run.
        names: ``${NAME}`` of folders and files in the overrides, so that results are known again elsewhere.
    """

    folder: Path
    overrides: tuple[str, ...]
    after: tuple[Job, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    plan: Path | None = None
    chooses_from: Path | None = None
    eigenvalues_of: Path | None = None
    batchnorm: int = 0
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
        return bool(known.get("overrides") == self.told and known.get("batchnorm", 0) == self.batchnorm)

    def same_as(self) -> str:
        """A hash that jobs share if they fine-tune the same bits in the same way, whoever chose them; ``""``: none."""
        if self.plan is None or not self.plan.is_file():
            return ""
        plan = Plan.load(self.plan)
        chosen = [[s.name, s.bits, s.code, s.scale, s.zero_point] for s in plan.sites]
        how = [o for o in self.told if not o.startswith(("select=", "select.", "hawq.plan="))]
        how += [f"batchnorm={self.batchnorm}"] if self.batchnorm else []
        text = json.dumps([plan.quantizer, dict(plan.quantizer_options), chosen, how], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def needs(job: Job) -> Iterator[Job]:
    """What a job needs, and what that needs, first things first."""
    for one in job.after:
        yield from needs(one)
        yield one


def carry_out(job: Job, locks: Path) -> str:
    """``done``, ``busy`` (another process has it) or ``failed``."""
    with claimed(job, locks) as mine:
        if job.done:
            return "done"
        if not mine:
            return "busy"
        job.folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        more = {"batchnorm": job.batchnorm} if job.batchnorm else {}
        text = json.dumps({**job.facts, **more, "overrides": job.told}, indent=1)
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
                start(job)
                code = 0
            except HawqError as error:
                print(f"error: {error}", flush=True)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start(job: Job) -> None:
    """Whichever of the three a job is."""
    if job.chooses_from:
        choose(job)
    elif job.batchnorm:
        score_untrained(job)
    else:
        run(job)


def run(job: Job) -> None:
    """As ``hawq-lightning`` with the job's overrides, in its folder."""
    from hawq_lightning.cli import quiet_down
    from hawq_lightning.cli import run as carry_out_configuration

    quiet_down()
    cfg = composed([*job.overrides, f"paths.output_dir={quoted(job.folder)}", "overwrite=true"])
    OmegaConf.save(cfg, _made(job.folder / ".hydra") / "config.yaml")
    OmegaConf.save(OmegaConf.create(list(job.overrides)), job.folder / ".hydra" / "overrides.yaml")
    carry_out_configuration(cfg)


def choose(job: Job) -> None:
    """Choose from the options that another plan lists."""
    assert job.chooses_from is not None
    cfg = composed(job.overrides)
    budget = cfg.select.budget
    budget = budget if isinstance(budget, str) else OmegaConf.to_container(budget)
    known = Plan.load(job.eigenvalues_of).settings.get("eigenvalues") if job.eigenvalues_of else None
    base = Plan.load(job.chooses_from)
    plan = select(problem_of(base), budget, cfg.select.selector, seed=cfg.seed, eigenvalues=known)
    plan.replace(quantizer=base.quantizer, quantizer_options=base.quantizer_options).save(job.file)
    (job.folder / "metrics.json").write_text(json.dumps({"chosen_from": str(job.chooses_from)}), encoding="utf-8")


def score_untrained(job: Job) -> None:
    """The plan's scores right after quantizing and with BatchNorm's statistics measured again; nothing learned."""
    from hawq_lightning import quantize
    from hawq_lightning.cli import keep_per_image, make_data, make_task, make_trainer, quiet_down
    from hawq_lightning.quantization.post_training import reestimate_batchnorm

    assert job.plan is not None
    quiet_down()
    cfg = composed([*job.overrides, f"paths.output_dir={quoted(job.folder)}"])
    if "augment" in cfg.data:
        cfg.data.augment = "none"
    seed_everything(cfg.seed, verbose=False)
    data = make_data(cfg)
    net = quantize(make_task(cfg), Plan.load(job.plan))
    trainer = make_trainer(cfg, "fine_tuning", [], net)
    found: dict[str, dict[str, float]] = {}
    for stage in ("quantized", "batchnorm"):
        if stage == "batchnorm":
            batches = data.train_dataloader()
            reestimate_batchnorm(net, itertools.islice(batches, max(1, job.batchnorm // batches.batch_size)))
        (logged,) = trainer.validate(net, datamodule=data, verbose=False)
        for key, name in (("val/acc", "accuracy"), ("val/map", "map"), ("val/loss", "loss")):
            if key in logged:
                found.setdefault(name, {})[stage] = float(logged[key])
        keep_per_image(job.folder, stage, {k: v.numpy() for k, v in getattr(net, "per_image", {}).items()})
    shutil.copyfile(job.plan, job.file)
    (job.folder / "metrics.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration of ``hawq-lightning`` with these overrides."""
    with initialize_config_module("hawq_lightning.conf", version_base="1.3"):
        return compose("train", list(overrides))


def quoted(path: Path) -> str:
    """A path as a value in Hydra's grammar, to which ``=`` and commas mean something."""
    text = str(path)
    return f"'{text}'" if "'" not in text else f'"{text}"'


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
