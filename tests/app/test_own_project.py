"""The project of docs/how-to/own-project.md, file by file, and the shell run on it as its owner would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hawq_lightning import HawqError
from tests.console import Finished, shell
from tests.internals import internal

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "own-project.md"
FILE = re.compile(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", re.M | re.S)
FAST = [
    "float_epochs=1", "epochs=1", "measure.images=32", "measure.rtol=0.9", "trainer=cpu", "callbacks=none",
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


@pytest.mark.parametrize("kind", COMMANDS)
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


def test_a_new_python_finds_the_project_and_a_finished_run_is_not_repeated(project):
    command = [Path(sys.executable).parent / "hawq-lightning", *FAST, *AS_IT_IS]
    ran(subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300))
    assert "finished already" in ran(shell("hawq-lightning", *FAST, *AS_IT_IS, cwd=project))


def test_a_run_of_the_template_goes_on_from_its_checkpoint(project):
    words = [*(w for w in FAST if w != "callbacks=none"), *COMMANDS["template"][0]]
    ran(shell("hawq-lightning", *words, cwd=project))
    (project / "run" / "model.safetensors").unlink()
    assert "goes on where it stopped" in ran(shell("hawq-lightning", *words, cwd=project))


@pytest.mark.parametrize("kind", ["as it is", "template", "experiment"])
def test_analysis_and_dry_run(project, kind):
    words = [w for w in FAST if "epochs" not in w]
    out = ran(shell("hawq-lightning-analyze", *words, *COMMANDS[kind][0], "dry_run=true", cwd=project))
    assert "(all quantized)" in out and "model_bytes: " in out and not (project / "run").exists()
    ran(shell("hawq-lightning-analyze", *words, *COMMANDS[kind][0], cwd=project))
    assert (project / "run" / "plan.json").is_file()


@pytest.mark.parametrize("kind", ["as it is", "template", "experiment"])
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


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_target_is_one_sentence_with_the_nearest(project, kind):
    words, sentence = REFUSED[kind]
    given = [w for w in AS_IT_IS if not (kind in ("no network", "no task") and w.startswith("task"))]
    assert sentence in refused(project, *given, *words)


def test_a_net_that_nobody_takes_is_refused(project):
    words = ["model._target_=src.net.Dense", *(w for w in AS_IT_IS if w != "model=null")]
    assert "takes no net, and model._target_=src.net.Dense is one" in refused(project, *words)


def test_an_error_inside_of_their_module_is_named(project):
    (project / "src" / "broken.py").write_text("import a_package_that_nobody_has\n")
    said = refused(project, *AS_IT_IS, "task._target_=src.broken.Task")
    assert "src.broken cannot be imported: No module named 'a_package_that_nobody_has'" in said


def test_a_module_of_the_other_name_is_told_so(project):
    pytest.importorskip("pytorch_lightning")
    text = (project / "src" / "plain.py").read_text().replace("lightning.pytorch", "pytorch_lightning")
    (project / "src" / "plain.py").write_text(text)
    assert "which is no LightningModule of lightning.pytorch" in refused(project, *AS_IT_IS)


def test_what_is_located_and_who_it_is(tmp_path, monkeypatch):
    targets = internal("cli._targets")
    monkeypatch.chdir(tmp_path)
    assert targets.located("collections.OrderedDict.fromkeys", "x")("ab") == {"a": None, "b": None}
    with pytest.raises(HawqError, match="Did you mean 'OrderedDict'"):
        targets.located("collections.OrderDict", "x")
    own = internal("tasks").ClassificationTask
    assert targets.is_own(own) and targets.is_own(type("Mine", (own,), {})) and not targets.is_own(os.getcwd)
