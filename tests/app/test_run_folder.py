"""Run folders in every state, and each console script on them: nothing is lost that the run did not make.

The states, each in a test of its own or a row of a table:

* whose results: finished with the same settings, with others, by an earlier release; unfinished, likewise; replaced
  on demand; replaced by a run that is refused (budget, data, weights, a plan or traces of another network) or killed
  before its first result; refused, then corrected;
* whose files: somebody else's page, packed file, settings, or names that no run uses; what came later; a page that was
  edited; exports and tables of somebody else; what only looks writes nothing;
* at once: two runs, a folder at work, ranks of one run, a killed process's lock;
* what cannot be: a folder that is a file, lies below one, has 300 letters, or is nowhere; read-only; a full disk, a
  full cache, an unwritable ``dirpath``;
* damaged: packed file, checkpoint, manifest, record, plan, traces, settings; an empty packed file;
* from a stranger: settings that name code, checkpoints that are pickles, modules in the folder.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf

from hawq_lightning import HawqError, Plan
from hawq_lightning.cli import check_targets
from hawq_lightning.quantization import import_quantizers
from tests import console
from tests.internals import internal

FAST = [
    "debug=fast", "model.depth=8", "model.channels=4", "trainer=cpu", "logger=none", "measure.loss_per_site=false",
    "measure.forecast=null",
    "~callbacks.progress",
]  # fmt: skip
OTHER = "select.budget=6x"
PRIVATE = (".hawq_lightning.lock",)


def impatient(before=None):
    internal("cli._run_folder")._PATIENCE = 0.3
    if before is not None:
        before()


def begin(name, *arguments, cwd, before=None):
    return console.begin(name, *arguments, cwd=cwd, before=partial(impatient, before))


def shell(name, *arguments, cwd, before=None):
    return begin(name, *arguments, cwd=cwd, before=before).end()


def contents(folder):
    """Every file with its hash, locks apart."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in PRIVATE
    }  # fmt: skip


def refused(result, *words):
    code, out, err = result
    assert code == 1, (code, out, err)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run, with its report."""
    base = tmp_path_factory.mktemp("made")
    code, out, err = shell("hawq-lightning", *FAST, "hydra.run.dir=run", cwd=base)
    assert code == 0, (out, err)
    return base / "run"


@pytest.fixture
def run(made, tmp_path):
    """A copy of it, with a file of the user's beside its own."""
    home = tmp_path / "home"
    shutil.copytree(made, home / "run")
    (home / "run" / "notes.txt").write_text("mine")
    (home / "run" / "figures" / "mine.png").write_text("mine")
    return home / "run"


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def train(folder, *more, name="hawq-lightning", before=None):
    return shell(name, *FAST, f"hydra.run.dir={folder}", *more, cwd=folder.parent, before=before)


def cut_short(folder):
    """As a run looks that was killed in its last epoch."""
    record = json.loads((folder / "metrics.json").read_text())
    for name in ("metrics.json", "model.safetensors", "report.html", "README.md"):
        (folder / name).unlink()
    (folder / "unfinished.json").write_text(json.dumps(record))
    manifest = json.loads((folder / ".hawq_lightning.json").read_text())
    manifest = {k: v for k, v in manifest.items() if k not in ("files", "pages", "sha256")}
    (folder / ".hawq_lightning.json").write_text(json.dumps(manifest))


def fill(*parts):
    """A disk that is full below folders of these names, for the one writer."""
    io = internal("_io")
    original = io.os.replace

    def replace(source, target, **how):
        if any(part in str(target) for part in parts) and io.Path(target).name not in (".hawq_lightning.json",):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(source, target, **how)

    io.os = type("Os", (), {**vars(os), "replace": staticmethod(replace)})


def killed_by_the_trainer():
    internal("cli._run").make_trainer = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def without_a_clock():
    """The networks are made and handed on, and that is all."""
    module = internal("cli._export_run")
    module.speeds, module.show = lambda *_, **__: {}, lambda record, note: print(note)


def test_a_finished_run_is_not_repeated(run):
    before = contents(run)
    code, out, _ = train(run)
    assert code == 0 and "finished already" in out
    assert contents(run) == before


@pytest.mark.parametrize("script", ["hawq-lightning", "hawq-lightning-analyze"])
@pytest.mark.parametrize("change", [OTHER, "fine_tuning=freeze"])
def test_other_settings_are_refused_and_nothing_is_touched(run, script, change):
    before = contents(run)
    refused(train(run, change, name=script), "a finished run with other settings", "overwrite=true")
    assert contents(run) == before


