"""The comparison: statistics against cases computed by hand, and a miniature sweep end to end."""

import json
import shutil
import tarfile
from pathlib import Path

import explain
import explain_page
import held_out
import jobs
import numpy as np
import pytest
import table
import torch
from average_precision import Matches
from bootstrap import bootstrap_mean, bootstrap_score
from comparison_page import write_comparison
from design import ExperimentDesign
from per_image import read_per_image
from sweep import work

from hawq_lightning import HawqError
from hawq_lightning.cli import keep_per_image

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "compare"


def test_bootstrap_of_one_seed_has_the_standard_error_of_a_mean():
    correct = (np.arange(2500) % 5 != 0).astype(float)[None]  # 80%
    found = bootstrap_mean(correct)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 2500)
    assert found.value == pytest.approx(0.8)
    assert found.low == pytest.approx(0.8 - half, abs=0.1 * half)
    assert found.high == pytest.approx(0.8 + half, abs=0.1 * half)


def test_bootstrap_over_two_seeds_that_differ_by_a_constant():
    # no image differs: what is left is which seeds are drawn, (1, 1), (1, 2), (2, 2) with chances 1/4, 1/2, 1/4
    table = np.stack([np.full(50, 0.1), np.full(50, 0.3)])
    found = bootstrap_mean(table, level=0.4)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    found = bootstrap_mean(table, level=0.9)
    assert (found.low, found.high) == pytest.approx((0.1, 0.3)) and found.excludes_zero


def test_pairs_see_what_two_intervals_do_not():
    rng = np.random.default_rng(0)
    a = (rng.random((1, 5000)) < 0.8).astype(float)
    b = a.copy()
    b[0, np.flatnonzero(a[0])[:50]] = 0  # 1 point worse, always on images that a gets right
    each, both = bootstrap_mean(a), bootstrap_mean(a - b)
    assert each.high - each.low > 0.02 and both.excludes_zero
    assert both.value == pytest.approx(0.01) and both.high - both.low < 0.006


def test_an_empty_table_is_refused():
    with pytest.raises(HawqError, match=r"seeds and images.*\(0, 5\)"):
        bootstrap_mean(np.zeros((0, 5)))


def detections(image, label, score, matched, objects):
    flags = np.asarray(matched, dtype=np.int8).reshape(-1, 1)
    return Matches({"image": np.asarray(image), "label": np.asarray(label), "score": np.asarray(score),
                    "matched": flags, "objects": np.asarray(objects)})  # fmt: skip


def test_average_precision_by_hand():
    # scores .9 hit, .8 miss, .7 hit; two objects: precision 1 up to recall 1/2 (51 of 101 points), then 2/3
    found = detections([0, 0, 1], [0, 0, 0], [0.9, 0.8, 0.7], [1, 0, 1], [[1], [1]])
    assert found.mean_average_precision(np.ones(2)) == pytest.approx((51 + 50 * 2 / 3) / 101)
    # the first image twice: hits 2, misses 2, then hit: 3 objects
    assert found.mean_average_precision(np.array([2.0, 0.0])) == pytest.approx(1.0)
    assert found.mean_average_precision(np.array([0.0, 1.0])) == pytest.approx(1.0)
    # a detection in a crowd counts neither way; a class without objects is left out
    crowd = detections([0, 0], [0, 0], [0.9, 0.8], [-1, 1], [[1, 0]])
    assert crowd.mean_average_precision(np.ones(1)) == pytest.approx(1.0)
    nothing = detections([0], [1], [0.9], [0], [[2, 0]])
    assert nothing.mean_average_precision(np.ones(1)) == 0.0


