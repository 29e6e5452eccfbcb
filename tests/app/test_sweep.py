"""Sweeps: nothing finished is repeated, nothing is measured twice, what was cut short goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from hawq_lightning import HawqError, Plan, Sensitivity, sites
from hawq_lightning.callbacks.fault_tolerance import KeepRandomStates
from hawq_lightning.cli import (
    Recorder,
    check_choices,
    make_task,
    make_trainer,
    run,
    settings_hash,
    sweep_dirname_overrides,
)
from hawq_lightning.models import resnet20
from hawq_lightning.report import collect
from hawq_lightning.sensitivity import TraceCache
from tests.console import begin, shell
from tests.internals import internal

BIN = Path(sys.executable).parent
TINY = [
    "model.depth=8", "model.channels=4", "data.subset=256", "measure.images=32", "measure.rtol=0.5",
    "measure.forecast=null",
    "trainer=cpu", "~callbacks.progress", "logger=none", "measure.loss_per_site=false", "report=false",
]  # fmt: skip


def settings(folder, *overrides):
    GlobalHydra.instance().clear()
    with initialize_config_module("hawq_lightning.conf", version_base="1.3"):
        return compose("train", [*TINY, f"paths.output_dir={folder}", *overrides])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "float.pt"
    torch.manual_seed(0)
    torch.save(resnet20(in_channels=1, channels=4, depth=8).state_dict(), path)
    return path


def test_other_budgets_seeds_and_quantizers_do_not_measure_again(tmp_path, weights):
    given = ["float_epochs=0", "epochs=1", f"model.weights={weights}", f"paths.cache={tmp_path / 'cache'}"]
    for name, *changes in (
        ("a", "seed=1", "select.budget=6x"),
        ("b", "seed=2", "select.budget=10x"),
        ("c", "quantizer.exclude=[net.linear]"),
        ("d", "measure.rtol=0.4"),
        ("e", "quantizer=lsq"),
    ):
        run(settings(tmp_path / name, *given, *changes))
    found = {n: Sensitivity.load(tmp_path / n / "sensitivity.json") for n in "abcde"}
    # the seconds are those of the one measurement
    for other in "be":
        assert found["a"].records == found[other].records
        assert dict(found["a"].settings) == dict(found[other].settings)
    assert Plan.load(tmp_path / "a" / "plan.json").bits != Plan.load(tmp_path / "b" / "plan.json").bits
    # other sites and other settings are other measurements
    assert "net.linear.weight" in found["a"] and "net.linear.weight" not in found["c"]
    assert found["d"].fingerprint != found["a"].fingerprint
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 3
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_parallel_jobs_wait_for_the_one_that_measures(tmp_path):
    table = sites(resnet20(channels=4, depth=8), torch.randn(1, 3, 8, 8))
    records = [
        {"name": s.name, "kind": s.kind, "numel": s.numel}
        | {"trace": 1.0, "stderr": 0.1, "stderr_data": 0.1, "mean_trace": 1.0}
        for s in table
    ]  # fmt: skip
    text = {"format": "hawq_lightning.sensitivity", "version": 1, "records": records, "fingerprint": "sha256:x"}
    measured, told, got = Sensitivity.from_dict(text), [], []
    first, second = TraceCache(tmp_path, table), TraceCache(tmp_path, table, told.append)
    assert first.find("sha256:x") is None
    waiting = threading.Thread(target=lambda: got.append(second.find("sha256:x")))
    waiting.start()
    time.sleep(0.5)
    assert not got and told and "waits" in told[0]
    first.store(measured)
    waiting.join(10)
    assert got[0].records == measured.records
    first.path("sha256:x").write_text('{"cut sho')
    with pytest.warns(UserWarning, match="cut short.*measured anew"):
        assert first.find("sha256:x") is None  # damaged: to be measured again, under the lock
    first.release()
    assert TraceCache(tmp_path, table).find("sha256:other") is None


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(tmp_path, weights, recwarn):
    (tmp_path / "file").write_text("")
    given = ["float_epochs=0", "epochs=0", f"model.weights={weights}", f"paths.cache={tmp_path / 'file' / 'cache'}"]
    run(settings(tmp_path / "run", *given))
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert any("cannot be used" in str(w.message) for w in recwarn)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(settings(folder, "float_epochs=3", "epochs=2"))


@pytest.mark.parametrize(
    ("callback", "epoch"), [(Recorder, 1), pytest.param(KeepRandomStates, 2, marks=pytest.mark.stress)]
)
def test_a_run_cut_short_ends_as_if_nothing_had_happened(tmp_path, monkeypatch, undisturbed, callback, epoch):
    def stop(self, trainer, pl_module):
        if trainer.current_epoch == epoch:
            raise Killed

    wanted = ["float_epochs=3", "epochs=2"]
    with monkeypatch.context() as patch:
        patch.setattr(callback, "on_train_epoch_start", stop, raising=False)
        with pytest.raises(Killed):
            run(settings(tmp_path, *wanted))
    assert (tmp_path / "unfinished.json").is_file() and not (tmp_path / "metrics.json").exists()
    last = tmp_path / "checkpoints" / ("float" if callback is KeepRandomStates else "fine_tuning") / "last.ckpt"
    assert torch.load(last, weights_only=False)["epoch"] == epoch - 1  # what was done is not done again
    record = run(settings(tmp_path, *wanted))
    for score in ("accuracy", "loss"):
        assert record[score] == pytest.approx(undisturbed[score], rel=1e-6)
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    assert not (tmp_path / "unfinished.json").exists()
    checkpoints = {p.relative_to(tmp_path / "checkpoints").as_posix() for p in tmp_path.rglob("*.ckpt")}
    assert checkpoints == {"float/last.ckpt", "fine_tuning/last.ckpt"}


def test_finished_runs_are_repeated_only_when_something_changed(tmp_path, weights, capsys):
    given = ["float_epochs=0", "epochs=0", f"model.weights={weights}"]
    first = run(settings(tmp_path, *given))
    stamp = (tmp_path / "metrics.json").stat().st_mtime_ns
    assert run(settings(tmp_path, *given)) == first and "finished already" in capsys.readouterr().out
    run(settings(tmp_path, *given, "report=true", f"paths.cache={tmp_path / 'elsewhere'}"))
    assert (tmp_path / "metrics.json").stat().st_mtime_ns == stamp and (tmp_path / "report.html").is_file()
    with pytest.raises(HawqError, match="a finished run with other settings.*overwrite=true"):
        run(settings(tmp_path, *given, "select.budget=10x"))
    assert (tmp_path / "metrics.json").stat().st_mtime_ns == stamp
    run(settings(tmp_path, *given, "select.budget=10x", "overwrite=true"))
    assert (tmp_path / "metrics.json").stat().st_mtime_ns != stamp
    assert Plan.load(tmp_path / "plan.json").budget == "10x"
    stamp = (tmp_path / "metrics.json").stat().st_mtime_ns
    run(settings(tmp_path, *given, "select.budget=10x", "resume=false"))
    assert (tmp_path / "metrics.json").stat().st_mtime_ns != stamp


def test_the_hash_of_settings_ignores_where_and_sees_what(tmp_path):
    base = settings_hash(settings(tmp_path / "a"))
    assert settings_hash(settings(tmp_path / "b", "paths.runs=/elsewhere", "resume=false", "overwrite=true")) == base
    assert settings_hash(settings(tmp_path / "a", "seed=2")) != base
    assert settings_hash(settings(tmp_path / "a", "+x=${oc.env:HAWQ_TEST_NOWHERE}")) != base


def test_sweeps_over_what_folders_are_not_named_after_name_them_after_it():
    several = ["-m", "model.weights=/x/a.pt,/x/b.pt", "seed=1,2", "data.root=/data"]
    (added,) = sweep_dirname_overrides(several)
    assert "model.weights" not in added and "data.root" in added and added.startswith("hydra.job.config")
    assert (
        sweep_dirname_overrides(several[1:]) == []
        and sweep_dirname_overrides(["-m", "seed=1,2", "model.weights=/x/a.pt"]) == []
    )
    assert sweep_dirname_overrides([*several, added]) == [] and sweep_dirname_overrides(["-m", "trainer=cpu,("]) == []


def test_runs_of_several_float_networks_stay_apart(tmp_path, weights):
    other = tmp_path / "other.pt"
    torch.save({k: v * 0.9 for k, v in torch.load(weights).items()}, other)
    done = shell(
        "hawq-lightning", "-m", *TINY, "float_epochs=0", "epochs=0", f"model.weights={weights},{other}",
        f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").rglob("metrics.json"))) == 2


def test_launchers_name_their_extra(monkeypatch):
    monkeypatch.setattr(internal("cli._entry"), "find_spec", lambda name: None)
    for choice in ("launcher=joblib", "launcher=slurm", "hydra/launcher=submitit_local"):
        with pytest.raises(HawqError, match=r"pip install 'hawq-lightning\[sweep\]'"):
            check_choices([choice])
    with pytest.raises(HawqError, match=r"hydra-ray-launcher: pip install 'hawq-lightning\[ray\]'"):
        check_choices(["launcher=ray"])
    check_choices(["hydra/launcher=basic"])
    with pytest.raises(HawqError, match="Did you mean 'joblib'"):
        check_choices(["launcher=jobli"])


def test_script_started_processes_are_refused_in_a_sweep(tmp_path, monkeypatch):
    cfg = settings(tmp_path, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    task = make_task(cfg)
    make_trainer(cfg, "float", [], task)  # alone it is fine
    monkeypatch.setattr(internal("cli._build"), "_in_sweep", lambda: True)
    with pytest.raises(HawqError, match=r"ddp_spawn.*tasks_per_node=2"):
        make_trainer(cfg, "float", [], task)
    cfg = settings(tmp_path, "trainer=ddp_spawn")
    assert make_trainer(cfg, "float", [], task).world_size == 2


def start(cwd, *arguments, **environment):
    """In a new Python, which can start others."""
    command = [BIN / "hawq-lightning", "-m", *TINY, *arguments]
    with (cwd / "output.txt").open("a") as output:
        return subprocess.Popen(
            command, cwd=cwd, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
        )


def test_a_killed_sweep_goes_on_without_repeating_anything(tmp_path, weights):
    sweep = ["float_epochs=0", "epochs=1", f"model.weights={weights}", "select.budget=6x,10x", "seed=1,2"]
    own = {"HAWQ_LIGHTNING_CACHE": str(tmp_path / "cache")}
    runs = tmp_path / "runs" / "digits_resnet20" / "sweep"
    killed = begin("hawq-lightning", "-m", *TINY, *sweep, cwd=tmp_path, **own)
    limit = time.monotonic() + 200
    while not (list(runs.rglob("metrics.json")) and list(runs.rglob("unfinished.json"))):
        if time.monotonic() > limit or killed.ended():
            pytest.fail(str(killed.end(0)))
        time.sleep(0.01)
    killed.kill()
    assert killed.end().returncode == -signal.SIGKILL
    done = {p: p.stat().st_mtime_ns for p in runs.rglob("metrics.json")}
    traces = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.json")}
    assert 1 <= len(done) < 4 and len(traces) == 1

    again = shell("hawq-lightning", "-m", *TINY, *sweep, cwd=tmp_path, **own)
    assert again.returncode == 0, again.stderr
    assert len(list(runs.rglob("metrics.json"))) == 4 and not list(runs.rglob("unfinished.json"))
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.json")} == traces
    assert again.stdout.count("finished already") == len(done)
    seconds = {json.loads(p.read_text())["settings"]["seconds"] for p in runs.rglob("sensitivity.json")}
    assert len(seconds) == 1  # every run has the traces of the one measurement

    found = collect(runs)
    assert {(r.budget, r.seed) for r in found.rows} == {("6x", "1"), ("6x", "2"), ("10x", "1"), ("10x", "2")}
    assert [len(g) for g in found.groups().values()] == [2, 2]
    assert (runs / "figures" / "accuracy_size.png").stat().st_size > 1000


@pytest.mark.stress
def test_sweeps_of_several_processes(tmp_path, weights):
    given = ["float_epochs=0", "epochs=1", f"model.weights={weights}", "select.budget=6x,8x", "name=spawn"]
    own = {"HAWQ_LIGHTNING_CACHE": str(tmp_path / "cache")}
    done = start(tmp_path, *given, "trainer=ddp_spawn", "trainer.devices=2", **own)
    assert done.wait(400) == 0, (tmp_path / "output.txt").read_text()
    assert len(list((tmp_path / "runs" / "spawn").rglob("metrics.json"))) == 2
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    refused = start(tmp_path, *given, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", **own)
    assert refused.wait(200) == 1 and "use trainer=ddp_spawn" in (tmp_path / "output.txt").read_text()


@pytest.mark.stress
def test_sweeps_side_by_side(tmp_path, weights):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    given = ["float_epochs=0", "epochs=1", f"model.weights={weights}", "select.budget=6x,8x"]
    done = start(tmp_path, *given, "launcher=joblib", HAWQ_LIGHTNING_CACHE=str(tmp_path / "cache"))
    assert done.wait(400) == 0, (tmp_path / "output.txt").read_text()
    assert len(list((tmp_path / "runs").rglob("metrics.json"))) == 2
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
