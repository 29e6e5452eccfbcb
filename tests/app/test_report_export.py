"""What the report says about the ONNX file and the loss landscape, when the folder has them."""

import csv
import json
from pathlib import Path

import pytest

from hawq_lightning.report import (
    doubts,
    draw_all,
    draw_landscapes,
    model_card,
    read_run,
    sentences,
    settings,
    speed_note,
    speed_rows,
    write_report,
)
from tests.app.test_report import Page, fill

SPEED = {"file_bytes": 2048, "gzip_bytes": 1024, "ms": 0.5, "images_per_second": 3000.0, "peak_bytes": 3 << 20}


def exported(folder: Path, **changes: object) -> None:
    others = [{"image": 3, "margin": 0.01, "difference": 0.1}, {"image": 9, "margin": 0.1, "difference": 0.1}]
    agreement = {
        "images": 1000, "same_top1": 998, "largest_difference": 0.125, "flipped_codes": 30, "codes": 10_000,
        "disagreements": others,
    }  # fmt: skip
    record = {
        "onnx_bytes": 2048, "folded": 7, "not_folded": {"bn9": "something else reads it"}, "agreement": agreement,
        "speed": {"float": SPEED, "plan": SPEED | {"ms": 1.0}},
        "speed_settings": {"onnxruntime": "1.32.0", "threads": 1, "batch_size": 32},
    }  # fmt: skip
    (folder / "export.json").write_text(json.dumps(record | changes))


def test_page_and_card_tell_about_the_onnx_file(tmp_path):
    fill(tmp_path)
    exported(tmp_path)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    card = model_card(tmp_path).read_text(encoding="utf-8")
    for text in (page.text, card.replace("\\", "")):
        assert "2.0 KiB (2,048 bytes)" in text and "7 BatchNorms" in text and "bn9: something else reads it" in text
        assert "998 of 1,000 images (99.80%); on all of the other 2" in text and "at most 0.12" in text
        assert "30 of 10,000 activation codes flipped (0.30%)" in text
        assert "the float network's, on this CPU: model.onnx 0.50 times." in text and "1.32.0" in text
        assert "0.5 ms" in text and "3,000" in text and "3.0 MiB" in text
    assert "| plan | 2.0 KiB | 1.0 KiB | 1 ms | 3,000 | 3.0 MiB |" in card
    assert not any("model.onnx" in d for d in doubts(read_run(tmp_path)))


def test_the_score_of_a_detectors_file_stands_beside_the_networks(tmp_path):
    fill(tmp_path)
    exported(tmp_path, map={"images": 87, "network": 0.4912, "onnx": 0.48937})
    assert "mAP on 87 images: 0.4894 by onnxruntime, 0.4912 by the network." in sentences(read_run(tmp_path))


def test_a_file_that_disagrees_is_a_doubt(tmp_path):
    fill(tmp_path)
    exported(tmp_path, agreement={"images": 10, "same_top1": 8, "disagreements": [{"margin": 3.0, "difference": 1.0}]})
    said = doubts(read_run(tmp_path))
    assert any("another class on 2 of 10 images" in s for s in said)
    assert any("1 of them had a margin wider" in s for s in said)


@pytest.mark.parametrize(
    "changes",
    [
        {"onnx_bytes": None},
        {"agreement": 3, "speed": [1], "speed_settings": None, "folded": "x"},
        {
            "agreement": {"images": 0, "disagreements": [5, {"margin": "a"}]},
            "speed": {"plan": {"ms": None}, "float": 1},
        },
    ],
)
def test_odd_records_do_not_stop_the_report(tmp_path, changes):
    fill(tmp_path)
    exported(tmp_path, **changes)
    run = read_run(tmp_path)
    assert speed_note(run) == "" or run.export["speed"]["float"] == SPEED
    assert len(sentences(run)) <= 6 and (speed_rows(run) == [] or "onnx_bytes" in changes)
    write_report(tmp_path)
    model_card(tmp_path)


def test_sites_whose_traces_were_lifted_are_doubts_and_no_setting(tmp_path):
    plan = fill(tmp_path)
    lifted = [f"site{i}: trace 0 is not significantly positive." for i in range(9)]
    plan.replace(settings={**plan.settings, "lifted": lifted}).save(tmp_path / "plan.json")
    run = read_run(tmp_path)
    said = doubts(run)
    assert lifted[5] in said and lifted[6] not in said and any("3 more sites" in s for s in said)
    assert not any("any width looks free" in s for s in said)
    assert "lifted" not in settings(run) and settings(run)["images"] == "64"


def test_landscapes_that_were_computed_are_on_the_page(tmp_path):
    fill(tmp_path)
    offsets = [-0.5, 0.0, 0.5]
    grids = {n: [[k * (a * a + 2 * b * b) for b in offsets] for a in offsets] for n, k in (("a.weight", 1), ("b", 3))}
    drawn = draw_landscapes(grids, offsets, {"a.weight": [4.0, 2.0], "b": [12.0, 6.0]})
    assert drawn is not None
    drawn.save(tmp_path / "figures")
    run = read_run(tmp_path)
    assert run.landscape is not None and run.landscape.grids == grids and run.landscape.offsets == offsets
    assert run.landscape.eigenvalues["b"] == (12.0, 6.0)
    drawings, absent = draw_all(run)
    assert [d.name for d in drawings][-1] == "landscape" and not absent
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert len(page.of("svg")) == 6 and "landscape.csv" in {a["download"] for a in page.of("a")}
    with (tmp_path / "figures" / "landscape.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 18
    (tmp_path / "figures" / "landscape.csv").write_text("site,first\na,x\n")
    assert "landscape.csv could not be read" in dict(draw_all(read_run(tmp_path))[1]).popitem()[1]