def test_a_score_of_weighted_images_is_bootstrapped():
    found = bootstrap_score(lambda w: float(w @ np.arange(10.0) / 10), 10, draws=4000)
    spread = np.arange(10.0).std() / np.sqrt(10)
    assert found.value == pytest.approx(4.5)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_matches_give_the_map_of_torchmetrics():
    pytest.importorskip("faster_coco_eval")
    from torchmetrics.detection import MeanAveragePrecision

    from hawq_lightning.tasks import join, match_image, objects_of

    torch.manual_seed(0)
    metric, pairs = MeanAveragePrecision(backend="faster_coco_eval"), []
    for image in range(12):
        corner = 80 * torch.rand(6, 2)
        boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(6, 2)], 1)
        crowd = torch.tensor([0, 0, 0, 0, 0, image % 2])
        wanted = {"boxes": boxes, "labels": torch.tensor([0, 1, 2, 0, 1, 0]), "iscrowd": crowd}
        moved = torch.cat([boxes + 3 * torch.randn(6, 4), boxes[:3] + 8 * torch.randn(3, 4)])
        labels = torch.cat([wanted["labels"], torch.tensor([0, 2, 1])])
        kept = (moved[:, 2:] > moved[:, :2] + 1).all(1)
        found = {"boxes": moved[kept], "labels": labels[kept], "scores": torch.rand(9)[kept]}
        metric.update([found], [wanted])
        pairs.append((match_image(found, wanted), objects_of(wanted)))
    table = {k: v.numpy() for k, v in join(*zip(*pairs)).items()}
    expected = float(metric.compute()["map"])
    assert 0.2 < expected < 0.8
    assert Matches(table).mean_average_precision(np.ones(12)) == pytest.approx(expected, abs=1e-6)


