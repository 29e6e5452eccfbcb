"""States in which a run folder can be, each made of copies of a finished run: what ``run_folders`` tries commands on.

Every file that begins with ``mine`` is somebody else's.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.app.test_run_folder import OTHER, cut_short, fill, impatient, locked_up

ASIDE, MANIFEST, LOCK = (f".hawq_lightning.{name}" for name in ("old", "json", "lock"))
FOLDER, SWEEP = "thefolder", "thesweep"
# in every folder of every state, where a run has folders of its own
PLANTED = ("notes.txt", "figures/mine.png", ".hydra/mine.yaml", "checkpoints/mine.txt",
           "checkpoints/fine_tuning/mine.txt", "logs/mine.csv", "mine/model.safetensors")  # fmt: skip


@dataclass(frozen=True)
class State:
    """A state of a run folder.

    Attributes:
        make: makes it of the folder to be and a finished run.
        codes: exit codes that are known, script -> code; the other scripts may succeed or refuse.
        more: settings of a run beside the fast ones.
        others: its files were made by the other of ``hawq-lightning`` and ``hawq-lightning-analyze``.
        replaces: a run may change the files that are there: it goes on, or repairs, or was told to.
        before: called in the process first, to break something in it alone.
        locked: somebody is at work in the folder.
        twice: the command is started twice at once.
    """

    make: Callable[[Path, Path], object]
    codes: Mapping[str, int] = field(default_factory=dict)
    more: Sequence[str] = ()
    others: bool = False
    replaces: bool = False
    before: Callable[[], object] = impatient
    locked: bool = False
    twice: bool = False


def mine(*names: str) -> Callable[[Path], None]:
    """Somebody's own files."""

    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_text(f"mine: {name}")

    return make


