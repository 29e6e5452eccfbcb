"""The console scripts: a whole run, analysis without training, and errors of one line."""

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException

from hawq_lightning import HawqError, Plan, Sensitivity, load_packed, sites
from hawq_lightning.cli import (
    budget_ranges,
    check_choices,
    dry_run,
    estimate_seconds,
    explain,
    frontier_rows,
    make_data,
    make_task,
    run,
    show_frontier,
    show_outlook,
    size_lines,
)
from hawq_lightning.models import resnet20
from hawq_lightning.report import write_report
from hawq_lightning.selection import cost_rows, nominal_problem
from tests.console import shell
from tests.internals import internal

BIN = Path(sys.executable).parent
FAST = [
    "float_epochs=3", "epochs=2", "model.depth=8", "model.channels=8", "measure.images=64", "measure.rtol=0.3",
    "measure.forecast=null",
    "callbacks=none", "logger=none", "trainer=cpu",
]  # fmt: skip
FILES = {"plan.json", "sensitivity.json", "frontier.csv", "metrics.json", "report.html", "model.safetensors"}


def settings(folder, *overrides, name="train"):
    GlobalHydra.instance().clear()
    with initialize_config_module("hawq_lightning.conf", version_base="1.3"):
        return compose(name, [*FAST, f"paths.output_dir={folder}", *overrides])


