"""hawq-lightning-collect: tables and picture of many runs, whatever their names hold."""

import csv
import json
import math
import re

import pytest
import yaml

from hawq_lightning import HawqError
from hawq_lightning.cli import collect_main as main
from hawq_lightning.report import collect, csv_text, mean_table, read_sweep
from tests.app import chromium

EVIL = '<script>alert("1")</script>'
FORMULA = '=HYPERLINK("http://a.example","b")'


def write_run(folder, score, *, seed=1, weight_bytes=1000, name="net", overrides=(), **more):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("{}")
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([*overrides, f"seed={seed}"]))
    record = {
        "name": name, "seed": seed, "accuracy": {"float": 0.9, "quantized": score - 0.1, "fine_tuned": score},
        "sizes": {"weight_bytes": weight_bytes, "file_bytes": weight_bytes + 100},
        "costs": {"w_comp": 8000 / weight_bytes, "bops": 1e6}, "seconds": {"total": 3.0},
    } | more  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(record))


@pytest.fixture
def sweep(tmp_path):
    for seed, low, high in ((1, 0.80, 0.88), (2, 0.84, 0.90), (10, 0.82, 0.89)):
        for selector, shift in (("a", 0.0), ("b", -0.2)):
            options = [f"+rule={selector}"]
            write_run(tmp_path / f"{selector}/small-{seed}", low + shift, seed=seed, overrides=options)
            write_run(
                tmp_path / f"{selector}/large-{seed}", high + shift, seed=seed, weight_bytes=2000, overrides=options
            )
    return tmp_path


def test_a_row_a_run_and_the_mean_over_seeds(sweep):
    found = collect(sweep)
    assert found.varied == ["rule"] and len(found.rows) == 12 and not found.left_out
    # without a plan.json there is no budget, and sizes share a setting: seeds come in numerical order
    assert [r.seed for r in found.rows[:2]] == ["1", "1"] and found.rows[-1].seed == "10"
    with (sweep / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {r["rule"] for r in rows} == {"a", "b"}
    assert {float(r["fine_tuned"]) for r in rows if r["rule"] == "a"} == {0.80, 0.84, 0.82, 0.88, 0.90, 0.89}
    columns, means = mean_table(found)
    by_rule = {m[columns.index("also")]: m for m in means}
    scores = [0.80, 0.84, 0.82, 0.88, 0.90, 0.89]
    mean = sum(scores) / 6
    spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / 5)
    assert by_rule["rule=a"][columns.index("after fine-tuning")] == f"{100 * mean:.2f}% ± {100 * spread:.2f}"
    assert by_rule["rule=b"][columns.index("seeds")] == "6"
    assert (sweep / "sweep.md").read_text().count("| net |") == 14


def test_page_and_picture(sweep):
    collect(sweep)
    page = (sweep / "sweep.html").read_text()
    assert page.count("<circle cx=") == 12 and "rule=b" in page and "http://" not in page.replace("http://www.w3", "")
    assert (sweep / "figures" / "accuracy_size.png").read_bytes()[:4] == b"\x89PNG"
    again = page
    collect(sweep)  # its own files are no runs
    assert (sweep / "sweep.html").read_text() == again


def test_markup_and_formulas_stay_text(tmp_path):
    write_run(tmp_path / "one", 0.8, name=EVIL, overrides=["data.root=" + FORMULA])
    write_run(tmp_path / "two", 0.7, name=FORMULA, overrides=[f"data.root={EVIL}"], seed="-2+3")
    collect(tmp_path)
    page, card = (tmp_path / "sweep.html").read_text(), (tmp_path / "sweep.md").read_text()
    assert "alert" in page and "<script>alert" not in page and "<script>alert" not in card
    for path in (tmp_path / "sweep.csv", tmp_path / "figures" / "accuracy_size.csv"):
        with path.open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert any(cell == "'" + FORMULA for cell in cells) and "'-2+3" in cells
        assert not any(cell.startswith(("=", "+", "@")) for cell in cells)


def test_numbers_in_csv_stay_numbers():
    text = csv_text(["a", "@b"], [[-1.5, "-1.5"], ["+3e4", " =1+1"], ["\t=1", "-x"]])
    assert text.splitlines() == ["a,'@b", "-1.5,-1.5", "+3e4,' =1+1", "'\t=1,'-x"]


def test_unfinished_and_damaged_runs_are_named(tmp_path):
    write_run(tmp_path / "good", 0.8)
    write_run(tmp_path / "cut", 0.8)
    (tmp_path / "cut" / "metrics.json").write_text('{"name": "x", "accu')
    write_run(tmp_path / "scoreless", 0.8, accuracy={"float": float("nan")})
    write_run(tmp_path / "other", 0.8)
    (tmp_path / "other" / "metrics.json").unlink()
    found = collect(tmp_path, tmp_path / "out")
    assert [r.name for r in found.rows] == ["good"] and set(found.left_out) == {"cut", "scoreless", "other"}
    assert "corrupt" in found.left_out["cut"] and "not finished" in found.left_out["other"]
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "scoreless" in page and not (tmp_path / "sweep.html").exists()


def test_columns_that_say_nothing_are_not_on_the_page(sweep):
    collect(sweep)
    page = (sweep / "sweep.html").read_text()
    assert '<th scope="col">rule</th>' in page and '<th scope="col">selector</th>' not in page


def test_nothing_to_collect_is_one_sentence(tmp_path, capsys):
    for folder, words in ((tmp_path / "nowhere", "There is no folder"), (tmp_path, "no finished run below")):
        with pytest.raises(HawqError, match=words):
            read_sweep(folder)
        with pytest.raises(SystemExit):
            main([str(folder)])
        assert capsys.readouterr().err.startswith("error: There is no")


def test_the_script_shows_the_means(sweep, capsys):
    main([str(sweep)])
    shown = capsys.readouterr().out
    assert "12 finished runs of 2 settings, 3 seeds." in shown and "sweep.csv" in shown


def test_runs_without_fine_tuning_or_sizes(tmp_path):
    write_run(tmp_path / "a", 0.5, accuracy={"float": 0.9, "quantized": 0.4}, sizes={}, costs={})
    found = collect(tmp_path)
    assert found.rows[0].score == 0.4 and "<svg" not in (tmp_path / "sweep.html").read_text()


@chromium.needed
def test_chromium_opens_the_page_without_a_complaint(sweep, tmp_path_factory):
    collect(sweep)
    script = """
      const circle = document.querySelector("svg.plot circle.tip"), box = circle.getBoundingClientRect();
      const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
      document.title = hit.querySelector("title").textContent.split("\\n")[0]
        + "|" + performance.getEntriesByType("resource").length;
    """
    complaints, page = chromium.opened((sweep / "sweep.html").read_text(), script, tmp_path_factory.mktemp("browser"))
    assert not complaints
    assert re.search(r"<title>plan, rule=[ab]\|0</title>", page)