def test_a_run_of_an_earlier_release_is_refused_too(run):
    (run / ".hawq_lightning.json").unlink()
    before = contents(run)
    refused(train(run, OTHER), "a finished run with other settings")
    assert contents(run) == before
    assert "finished already" in train(run)[1]


def test_results_are_replaced_on_demand_and_files_of_others_stay(run):
    code, out, err = train(run, OTHER, "overwrite=true", "report=false")
    assert code == 0, (out, err)
    assert Plan.load(run / "plan.json").budget == "6x"
    assert (run / "notes.txt").read_text() == (run / "figures" / "mine.png").read_text() == "mine"
    assert not (run / "report.html").exists(), "it tells of the old run"
    assert not (run / ".hawq_lightning.old").exists()
    assert "seed=1" not in train(run, OTHER, "report=false")[1]


@pytest.mark.parametrize(
    ("change", "word"),
    [("select.budget=90x", "90x"), ("data.shift=7", "shift=7"), ("model.weights=/nowhere.pt", "/nowhere.pt")],
)
@pytest.mark.parametrize("epochs", [0, 1])
def test_old_results_stay_when_the_new_run_is_refused(run, change, word, epochs):
    before = contents(run)
    refused(train(run, change, f"float_epochs={epochs}", "overwrite=true"), word)
    assert contents(run) == before


@pytest.mark.parametrize("key", ["plan", "sensitivity"])
@pytest.mark.parametrize("epochs", [0, 1])
def test_old_results_stay_when_plan_or_traces_are_of_another_network(run, key, epochs):
    other = run.parent / "other.json"
    told = json.loads((run / f"{key}.json").read_text())
    del told["sha256"]
    site = next(s for s in told["sites" if key == "plan" else "records"] if s["kind"] == "weight")
    name = site["layers"][0] if key == "plan" else site["name"]
    text = json.dumps(told).replace(f'"{name}"', '"elsewhere"')
    other.write_text(text)
    before = contents(run)
    settings = [f"hawq.{key}={other}", f"float_epochs={epochs}", "overwrite=true"]
    refused(train(run, *settings), "another model" if key == "plan" else name)
    assert contents(run) == before


def test_old_results_come_back_after_a_kill_before_the_first_new_one(run):
    before = contents(run)

    assert train(run, OTHER, "overwrite=true", before=killed_by_the_trainer)[0] == -signal.SIGKILL
    assert contents(run) != before
    refused(train(run, OTHER), "a finished run with other settings")
    assert contents(run) == before


def test_a_mistake_of_the_command_line_can_be_corrected_in_the_same_folder(home):
    refused(train(home / "run", "select.budget=90x"), "90x")
    assert not contents(home / "run")
    assert train(home / "run", "report=false")[0] == 0