def lost(*names: str) -> Callable[[Path], None]:
    """Files that are gone."""

    def make(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return make


def cut(name: str, keep: float = 0.6) -> Callable[[Path], None]:
    """A file that ends early; nothing of it is there where ``keep`` is 0."""

    def make(folder: Path) -> None:
        if (folder / name).exists():  # what only looks at a network keeps no checkpoint
            raw = (folder / name).read_bytes()
            (folder / name).write_bytes(raw[: int(keep * len(raw))])

    return make


def all_empty(folder: Path) -> None:
    """As after a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def a_folder(name: str) -> Callable[[Path], None]:
    """A folder of somebody's where a run has a file."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        mine(f"{name}/mine.txt")(folder)

    return make


def a_link(name: str) -> Callable[[Path], None]:
    """A result that is a link to somebody's file elsewhere."""

    def make(folder: Path) -> None:
        mine("elsewhere")(folder.parent)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return make


def measuring(folder: Path) -> None:
    """Killed before it had traces."""
    cut_short(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    lost("sensitivity.json", "plan.json", "frontier.csv")(folder)


def going_on_killed(folder: Path) -> None:
    """A finished run lost its packed file, went on from its checkpoint, and was killed in that."""
    shutil.copy(folder / "metrics.json", folder / "unfinished.json")
    lost("model.safetensors")(folder)


def replacing(folder: Path) -> None:
    """``overwrite=true`` was killed before its first result."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        (folder / ASIDE / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(folder / ASIDE / name)
    record = json.loads((folder / ASIDE / "metrics.json").read_text()) | {"settings": "0" * 32}
    (folder / "unfinished.json").write_text(json.dumps({k: v for k, v in record.items() if k != "sha256"}))
    before = {k: v for k, v in manifest.items() if k != "sha256"}
    new = {"settings": "0" * 32, "committed": False, "before": before, "format": manifest["format"]}
    (folder / MANIFEST).write_text(json.dumps(new))


def finished(*changes: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    """A copy of the finished run, changed."""

    def make(folder: Path, run: Path) -> None:
        shutil.copytree(run, folder)
        for change in changes:
            change(folder)

    return make


def empty(*changes: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    """A folder without a run."""

    def make(folder: Path, run: Path) -> None:
        folder.mkdir()
        for change in changes:
            change(folder)

    return make


def small_files(most: int = 6000) -> None:
    """No file can be longer, as on a disk that fills up: for every writer, C's too."""
    impatient()
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def is_a_file(folder: Path, run: Path) -> None:
    mine(folder.name)(folder.parent)


def is_a_link(folder: Path, run: Path) -> None:
    shutil.copytree(run, folder.parent.parent / "behind")
    folder.symlink_to(folder.parent.parent / "behind")


def leads_nowhere(folder: Path, run: Path) -> None:
    folder.symlink_to(folder.parent.parent / "nowhere" / "deep")


def runs(code: int, **more: int) -> dict[str, int]:
    return {"train": code, "analyze": code, **more}


EVERY = runs(1, export=1, collect=1, inside=1)
NO_RUN = {"export": 1, "collect": 1, "inside": 1}
READS = {"export": 0, "collect": 0, "inside": 0}
FULL = partial(fill, f"{FOLDER}/unfinished", f"{FOLDER}/sens", f"{FOLDER}/model", f"{FOLDER}/export", "sweep.")
REPLACE = (OTHER, "overwrite=true")

STATES = {
    "no folder": State(lambda folder, run: None, runs(0, **NO_RUN), ("report=true",), replaces=True),
    "an empty folder": State(empty(), runs(0, **NO_RUN), replaces=True),
    "finished": State(finished(), runs(0, **READS)),
    "finished, no report": State(finished(lost("report.html", "README.md")), runs(0, **READS), ("report=true",)),
    "finished, other settings": State(finished(), runs(1, **READS), (OTHER,)),
    "finished, replaced": State(finished(), runs(0), REPLACE, replaces=True),
    "finished, repeated": State(finished(), runs(0), ("resume=false",), replaces=True),
    "finished, replaced by a refused budget": State(finished(), runs(1), ("select.budget=90x", "overwrite=true")),
    "finished, replaced by missing weights": State(
        finished(), runs(1), ("model.weights=/nowhere.pt", "overwrite=true")
    ),
    "finished, by an earlier release": State(finished(lost(MANIFEST)), runs(0, **READS)),
    "finished, by an earlier release, other settings": State(finished(lost(MANIFEST)), runs(1), (OTHER,)),
    "finished by the other script": State(finished(), runs(1, **READS), others=True),
    "unfinished": State(finished(cut_short), runs(0, **NO_RUN), ("report=true",), replaces=True),
    "unfinished, measuring": State(finished(measuring), runs(0, **NO_RUN), replaces=True),
    "unfinished, other settings": State(finished(cut_short), runs(1, **NO_RUN), (OTHER,)),
    "unfinished, replaced": State(finished(cut_short), runs(0), REPLACE, replaces=True),
    "unfinished, by an earlier release": State(finished(cut_short, lost(MANIFEST)), runs(0), replaces=True),
    "unfinished, somebody's page": State(finished(cut_short, mine("README.md")), runs(1, **NO_RUN)),
    "unfinished, somebody's export": State(finished(cut_short, mine("export.json")), runs(1, **NO_RUN), REPLACE),
    "went on and was killed": State(finished(going_on_killed), runs(0, export=1), replaces=True),
    "replacing, killed": State(finished(replacing), runs(1), (OTHER,), replaces=True),
    "replacing, killed, somebody's page": State(
        finished(replacing, mine("README.md")), runs(1), (OTHER,), replaces=True
    ),
    "somebody's page": State(empty(mine("README.md")), EVERY, ("overwrite=true",)),
    "somebody's packed file": State(empty(mine("model.safetensors")), EVERY, ("overwrite=true",)),
    "somebody's settings": State(empty(mine(".hydra/config.yaml")), EVERY),
    "somebody's sweep": State(finished(mine("sweep.csv", "../sweep.html")), runs(0, export=0, collect=1, inside=1)),
    "finished, somebody's export": State(finished(mine("export.json", "model.onnx")), {"export": 1}, REPLACE),
    "finished, its page changed": State(finished(mine("README.md")), runs(1, **READS), REPLACE),
    "at work": State(finished(), runs(1, export=1, collect=0, inside=1), locked=True),
    "at work, nothing there yet": State(empty(), EVERY, locked=True),
    "a killed process's lock": State(finished(lambda folder: (folder / LOCK).touch()), runs(0, **READS)),
    "two at once, new": State(empty(), NO_RUN, twice=True, replaces=True),
    "two at once, finished": State(finished(), {"collect": 0}, twice=True),
    "two at once, unfinished": State(finished(cut_short), NO_RUN, twice=True, replaces=True),
    "read-only": State(finished(), runs(1, export=1, inside=1), REPLACE, before=partial(locked_up, FOLDER)),
    "read-only, empty": State(empty(), EVERY, before=partial(locked_up, FOLDER)),
    "full": State(finished(), EVERY, (*REPLACE, "float_epochs=0"), before=FULL),
    "full for long files": State(finished(), {"export": 1, "collect": 1, "inside": 1}, before=small_files),
    "full for long files, new": State(empty(), EVERY, replaces=True, before=small_files),
    "cut: packed file": State(finished(cut("model.safetensors")), runs(0, export=1), replaces=True),
    "cut: plan": State(finished(cut("plan.json")), {"export": 1}),
    "cut: manifest": State(finished(cut(MANIFEST)), runs(1, export=1, collect=0, inside=1)),
    "cut: record": State(finished(cut("metrics.json")), runs(1, **(READS | {"collect": 1, "inside": 1}))),
    "cut: record of an unfinished run": State(finished(cut_short, cut("unfinished.json")), runs(1, **NO_RUN)),
    "cut: settings": State(finished(cut(".hydra/config.yaml", 0.2)), runs(0, export=1)),
    "cut: traces": State(finished(cut_short, cut("sensitivity.json")),
                         runs(0, **NO_RUN), replaces=True),
    "cut: checkpoint": State(finished(cut_short, cut("checkpoints/fine_tuning/last.ckpt")), {"train": 1, **NO_RUN},
                             replaces=True),
    "cut: every file is empty": State(finished(all_empty), EVERY),
    "a file": State(is_a_file, EVERY),
    "a link to a folder": State(is_a_link, runs(0, export=0, inside=0)),
    "a link that leads nowhere": State(leads_nowhere, NO_RUN, replaces=True),
    "a folder for a plan": State(empty(a_folder("plan.json")), EVERY),
    "a folder for an export": State(finished(a_folder("model.onnx")), {"export": 1}, REPLACE),
    "a link for a packed file": State(empty(a_link("model.safetensors")), EVERY, ("overwrite=true",)),
    "a link for a report": State(finished(a_link("report.html")), {}, REPLACE, replaces=True),
    "a file for the figures": State(empty(mine("figures")), {}, replaces=True),
    "a file for the checkpoints": State(empty(mine("checkpoints")), {}, replaces=True),
    "a file for a folder's settings": State(empty(mine(".hydra")), {}, replaces=True),
}  # fmt: skip
