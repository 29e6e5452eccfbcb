"""The project of docs/how-to/own-project.md, file by file, and the shell run on it as its owner would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from hawq_lightning import HawqError
from hawq_lightning.cli import make_data, make_task
from tests.console import Finished, shell
from tests.internals import internal

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "own-project.md"
FILE = re.compile(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", re.M | re.S)
FAST = [
    "float_epochs=1", "epochs=1", "measure.images=32", "measure.rtol=0.9",
    "measure.forecast=null", "trainer=cpu", "callbacks=none",
    "logger=none", "select.budget=6x", "hydra.run.dir=run",
]  # fmt: skip
AS_IT_IS = ["task=lightning_module", "task._target_=src.plain.Plain", "model=null", "data=datamodule",
            "data._target_=src.data.Shapes"]  # fmt: skip
DIR = ["--config-dir", "configs"]
COMMANDS = {
    "as it is": (AS_IT_IS, None),
    "with arguments and a monitor": ([*AS_IT_IS, "+task.width=32", "monitor=val_accuracy"], "monitor"),
    "template": ([*DIR, "model=shapes", "task=null", "data=shapes"], "accuracy"),
    "template without task=null": ([*DIR, "model=shapes", "data=shapes", "+data.images=32"], "accuracy"),
    "network and task": ([*DIR, "model=dense", "task=shapes", "data=shapes", "monitor=val/loss"], "monitor"),
    "our task": ([*DIR, "model=dense", "data=shapes"], "accuracy"),
    "experiment": ([*DIR, "experiment=shapes"], "accuracy"),
    "targets alone": (
        ["task._target_=src.plain.Plain", "data._target_=src.data.Shapes", "data.batch_size=8", "model=null"], None,
    ),
    "model target alone": (["model._target_=src.net.Dense", "+model.width=9", "data._target_=src.data.Shapes",
                            "model.num_classes=3"], "accuracy"),
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    files = FILE.findall(PAGE.read_text("utf-8"))
    assert len(files) >= 8
    for name, content in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "src" / "__init__.py").touch()
    return tmp_path


def refused(project: Path, *words: str) -> str:
    done = shell("hawq-lightning", *FAST, *words, cwd=project)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert not (project / "run" / "metrics.json").exists()
    return done.stderr


def ran(done: Finished | subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def kinds(names, quick: set[str]):
    """Those beyond the quick ones take their time in ``make stress``."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.stress) for n in names]


QUICK = {"with arguments and a monitor", "template", "targets alone"}


@pytest.mark.parametrize("kind", kinds(COMMANDS, QUICK))
def test_the_shell_runs_a_strangers_project(project, kind):
    words, metric = COMMANDS[kind]
    out = ran(shell("hawq-lightning", *FAST, *words, cwd=project))
    record = json.loads((project / "run" / "metrics.json").read_text())
    assert (project / "run" / "model.safetensors").is_file() and (project / "run" / "report.html").is_file()
    assert "of the quantized" in out and " of all" in out
    if metric is not None:
        assert set(record[metric]) - {"name"} == {"float", "quantized", "fine_tuned"}
        shown = record["monitor"]["name"] if metric == "monitor" else metric
        assert shown in out and shown in (project / "run" / "README.md").read_text()
    settings = yaml.safe_load((project / "run" / ".hydra" / "config.yaml").read_text())
    assert ("model" in settings) == ("model=null" not in words)
    if kind == "targets alone":
        assert "it is given nothing of task's num_classes, optimizer, lr" in out
        assert "it is given nothing of data's held_out, shift, subset" in out


@pytest.mark.stress
def test_a_new_python_finds_the_project_and_a_finished_run_is_not_repeated(project):
    command = [Path(sys.executable).parent / "hawq-lightning", *FAST, *AS_IT_IS]
    ran(subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300))
    assert "finished already" in ran(shell("hawq-lightning", *FAST, *AS_IT_IS, cwd=project))


def test_a_run_of_the_template_goes_on_from_its_checkpoint(project):
    words = [*(w for w in FAST if w != "callbacks=none"), *COMMANDS["template"][0]]
    ran(shell("hawq-lightning", *words, cwd=project))
    (project / "run" / "model.safetensors").unlink()
    assert "goes on where it stopped" in ran(shell("hawq-lightning", *words, cwd=project))


@pytest.mark.parametrize("kind", kinds(["as it is", "template", "experiment"], {"experiment"}))
def test_analysis_and_dry_run(project, kind):
    words = [w for w in FAST if "epochs" not in w]
    out = ran(shell("hawq-lightning-analyze", *words, *COMMANDS[kind][0], "dry_run=true", cwd=project))
    assert "(all quantized)" in out and "model_bytes: " in out and not (project / "run").exists()
    ran(shell("hawq-lightning-analyze", *words, *COMMANDS[kind][0], cwd=project))
    assert (project / "run" / "plan.json").is_file()


@pytest.mark.parametrize("kind", kinds(["as it is", "template", "experiment"], set()))
def test_export_runs_code_only_where_it_is_trusted(project, kind):
    pytest.importorskip("onnxruntime")
    ran(shell("hawq-lightning", *FAST, *COMMANDS[kind][0], cwd=project))
    words = ["run_folder=run", "speed=false", "table=false", "formats=[]", "images=16"]
    done = shell("hawq-lightning-export", *words, cwd=project)
    assert done.returncode == 1 and "imports=[src." in done.stderr
    ran(shell("hawq-lightning-export", *words, "imports=[src]", cwd=project))
    assert (project / "run" / "model.onnx").is_file()