def test_what_every_image_gave_is_kept_by_stage(tmp_path):
    correct = np.random.default_rng(0).random(1001) < 0.5
    keep_per_image(tmp_path, "quantized", {"correct": correct})
    keep_per_image(tmp_path, "fine_tuned", {"correct": ~correct, "score": np.arange(3.0)})
    keep_per_image(tmp_path, "fine_tuned", {"correct": correct[:7]})
    assert np.array_equal(read_per_image(tmp_path, "quantized")["correct"], correct)
    assert np.array_equal(read_per_image(tmp_path, "fine_tuned")["correct"], correct[:7])
    assert set(read_per_image(tmp_path, "fine_tuned")) == {"correct"} and read_per_image(tmp_path, "float") == {}
    (tmp_path / "per_image.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(HawqError, match="is damaged"):
        read_per_image(tmp_path, "quantized")


DESIGN = """
common: ["model.weights=${{WEIGHTS}}", model.depth=8, model.channels=4, data.subset=200, measure.images=32,
         measure.rtol=0.5, trainer=cpu, ~callbacks.progress, logger=none, measure.loss_per_site=false,
         measure.forecast=null, report=false,
         float_epochs=0, "quantizer.weight_bits=[2,4]"]
baseline: [epochs=0, float_validation=true, trainer.num_sanity_val_steps=0]
plan: [epochs=0, float_validation=false, trainer.num_sanity_val_steps=0, trainer.limit_val_batches=0]
batchnorm: 128
train: [epochs=1, float_validation=false]
tuning: {{setting: small, overrides: [trainer.num_sanity_val_steps=0], grid: {{task.lr: [0.001, 0.02]}}}}
seeds: [1]
reference: trace
settings:
  small: {{label: mean 3 bits, overrides: [select.budget=3bit], methods: [trace, {method}, twin]}}
methods:
  trace: {{label: Trace, overrides: [select=pareto]}}
  l2: {{label: L2, overrides: [select=l2]}}
  twin: {{label: Twin, overrides: [select=pareto, select.budget=3.01bit]}}
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    from hawq_lightning.models import resnet20

    torch.manual_seed(0)
    torch.save(resnet20(in_channels=1, channels=4, depth=8).state_dict(), folder / "float.pt")
    (folder / "design.yaml").write_text(DESIGN.format(method="l2"))
    design = ExperimentDesign(folder / "design.yaml", folder / "out", {"WEIGHTS": str(folder / "float.pt")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "call", in_this_process)
        assert work(design)
    return design, folder


def in_this_process(job):
    """Without the fork, which torch's threads of other tests would not survive."""
    jobs.start(job)
    return 0


@pytest.mark.stress
def test_a_miniature_sweep_is_tuned_finished_and_not_repeated(sweep, monkeypatch):
    design, _ = sweep
    job = design.run("small", "l2", 1)
    tried = {p["task.lr"]: j for p, j in design.tuning("l2")}
    scores = {
        lr: json.loads((j.folder / "metrics.json").read_text())["accuracy"]["fine_tuned"] for lr, j in tried.items()
    }
    best = max(scores, key=scores.get)
    assert job.done and job.facts["tuned"] == {"task.lr": best} and f"task.lr={best}" in job.overrides
    assert all(("seed=1" in j.overrides) and j.done for j in tried.values())

    def refuse(job):
        raise AssertionError(f"{job.folder} was started again")

    monkeypatch.setattr(jobs, "call", refuse)
    assert work(design)
    # what another process has is waited for, not done twice
    fresh = jobs.Job(design.out / "elsewhere", ())
    with jobs.claimed(fresh, design.out / "locks") as mine:
        assert mine and jobs.carry_out(fresh, design.out / "locks") == "busy"


@pytest.mark.stress
def test_results_are_known_again_elsewhere(sweep, tmp_path):
    design, folder = sweep
    table.keep(design.out, tmp_path / "runs.tar.xz")
    with tarfile.open(tmp_path / "runs.tar.xz") as archive:
        assert not any(str(folder).encode() in archive.extractfile(m).read() for m in archive.getmembers())
        archive.extractall(tmp_path / "moved", filter="data")
    shutil.copy(folder / "float.pt", tmp_path / "weights.pt")
    again = ExperimentDesign(folder / "design.yaml", tmp_path / "moved", {"WEIGHTS": str(tmp_path / "weights.pt")})
    found = [job for run in again.runs() for job in [*jobs.needs(again.run(*run)), again.run(*run)]]
    assert len(found) > 8 and all(job.done for job in found)
    known = json.loads((found[-1].folder / "job.json").read_text())["overrides"]
    assert "model.weights=${WEIGHTS}" in known and not any(str(folder) in o for o in known)
    other = ExperimentDesign(folder / "design.yaml", tmp_path / "moved", {"WEIGHTS": "x"}, ["seed=9"])
    assert not other.run("small", "l2", 1).done


def test_methods_that_chose_the_same_bits_share_a_run(sweep):
    from hawq_lightning import Plan

    design, _ = sweep
    ours, twin, other = (design.run("small", m, 1) for m in ("trace", "twin", "l2"))
    assert Plan.load(twin.file).bits == Plan.load(ours.file).bits and twin.same_as() == ours.same_as()
    assert "the same bits as" in (twin.folder / "log.txt").read_text() and not (twin.folder / "checkpoints").exists()
    assert (twin.folder / "metrics.json").read_text() == (ours.folder / "metrics.json").read_text()
    assert Plan.load(twin.file).budget == "3.01bit"
    assert Plan.load(other.file).bits != Plan.load(ours.file).bits and other.same_as() != ours.same_as()
    assert design.run("small", "trace", 2).same_as() != ours.same_as()


def test_what_a_prediction_is_worth_is_measured_once(sweep, monkeypatch):
    _, folder = sweep
    arguments = [str(folder / "design.yaml"), str(folder / "out"), f"WEIGHTS={folder / 'float.pt'}", "--settings=small",
                 "--plans=3", "--steps=2", "--images=64", "--seeds=2", "--curve=l2", "--whole=6"]  # fmt: skip
    monkeypatch.setattr(explain, "MARKS", (0, 5))
    explain.main(arguments)
    found = json.loads((folder / "out" / "explain.json").read_text())
    drawn = [v for k, v in found.items() if k.startswith("small/plan/random")]
    assert len(drawn) == 3 and {"small/seed/2", "small/seed/3", "small/plan/l2", "small/alone"} <= set(found)
    assert all(set(explain_page.STAGES) <= set(row) for row in drawn)
    assert [p["step"] for p in found["small/curve/l2"]] == [0, 5, 6]
    assert found["small/curve/l2"][0]["loss"] == pytest.approx(found["small/plan/l2"]["quantized"]["loss"], rel=1e-5)
    text = (folder / "out" / "explain.md").read_text()
    assert "3 random plans" in text and "| Ω, mean trace" in text and "BatchNorm measured again" in text

    def refuse(*args):
        raise AssertionError("measured twice")

    for name in ("stages", "fine_tune", "one_by_one"):
        monkeypatch.setattr(held_out.HeldOut, name, refuse)
    explain.main(arguments)
    with pytest.raises(SystemExit, match="needs WEIGHTS="):
        explain.main(arguments[:2])


def test_restored_norms_are_those_of_the_float_weights(sweep):
    from hawq_lightning import Plan

    design, _ = sweep
    task = held_out.HeldOut(design, "small", 16)
    plan = Plan.load(design.plan("small", "trace", 1).file)
    plain, moved = task.network(), held_out.with_norms(task.network(plan))
    for name in (s.layers[0] for s in plan.weights):
        a, b = plain.get_submodule(name).weight.flatten(1), moved.get_submodule(name).weight.flatten(1)
        assert torch.allclose(a.norm(dim=1), b.norm(dim=1), rtol=1e-5) and not torch.equal(a, b)


def test_plans_come_from_one_measurement(sweep):
    from hawq_lightning import Plan

    design, _ = sweep
    ours, other = (Plan.load(design.plan("small", m, 1).folder / "plan.json") for m in ("trace", "l2"))
    assert (ours.selector, other.selector) == ("pareto", "l2")
    assert [s.options for s in ours.sites] == [s.options for s in other.sites]
    total = [sum(s.perturbation for s in p.weights) for p in (ours, other)]
    assert total[1] <= total[0] and ours.omega <= other.omega  # each is best by its own measure
    run = Plan.load(design.run("small", "l2", 1).folder / "plan.json")
    assert run.bits == other.bits


def test_the_table_says_what_the_runs_found(sweep, tmp_path):
    design, _ = sweep
    found = write_comparison(design.out, tmp_path, draws=200)
    rows = {r.first.method: r for r in found.rows["small"]}
    correct = {m: r.first.images["fine_tuned"]["correct"] for m, r in rows.items()}
    assert rows["trace"].against is None and rows["l2"].after.value == pytest.approx(correct["l2"].mean())
    assert rows["l2"].after.value == pytest.approx(rows["l2"].mean("after"), abs=1e-6)
    assert rows["l2"].against.value == pytest.approx(correct["l2"].mean() - correct["trace"].mean())
    text = (tmp_path / "compare.md").read_text()
    assert "## mean 3 bits" in text and "| L2 | 2 MP | 8 |" in text and "Table 3b" in text and "Table 3a" not in text
    assert f"Float network: {100 * found.float_score:.2f}%" in text
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 4
    assert (tmp_path / "figures" / "compare.png").stat().st_size > 10_000
    with pytest.raises(HawqError, match="no finished run"):
        write_comparison(tmp_path)


def test_plans_are_scored_without_training_and_with_batchnorm_measured_again(sweep, tmp_path):
    design, _ = sweep
    ours, twin = (design.untrained("small", m, 1) for m in ("trace", "twin"))
    assert ours.done and "the same bits as" in (twin.folder / "log.txt").read_text()
    assert design.untrained("small", "trace", 2).folder == ours.folder  # no seed in it
    run = design.run("small", "trace", 1)
    images = {stage: read_per_image(ours.folder, stage)["correct"] for stage in ("quantized", "batchnorm")}
    assert np.array_equal(images["quantized"], read_per_image(run.folder, "quantized")["correct"])
    assert not np.array_equal(images["quantized"], images["batchnorm"])
    found = write_comparison(design.out, tmp_path, draws=200)
    row = found.rows["small"][0]
    assert [p.label for p in found.pooled] == ["L2", "Twin"] and found.pooled[1].batchnorm.value == 0  # the same bits
    assert row.batchnorm.value == pytest.approx(images["batchnorm"].mean()) == row.mean("batchnorm")
    text = (tmp_path / "compare.md").read_text()
    assert "| before | BatchNorm | after |" in text
    assert (tmp_path / "runs.csv").read_text().startswith("setting,method,seed,tuned,before,batchnorm,after,")
    # the run's own score without training need not be there, and a sweep without this stage has no column for it
    shutil.copytree(design.out, tmp_path / "out")
    for folder in (tmp_path / "out" / "runs").rglob("seed=1"):
        record = json.loads((folder / "metrics.json").read_text())
        del record["accuracy"]["quantized"]
        (folder / "metrics.json").write_text(json.dumps(record))
    again = write_comparison(tmp_path / "out", tmp_path, draws=200)
    assert again.rows["small"][0].mean("before") == row.mean("before")
    shutil.rmtree(tmp_path / "out" / "untrained")
    write_comparison(tmp_path / "out", tmp_path, draws=200)
    assert "BatchNorm" not in (tmp_path / "compare.md").read_text()


def test_settings_are_pooled_where_both_methods_have_them(sweep, tmp_path):
    design, _ = sweep
    shutil.copytree(design.out / "runs" / "small", tmp_path / "runs" / "small")
    shutil.copytree(design.out / "runs" / "small", tmp_path / "runs" / "other")
    for path in (tmp_path / "runs" / "other").rglob("job.json"):
        path.write_text(path.read_text().replace('"setting": "small"', '"setting": "other"', 1))
    shutil.rmtree(tmp_path / "runs" / "other" / "twin")
    found = write_comparison(tmp_path, draws=200, title="Two of a kind")
    (pooled,) = found.pooled  # twin stands in one setting only
    assert (pooled.label, pooled.pairs) == ("L2", 2)
    assert pooled.after.value == pytest.approx(found.rows["small"][1].against.value)
    assert [rows[0].first.method for rows in found.rows.values()] == ["trace", "trace"]  # the reference first
    text = (tmp_path / "compare.md").read_text()
    assert text.startswith("# Two of a kind\n") and "## All settings together" in text and "| L2 | 2 |" in text


def test_mistakes_in_a_design_are_named(sweep, tmp_path):
    _, folder = sweep
    with pytest.raises(HawqError, match="needs WEIGHTS="):
        ExperimentDesign(folder / "design.yaml", tmp_path, {})
    (tmp_path / "wrong.yaml").write_text(DESIGN.format(method="l3"))
    with pytest.raises(HawqError, match="no method 'l3'.*l2"):
        ExperimentDesign(tmp_path / "wrong.yaml", tmp_path, {"WEIGHTS": "x"})


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar10_quantizers", "bccd", pytest.param("compact", marks=pytest.mark.stress)]
)
def test_the_designs_of_the_recipe_compose(name, tmp_path):
    given = {"DATA": "/data", "WEIGHTS": "/float.pt", "NETWORK": "mobilenet_cifar"}
    design = ExperimentDesign(RECIPE / f"{name}.yaml", tmp_path, given)
    runs = list(design.runs())
    found = [job for run in runs for job in [*jobs.needs(design.run(*run)), design.run(*run)]]
    assert len({j.folder for j in found}) == len({j.overrides for j in found}) > len(runs)
    seen = set()
    for setting, method, seed in runs:  # every setting and every method once
        if {setting, method} <= seen:
            continue
        seen |= {setting, method}
        cfg = jobs.composed(design.run(setting, method, seed).overrides)
        assert cfg.float_epochs == 0 and cfg.hawq.plan.endswith("plan.json")