def test_an_unfinished_run_goes_on_with_its_own_settings_only(run, made):
    cut_short(run)
    before = contents(run)
    refused(train(run, OTHER), "an unfinished run with other settings")
    assert contents(run) == before
    code, out, err = train(run)
    assert code == 0 and "goes on where it stopped" in out, err
    assert (run / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


@pytest.mark.parametrize("script", ["hawq-lightning", "hawq-lightning-analyze"])
@pytest.mark.parametrize(
    ("name", "more"),
    [("README.md", []), ("model.safetensors", ["overwrite=true"]), (".hydra/config.yaml", ["resume=false"])],
)
def test_a_folder_of_something_else_is_refused(home, script, name, more):
    (home / name).parent.mkdir(exist_ok=True)
    (home / name).write_text("mine")
    before = contents(home)
    refused(shell(script, *FAST, "hydra.run.dir=.", *more, cwd=home), name, "which no run of hawq-lightning made")
    assert contents(home) == before and not (home / ".hawq_lightning.lock").exists()


def test_a_folder_with_files_of_other_names_is_used_and_they_stay(home):
    (home / "notes.txt").write_text("mine")
    code, out, err = shell("hawq-lightning", *FAST, "hydra.run.dir=.", "report=false", cwd=home)
    assert code == 0, (out, err)
    assert (home / "notes.txt").read_text() == "mine" and (home / ".hydra" / "overrides.yaml").is_file()


def test_what_came_into_the_folder_later_is_not_the_runs(run):
    (run / "export.json").write_text("mine")
    before = contents(run)
    refused(train(run, OTHER, "overwrite=true"), "export.json")
    assert contents(run) == before


def test_a_page_that_somebody_changed_stays(run):
    (run / "README.md").write_text("better")
    before = contents(run)
    assert "finished already" in train(run)[1]
    refused(train(run, OTHER, "overwrite=true"), "README.md", "changed")
    assert contents(run) == before


@pytest.mark.parametrize("name", ["README.md", "report.html", "export.json", "model.onnx"])
def test_what_comes_after_a_runs_end_is_somebody_elses_before_it(run, name):
    cut_short(run)
    (run / name).write_text("mine")
    before = contents(run)
    refused(train(run, OTHER, "overwrite=true"), name, "which no run of hawq-lightning made")
    assert contents(run) == before


def test_a_run_that_ended_and_went_on_and_was_killed_goes_on_again(run, made):
    shutil.copy(run / "metrics.json", run / "unfinished.json")
    (run / "model.safetensors").unlink()
    code, out, err = train(run, "report=false")
    assert code == 0 and "goes on where it stopped" in out, err
    assert (run / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_a_look_writes_nothing_whatever_lies_there(home):
    (home / "README.md").write_text("mine")
    code, out, err = shell("hawq-lightning-analyze", *FAST, "dry_run=true", cwd=home)
    assert code == 0 and "weight_bytes" in out, err
    assert list(home.iterdir()) == [home / "README.md"]


def test_two_runs_at_once_are_one_run(home):
    children = [begin("hawq-lightning", *FAST, "report=false", "hydra.run.dir=run", cwd=home) for _ in range(2)]
    codes = sorted(child.end().returncode for child in children)
    assert codes == [0, 1]
    assert "finished already" in train(home / "run", "report=false")[1]


@pytest.mark.parametrize(
    "script", ["hawq-lightning", "hawq-lightning-analyze", "hawq-lightning-export", "hawq-lightning-collect"]
)
def test_a_folder_at_work_is_refused(run, script):
    of_its_own = {"hawq-lightning-export": ["run_folder=run"], "hawq-lightning-collect": ["run"]}
    arguments = of_its_own.get(script, [*FAST, "hydra.run.dir=run"])
    before = contents(run)
    with FileLock(run / ".hawq_lightning.lock"):
        refused(shell(script, *arguments, cwd=run.parent), "Another run is at work in")
    assert contents(run) == before


def test_a_killed_process_gives_the_lock_back(run):
    child = os.fork()
    if child == 0:
        FileLock(run / ".hawq_lightning.lock").acquire()
        (run.parent / "locked").touch()
        time.sleep(100)
    while not (run.parent / "locked").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert "finished already" in train(run)[1]


@pytest.mark.parametrize("script", ["hawq-lightning", "hawq-lightning-analyze"])
def test_folders_that_cannot_be_are_one_line(home, script):
    (home / "file").write_text("mine")
    for folder in ("file", "file/run", "x" * 300, "/proc/nowhere/run"):
        refused(shell(script, *FAST, f"hydra.run.dir={folder}", cwd=home))
    assert contents(home) == {"file": hashlib.sha256(b"mine").hexdigest()}
    long = "model.name_of_something_long_that_nobody_reads=" + "x" * 300
    refused(shell(script, "-m", *FAST, "seed=1,2", f"+{long}", cwd=home), "File name too long")


def test_a_cut_packed_file_is_no_finished_run(run, made):
    (run / "model.safetensors").write_bytes((made / "model.safetensors").read_bytes()[:-9])
    code, out, err = train(run)
    assert code == 0 and "finished already" not in out, err
    assert (run / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def flip(path):
    """Change a digit of what a file says, and leave its form."""
    text = path.read_text()
    start = text.index('"sha256"') + 90
    at = next(i for i in range(start, len(text)) if text[i] in "0123456789abcdef" and text[i - 1] in "0123456789")
    path.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])


def locked_up(name):
    """A folder that nothing can be written into, for the one writer (who may be root here) and for locks."""
    io, folders = internal("_io"), internal("cli._run_folder")

    def mkstemp(dir, **how):
        if name in io.Path(dir).parts:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(dir=dir, **how)

    class ReadOnly(FileLock):
        def acquire(self, *args, **how):
            if name in io.Path(self.lock_file).absolute().parts:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return super().acquire(*args, **how)

    original = io.tempfile.mkstemp
    io.tempfile = type("Tempfile", (), {**vars(io.tempfile), "mkstemp": staticmethod(mkstemp)})
    folders.FileLock = ReadOnly


@pytest.mark.parametrize(
    ("script", "damage", "word"),
    [
        ("hawq-lightning", ".hawq_lightning.json", ".hawq_lightning.json"),
        ("hawq-lightning-analyze", ".hawq_lightning.json", ".hawq_lightning.json"),
        ("hawq-lightning-export", ".hawq_lightning.json", ".hawq_lightning.json"),
        ("hawq-lightning", "metrics.json", "metrics.json"),
        ("hawq-lightning", "unfinished.json", "unfinished.json"),
        ("hawq-lightning", "", "Read-only file system"),
        ("hawq-lightning-analyze", "", "Read-only file system"),
        ("hawq-lightning-export", "", "Read-only file system"),
    ],
)
def test_damaged_records_and_folders_that_are_read_only_are_one_line(run, script, damage, word):
    if damage == "unfinished.json":
        cut_short(run)
    if damage:
        flip(run / damage)
    before = contents(run)
    arguments = ["run_folder=run"] if script.endswith("export") else [*FAST, "hydra.run.dir=run"]
    more = [] if damage or script.endswith("export") else [OTHER, "overwrite=true"]
    result = shell(script, *arguments, *more, cwd=run.parent, before=None if damage else partial(locked_up, "run"))
    refused(result, word)
    assert contents(run) == before


def test_a_sweep_lists_what_it_cannot_read_and_goes_on(run):
    shutil.copytree(run, run.parent / "cut")
    (run.parent / "cut" / "metrics.json").write_text("{")
    before = contents(run)
    code, out, err = shell("hawq-lightning-collect", ".", cwd=run.parent)
    assert code == 0 and "left out: cut" in out, (out, err)
    assert contents(run) == before


def test_damaged_traces_are_measured_again(run, made):
    cut_short(run)
    (run / "checkpoints" / "fine_tuning" / "last.ckpt").unlink()
    flip(run / "sensitivity.json")
    code, out, err = train(run, "report=false")
    logged = "".join(path.read_text() for path in run.rglob("*.log"))
    assert code == 0 and "measured anew" in out + err + logged, (out, err, logged)
    theirs, ours = (json.loads((f / "sensitivity.json").read_text())["records"] for f in (made, run))
    assert theirs == ours


def test_a_cut_checkpoint_is_named(run):
    cut_short(run)
    last = run / "checkpoints" / "fine_tuning" / "last.ckpt"
    for raw in (b"", last.read_bytes()[:-100]):
        last.write_bytes(raw)
        before = contents(run)
        refused(train(run), str(last), "cut short or damaged")
        assert contents(run) == before
        refused(train(run.parent / "other", f"ckpt_path={last}"), str(last))


def test_a_full_disk_is_one_line_and_old_results_stay(run):
    before = contents(run)
    result = train(run, OTHER, "overwrite=true", "float_epochs=0", before=partial(fill, "run/unfinished", "run/sens"))
    refused(result, "Cannot write", "No space left on device")
    assert contents(run) == before


def test_a_full_cache_is_a_warning(home):
    cache = f"paths.cache={home / 'cache'}"
    code, out, err = train(home / "run", cache, "report=false", before=partial(fill, "home/cache"))
    assert code == 0 and "No space left on device" in out, (out, err)
    assert (home / "run" / "model.safetensors").is_file()


def test_an_unwritable_dirpath_is_known_before_anything_is_measured(home):
    (home / "file").write_text("mine")
    refused(train(home / "run", f"+hawq.dirpath={home / 'file' / 'x'}"), f"{home / 'file' / 'x'}")


def poisoned(run, key, value):
    settings = OmegaConf.load(run / ".hydra" / "config.yaml")
    OmegaConf.set_struct(settings, False)
    OmegaConf.update(settings, key, value, force_add=True)
    OmegaConf.save(settings, run / ".hydra" / "config.yaml")


EVIL = "import pathlib; pathlib.Path('ran').touch()"


@pytest.mark.parametrize(("key", "value", "word"), [
    ("imports", ["evil.py"], "imports=[evil.py]"),
    ("imports", "evil.py", "imports=[evil.py]"),
    ("quantizer.imports", ["evil"], "imports=[evil]"),
    ("model._target_", "os.system", "imports=[os]"),
    ("model._target_", "torch.os.system", "torch.os.system"),
    ("model._target_", "torch.hub.load", "torch.hub.load"),
    ("model._target_", "hawq_lightning.models.require", "hawq_lightning.models.require"),
    ("model._target_", "hydra.utils.call", "hydra.utils.call"),
    ("model.depth", {"_target_": "builtins.exec", "_args_": [EVIL]}, "builtins.exec"),
    ("data.batch_size", {"a": [{"_target_": "builtins.eval", "_args_": [EVIL]}]}, "builtins.eval"),
    ("data.batch_size", "${oc.create:{_target_:builtins.exec}}", "builtins.exec"),
    ("data", "text", "holds no settings"),
])  # fmt: skip
def test_a_folder_from_somebody_else_runs_no_code(run, key, value, word):
    for place in (run, run.parent):
        (place / "evil.py").write_text(EVIL)
    poisoned(run, key, value)
    before = contents(run.parent)
    refused(shell("hawq-lightning-export", "run_folder=run", cwd=run.parent), word)
    assert contents(run.parent) == before, "it ran"


def test_targets_of_networks_and_data_are_allowed_and_those_that_are_named():
    for target in ("hawq_lightning.models.resnet20", "hawq_lightning.data.DigitsDataModule", "torch.nn.Conv2d",
                   "torch.nn.modules.linear.Linear", "mine.nets.Net"):  # fmt: skip
        check_targets(OmegaConf.create({"_target_": target}), {"mine.nets"}, Path("run"))
    with pytest.raises(HawqError, match=r"imports=\[mine.nets\]"):
        check_targets(OmegaConf.create({"x": [{"_target_": "mine.nets.Net"}]}), {"mine"[:3]}, Path("run"))


class Evil:
    def __reduce__(self):
        return (exec, (EVIL,))


def test_a_checkpoint_from_somebody_else_is_not_unpickled(run):
    last = run / "checkpoints" / "fine_tuning" / "last.ckpt"
    torch.save({"state_dict": Evil()}, last)
    few = ["images=0", "formats=[]", "table=false"]
    code, out, err = shell("hawq-lightning-export", "run_folder=run", *few, cwd=run.parent, before=without_a_clock)
    assert code == 0 and "not trusted" in out, (out, err)
    assert not (run.parent / "ran").exists()


def test_a_run_folder_is_not_put_on_the_path(run, monkeypatch):
    (run / "run_folder_quantizers.py").write_text("there = True\n")
    before = list(sys.path)
    import_quantizers([str(run / "run_folder_quantizers.py")])
    assert sys.modules.pop("run_folder_quantizers").there and sys.path == before
    (run / "run_folder_broken.py").write_text("1 / 0\n")
    with pytest.raises(HawqError, match="ZeroDivisionError"):
        import_quantizers([str(run / "run_folder_broken.py")])


@pytest.mark.parametrize("name", ["model.onnx", "latency.csv", "export.json", "model.pt2"])
def test_an_export_writes_over_nothing_that_is_not_its_own(run, name):
    (run / name).write_text("mine")
    before = contents(run)
    refused(shell("hawq-lightning-export", "run_folder=run", cwd=run.parent), name)
    assert contents(run) == before


def test_exports_of_what_is_no_run_are_one_line(run):
    (run.parent / "file").write_text("mine")
    (run / "model.safetensors").write_bytes(b"")
    before = contents(run.parent)
    for folder in ("file", "file/run", "nowhere", "x" * 300, "run"):
        refused(shell("hawq-lightning-export", f"run_folder={folder}", cwd=run.parent))
    (run / ".hydra" / "config.yaml").write_bytes(b"\xff\x00: [")
    refused(shell("hawq-lightning-export", "run_folder=run", cwd=run.parent), "corrupt or cut short")
    (run / ".hydra" / "config.yaml").write_bytes((run / ".hydra" / "overrides.yaml").read_bytes())
    assert {k: v for k, v in contents(run.parent).items() if "config" not in k} == {
        k: v for k, v in before.items() if "config" not in k
    }


def test_collecting_writes_over_nothing_that_is_not_its_own(run):
    before = contents(run)
    for _ in range(2):  # its own pages it writes again
        code, out, err = shell("hawq-lightning-collect", ".", cwd=run.parent)
        assert code == 0 and "written" in out, err
    (run.parent / ".hawq_lightning.json").unlink()  # as an earlier release left them
    assert shell("hawq-lightning-collect", ".", cwd=run.parent)[0] == 0
    assert contents(run) == before
    other = run.parent / "other"
    other.mkdir()
    (other / "sweep.csv").write_text("mine")
    refused(shell("hawq-lightning-collect", ".", "--out", "other", cwd=run.parent), "sweep.csv")
    assert list(other.iterdir()) == [other / "sweep.csv"]


def test_collecting_what_cannot_be_is_one_line(run):
    (run.parent / "file").write_text("mine")
    for arguments in (["file"], ["x" * 300], ["nowhere"], [".", "--out", "file"], [".", "--out", "file/x"]):
        refused(shell("hawq-lightning-collect", *arguments, cwd=run.parent))
    refused(shell("hawq-lightning-collect", ".", cwd=run.parent, before=partial(fill, "sweep.")), "No space left")
    assert (run.parent / "file").read_text() == "mine"