LIT = "task._target_="
REFUSED = {
    "a class": ([f"{LIT}src.plain.Plian"], f"{LIT}src.plain.Plian: src.plain has no 'Plian'. Did you mean 'Plain'"),
    "a module": ([f"{LIT}src.plian.Plain"], "src has no 'plian'. Did you mean 'plain'"),
    "a package": ([f"{LIT}scr.plain.Plain"], "there is no module 'scr', neither installed nor in"),
    "no module": (["data._target_=Shapes"], "data._target_=Shapes is no dotted name; write module.Shapes"),
    "no class": (["data._target_=src.data.torch"], "src.data.torch is a module, no class or function"),
    "a network": ([f"{LIT}src.net.Dense"], "makes a Dense, which is no LightningModule; give a plain network"),
    "data": (["data._target_=src.net.Dense"], "=src.net.Dense makes a Dense, which is no LightningDataModule"),
    "nothing": (["task._target_=null"], "task._target_ is not set; add task._target_=module.Class"),
    "an argument": (["+task.widht=3"], "unexpected keyword argument 'widht'. It takes width."),
    "a needed argument": ([f"{LIT}src.module.LitShapes"], "It takes net, optimizer; give one as +task.net="),
    "a score": (["monitor=val_acc"], "=val_acc is not logged in validation; there are val_accuracy. Did you mean"),
    "no network": (["task=classification"], "=null leaves hawq_lightning.tasks.ClassificationTask without a network"),
    "no task": (["task=null"], "task=null needs a model that is a LightningModule; there is none"),
}


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project in this process, whose modules are forgotten afterwards."""
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    yield project
    for name in [n for n in sys.modules if n.partition(".")[0] == "src"]:
        del sys.modules[name]


def built(project: Path, *words: str) -> None:
    """What a run makes first."""
    GlobalHydra.instance().clear()
    argv = internal("cli._entry").without_null([*FAST, *words])
    with initialize_config_module("hawq_lightning.conf", version_base="1.3"):
        cfg = compose("train", [w for w in argv if not w.startswith("hydra")])
    task = make_task(cfg)
    make_data(cfg)
    internal("cli._recorder").scores({"val_accuracy": 1.0}, cfg.monitor)
    assert task is not None


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_target_is_one_sentence_with_the_nearest(here, kind):
    words, sentence = REFUSED[kind]
    given = [w for w in AS_IT_IS if not (kind in ("no network", "no task") and w.startswith("task"))]
    given = [w for w in given if w.partition("=")[0] not in [x.partition("=")[0] for x in words]]
    with pytest.raises(HawqError, match=re.escape(sentence)):
        built(here, *given, *words)


def test_the_shell_prints_that_sentence_alone(project):
    assert REFUSED["a class"][1] in refused(project, *AS_IT_IS, *REFUSED["a class"][0])


def test_a_net_that_nobody_takes_is_refused(here):
    words = ["model._target_=src.net.Dense", *(w for w in AS_IT_IS if w != "model=null")]
    with pytest.raises(HawqError, match="takes no net, and model._target_=src.net.Dense is one"):
        built(here, *words)


def test_an_error_inside_of_their_module_is_named(here):
    (here / "src" / "broken.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(HawqError, match="src.broken cannot be imported: No module named 'a_package_that_nobody_has'"):
        built(
            here,
            *(w for w in AS_IT_IS if "_target_" not in w),
            "data._target_=src.data.Shapes",
            f"{LIT}src.broken.Task",
        )


def of_the_other_name(project: Path, *names: str) -> None:
    for name in names:
        file = project / "src" / f"{name}.py"
        file.write_text(file.read_text().replace("lightning.pytorch", "pytorch_lightning"))


def test_two_names_of_lightning_in_one_run_are_refused(project):
    pytest.importorskip("pytorch_lightning")
    of_the_other_name(project, "plain")
    said = refused(project, *AS_IT_IS)
    assert "task=Plain is of pytorch_lightning and data=Shapes of lightning.pytorch" in said


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.stress)])
def test_the_shell_runs_a_project_of_the_other_name(project, again):
    pytest.importorskip(
        "pytorch_lightning", "2.6", reason="Lightning 2.5's Trainer refuses callbacks of the other name"
    )
    of_the_other_name(project, "plain", "data")
    words = [w for w in FAST if w != "callbacks=none"]
    ran(shell("hawq-lightning", *words, *AS_IT_IS, cwd=project))
    if again:
        (project / "run" / "model.safetensors").unlink()
        assert "goes on where it stopped" in ran(shell("hawq-lightning", *words, *AS_IT_IS, cwd=project))
    assert (project / "run" / "model.safetensors").is_file()


def test_what_is_located_and_who_it_is(tmp_path, monkeypatch):
    targets = internal("cli._targets")
    monkeypatch.chdir(tmp_path)
    assert targets.located("collections.OrderedDict.fromkeys", "x")("ab") == {"a": None, "b": None}
    with pytest.raises(HawqError, match="Did you mean 'OrderedDict'"):
        targets.located("collections.OrderDict", "x")
    own = internal("tasks").ClassificationTask
    assert targets.is_own(own) and targets.is_own(type("Mine", (own,), {})) and not targets.is_own(os.getcwd)