def script(name, *arguments, cwd, **environment):
    """In a new Python."""
    return subprocess.run(
        [BIN / name, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(settings(folder))


def test_a_run_leaves_everything_in_its_folder(finished):
    folder, record = finished
    assert {p.name for p in folder.iterdir()} >= FILES
    assert json.loads((folder / "metrics.json").read_text()) == record
    plan = Plan.load(folder / "plan.json")
    assert len({s.bits for s in plan.weights}) >= 2
    assert plan.costs["float_weight_bytes"] / plan.costs["weight_bytes"] >= 8
    assert {s.name for s in plan.sites} <= {r.name for r in Sensitivity.load(folder / "sensitivity.json")}
    with (folder / "loss_check.csv").open() as file:
        assert len(list(csv.DictReader(file))) >= 3 * len(plan.weights)


def test_the_record_tells_scores_sizes_and_seconds(finished):
    folder, record = finished
    assert set(record["accuracy"]) == set(record["loss"]) == {"float", "quantized", "fine_tuned"}
    assert record["accuracy"]["float"] > 0.5 and record["accuracy"]["fine_tuned"] > 0.5
    assert record["loss"]["float"] != record["loss"]["quantized"] != record["loss"]["fine_tuned"]
    size = (folder / "model.safetensors").stat().st_size
    assert record["sizes"]["file_bytes"] == size == record["costs"]["file_bytes"]
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    assert record["history"][-1]["val_acc"] == record["accuracy"]["fine_tuned"]
    assert {"float_training", "traces_and_plan", "fine_tuning", "total"} <= set(record["seconds"])
    assert record["seed"] == 1 and record["bops"] > 0


def test_the_packed_file_scores_what_the_run_reports(finished, tmp_path):
    folder, record = finished
    cfg = settings(tmp_path)
    data, task = make_data(cfg), make_task(cfg)
    load_packed(folder / "model.safetensors", task).eval()
    data.setup()
    with torch.no_grad():
        right = sum(int((task(x).argmax(1) == y).sum()) for x, y in data.val_dataloader())
    assert right / 540 == pytest.approx(record["accuracy"]["fine_tuned"], abs=1e-6)


def test_the_same_seed_gives_the_same_run(finished, tmp_path):
    folder, record = finished
    again = run(settings(tmp_path, "report=false"))
    assert Plan.load(tmp_path / "plan.json").bits == Plan.load(folder / "plan.json").bits
    assert again["accuracy"] == record["accuracy"] and again["loss"] == record["loss"]
    assert not (tmp_path / "report.html").exists()


def test_analysis_trains_nothing(tmp_path, capsys):
    cfg = settings(tmp_path)
    weights = make_task(cfg).net
    torch.save(weights.state_dict(), tmp_path / "weights.pt")
    folder = tmp_path / "run"
    record = run(
        settings(
            folder,
            "float_epochs=0",
            f"model.weights={tmp_path / 'weights.pt'}",
            "epochs=0",
            "measure.forecast=fast",
            name="analyze",
        )
    )
    assert {p.name for p in folder.iterdir()} >= FILES
    assert set(record["accuracy"]) == {"float", "quantized"} and record["history"] == []
    task = make_task(cfg)
    load_packed(folder / "model.safetensors", task)
    norm = task.net.bn1.running_mean
    assert torch.equal(norm, weights.bn1.running_mean)
    points = frontier_rows(folder)
    assert 3 <= len(points) <= 13 and sum(bool(p["chosen"]) for p in points) == 1
    assert all(a["cost"] < b["cost"] and a["omega"] > b["omega"] for a, b in itertools.pairwise(points))
    chosen = next(p for p in points if p["chosen"])
    assert chosen["cost"] == Plan.load(folder / "plan.json").costs["weight_bytes"]
    capsys.readouterr()
    show_frontier(folder)
    assert "chosen" in capsys.readouterr().out
    line = next(line for line in size_lines(folder) if line.startswith("8x: "))
    assert re.fullmatch(r"8x: KL [\d.e-]+, [\d.]+% of the predictions unchanged; with BatchNorm .*unchanged", line)
    show_outlook(folder)
    assert "before any fine-tuning" in (said := capsys.readouterr().out) and "10 plans measured on" in said, said
    assert (folder / "figures" / "outlook.csv").is_file() and "right after quantizing: KL" in (
        (folder / "report.html").read_text(encoding="utf-8")
    )
    (folder / "forecast.json").write_text("{}")
    page = write_report(folder).read_text(encoding="utf-8")
    assert 'id="outlook"' in page  # the frontier has its columns


def test_given_plans_and_traces_are_not_measured_again(finished, tmp_path):
    folder, _ = finished
    record = run(settings(tmp_path / "a", f"hawq.plan={folder / 'plan.json'}", "report=false"))
    assert not (tmp_path / "a" / "sensitivity.json").exists() and record["accuracy"]["fine_tuned"] > 0.5
    assert Plan.load(tmp_path / "a" / "plan.json").bits == Plan.load(folder / "plan.json").bits
    run(settings(tmp_path / "b", f"hawq.sensitivity={folder / 'sensitivity.json'}", "select.budget=5x", "report=false"))
    known, used = Sensitivity.load(folder / "sensitivity.json"), Sensitivity.load(tmp_path / "b" / "sensitivity.json")
    assert known.records == used.records
    assert Plan.load(tmp_path / "b" / "plan.json").costs["w_comp"] < 8


def test_fine_tuning_goes_on_from_a_checkpoint(tmp_path):
    steady = ["task.schedule=none", "callbacks=default", "~callbacks.progress", "report=false"]
    run(settings(tmp_path / "a", *steady))
    last = tmp_path / "a" / "checkpoints" / "fine_tuning" / "last.ckpt"
    record = run(settings(tmp_path / "b", *steady, "epochs=3", f"ckpt_path={last}"))
    assert [row["epoch"] for row in record["history"]] == [3]
    assert "float" not in record["accuracy"] and not (tmp_path / "b" / "sensitivity.json").exists()
    assert Plan.load(tmp_path / "b" / "plan.json").bits == Plan.load(tmp_path / "a" / "plan.json").bits


def test_quantizing_may_start_inside_the_fit(tmp_path):
    late = ["float_epochs=0", "hawq.start_epoch=2", "epochs=3", "task.lr=0.1", "report=false"]
    record = run(settings(tmp_path / "a", *late))
    assert set(record["accuracy"]) == {"float", "fine_tuned"} and len(record["history"]) == 3
    assert len({s.bits for s in Plan.load(tmp_path / "a" / "plan.json").weights}) >= 2
    with pytest.raises(HawqError, match="start_epoch=3 leaves none"):
        run(settings(tmp_path / "b", *late, "hawq.start_epoch=3"))


def test_dry_run_shows_sites_budgets_and_time_and_writes_nothing(tmp_path, capsys):
    dry_run(settings(tmp_path / "run", name="analyze"))
    shown = capsys.readouterr().out
    assert all(w in shown for w in ("net.layer3.0.conv1.weight", "= 16x to ", "= 4x", "traces: about"))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_measures_as_the_run_will(tmp_path, monkeypatch):
    module, configs = internal("cli._dry_run"), []
    measured = module.measure
    monkeypatch.setattr(module, "measure", lambda *a, **k: configs.append(k["config"]) or measured(*a, **k))
    dry_run(
        settings(tmp_path / "run", "measure.sampling=all", "measure.estimator=ggn", "measure.seed=3", name="analyze")
    )
    (config,) = configs
    assert (config.sampling, config.estimator, config.seed) == ("all", "ggn", 3)


def test_dry_run_script_leaves_no_folder(tmp_path):
    done = shell("hawq-lightning-analyze", "dry_run=true", "model.depth=8", "measure.rtol=0.3", cwd=tmp_path)
    assert done.returncode == 0 and "weight_bytes:" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_budget_ranges_follow_widths_and_constraints():
    net = resnet20(channels=4, depth=8)
    table = sites(net, torch.randn(1, 3, 8, 8))
    given = {"weight_bits": (2, 8), "activation_bits": (4, 8), "inputs": ("conv1.input",), "file_overhead": 100}
    lines = dict(line.split(": ", 1) for line in budget_ranges(nominal_problem(table, **given)))
    assert list(lines) == ["weight_bytes", "file_bytes", "bops", "act_bytes", "energy_pj"]
    assert lines["weight_bytes"].endswith("= 4x") and "= 16x to " in lines["weight_bytes"]
    assert "= 8x" not in lines["act_bytes"]  # what the network itself reads has 8 bits
    lines = dict(line.split(": ", 1) for line in budget_ranges(nominal_problem(table, **given, min_bits=8)))
    assert lines["weight_bytes"].endswith("= 4x") and " to " not in lines["weight_bytes"]


def test_codebooks_count_in_the_range_of_files():
    table = sites(resnet20(channels=4, depth=8), torch.randn(1, 3, 8, 8))
    asked = {"weight_bits": (2,), "activation_bits": None}
    problems = (nominal_problem(table, **asked, quantizer=q) for q in ("uniform", "lq_nets"))
    plain, books = (cost_rows(p, "file_bytes")[0] for p in problems)
    choice = [0] * len(table.weights)
    # two basis values a channel in the place of one scale
    assert books(choice) - plain(choice) == sum(4 * s.channels * (2 - 1) for s in table.weights)


def test_what_no_plan_meets_is_told_before_the_float_training(tmp_path):
    with pytest.raises(HawqError, match="90x"):
        run(settings(tmp_path, "float_epochs=1", "select.budget=90x"))
    assert not (tmp_path / "checkpoints").exists()


def test_time_estimate_grows_with_images_and_precision(finished):
    trial = Sensitivity.load(finished[0] / "sensitivity.json")
    one = estimate_seconds(trial, 2.0, 1000, 0.001)
    assert estimate_seconds(trial, 2.0, 1000, 0.0001) == pytest.approx(100 * one)
    assert estimate_seconds(trial, 2.0, 2000, 0.001) == pytest.approx(one)  # more images, as many fewer probes
    assert estimate_seconds(trial, 2.0, 64, 5.0) == pytest.approx(2.0)


@pytest.mark.parametrize(("override", "words"), [
    ("select.budget=90x", "90x"),
    ("select.budget=8q", "8q"),
    ("select.selector=parto", "pareto"),
    ("quantizer.weight_bits=[2,9]", "9"),
    ("measure.estimator=gnn", "ggn"),
    ("quantizer.exclude=[net.layr1*]", "net.layr1"),
    ("hawq.plan=/nowhere/plan.json", "/nowhere/plan.json"),
    ("model.weights=/nowhere/w.pt", "/nowhere/w.pt"),
    ("task.schedule=cosin", "cosine"),
    ("data.shift=7", "shift=7"),
    ("epochs=-1", "epochs"),
    ("seed=-3", "seed"),
])  # fmt: skip
def test_bad_settings_are_one_clear_error(tmp_path, override, words):
    with pytest.raises((HawqError, InstantiationException)) as caught:
        run(settings(tmp_path, "float_epochs=0", override))
    text = explain(caught.value)
    assert text is not None and words in text and "\n" not in text


def test_unknown_options_suggest_the_nearest():
    with pytest.raises(HawqError, match="no experiment=resnet20_cifar.*Did you mean 'resnet20_cifar10'"):
        check_choices(["seed=1", "experiment=resnet20_cifar"])
    with pytest.raises(HawqError, match="no trainer=dpd"):
        check_choices(["trainer=cpu,dpd"])
    check_choices(["experiment=resnet20_cifar10", "model.weights=/x", "trainer=cpu,ddp", "+debug=fast", "seed=1,2"])
    check_choices(["experiment=mine", "--config-dir=/my/conf"])


def test_errors_of_data_workers_are_one_sentence():
    inside = "Caught HawqError in DataLoader worker 0.\nTraceback ...\nhawq.HawqError: The image a.png cannot be read."
    assert explain(HawqError(inside)) == "The image a.png cannot be read."
    assert explain(ZeroDivisionError("x")) is None


def test_script_runs_and_saves_its_config_unresolved(tmp_path):
    done = script(
        "hawq-lightning",
        *FAST,
        "debug=fast",
        "+token=${oc.env:HAWQ_TEST_TOKEN}",
        cwd=tmp_path,
        HAWQ_TEST_TOKEN="s3cr3t",
    )
    assert done.returncode == 0, done.stderr
    assert "fine-tuned" in done.stdout and "run folder:" in done.stdout
    (folder,) = (tmp_path / "runs" / "debug").iterdir()
    assert {p.name for p in folder.iterdir()} >= FILES
    assert "${oc.env:HAWQ_TEST_TOKEN}" in (folder / ".hydra" / "config.yaml").read_text()
    texts = [p.read_bytes() for p in folder.rglob("*") if p.is_file()]
    assert not any(b"s3cr3t" in text for text in texts)


def test_script_errors_are_one_line_without_traceback(tmp_path):
    for arguments, words in (
        (["experiment=digit"], "Did you mean 'digits'"),
        (["data=image_folder", "data.root=/nowhere", *FAST], "No image folder at /nowhere"),
        (["data=image_folder", *FAST], "data.root is not set"),
    ):
        done = shell("hawq-lightning", *arguments, cwd=tmp_path)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith("error: ") and words in last
        assert "Traceback" not in done.stderr


def test_help_is_worth_reading(tmp_path):
    shown = shell("hawq-lightning", "--help", cwd=tmp_path).stdout
    for words in ("hawq-lightning-analyze", "select.budget=12x", "experiment: ", "resnet20_cifar10", "report.html"):
        assert words in shown
