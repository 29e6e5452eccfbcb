"""What a YAML file of this folder asks for, as jobs: plans, the grid of tuning, runs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jobs import Job, quoted

from hawq_lightning import HawqError, nearest

SCORES = ("accuracy", "map")


class ExperimentDesign:
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

    def untrained(self, setting: str, method: str, seed: int) -> Job | None:
        """Scores of a plan before any training, and with BatchNorm measured again; None where the file asks for none.

        They depend on the plan alone, so a run need not measure them: one job for all seeds unless bits are drawn.
        """
        images = self.asked.get("batchnorm")
        if not images:
            return None
        plan = self.plan(setting, method, seed)
        folder = self.out / "untrained" / plan.folder.relative_to(self.out / "plans")
        given = f"hawq.plan={quoted(plan.file)}"
        overrides = (*self.common, *self._overrides(setting, method), *self.asked["baseline"], given)
        return self._job(folder, overrides, (plan,), {}, plan.file, batchnorm=int(images))

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
        untrained = self.untrained(setting, method, seed)
        first = (plan, *([] if untrained is None else [untrained]), *(job for _, job in grid))
        return self._job(folder, overrides, first, facts, plan.file)

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


def best_point(grid: Sequence[tuple[dict[str, Any], Job]]) -> dict[str, Any] | None:
    """The point with the best score; None as long as one is missing or where there is no grid."""
    scored = []
    for point, job in grid:
        if not job.done:
            return None
        record = json.loads((job.folder / "metrics.json").read_text(encoding="utf-8"))
        metric = next(m for m in SCORES if m in record)
        scored.append((record[metric]["fine_tuned"], point))
    return max(scored, key=lambda s: s[0])[1] if scored else None
