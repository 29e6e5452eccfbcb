"""The report and the model card: right numbers, nothing from outside, nothing unescaped, whatever the folder lacks."""

import ast
import csv
import html.parser
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import hawq_lightning
from hawq_lightning import Candidate, HawqError, Layer, Plan, PlanSite
from hawq_lightning.report import (
    LossCheck,
    canvas,
    doubts,
    draw_all,
    headline,
    log_scale,
    model_card,
    names,
    rank_correlations,
    read_run,
    size,
    size_rows,
    uniform_points,
    write_report,
)
from hawq_lightning.sensitivity import Sensitivity, SiteTrace
from tests.app import chromium

WIDTHS = (2, 4, 8)
NASTY = "a<b>&\"'$x_1$.weight"


def weight(name: str, numel: int, trace: float, bits: int) -> PlanSite:
    options = tuple(Candidate(b, "affine", trace * 4.0**-b, 4.0**-b * numel) for b in WIDTHS)
    chosen = next(o for o in options if o.bits == bits)
    layers = (name.removesuffix(".weight"),)
    return PlanSite(name, "weight", layers, (numel // 4, 4), numel, bits, "affine", omega=chosen.omega, options=options)


def fill(folder: Path, extra: str = "last.weight") -> Plan:
    """A run folder with everything in it. Omega of the activations adds 0.001 to every point of the frontier."""
    weights = [weight("conv1.weight", 400, 2.0, 8), weight("conv2.weight", 4000, 0.5, 4), weight(extra, 800, 0.01, 2)]
    reads = [
        PlanSite("conv1.input", "activation", ("conv1",), (3, 8, 8), 192, 8, "affine", 0.1, 3, omega=0.001),
    ]
    layers = tuple(
        Layer(s.layers[0], "Linear", s.name, "conv1.input" if i == 0 else None, 1000) for i, s in enumerate(weights)
    )
    plan = Plan(tuple(weights + reads), layers, budget="8x", settings={"images": 64})
    plan.save(folder / "plan.json")
    Sensitivity(
        (
            SiteTrace("conv1.weight", "weight", 20.0, 1.0, 2.0, 400, 0.05),
            SiteTrace("conv2.weight", "weight", 4.0, 3.0, 3.5, 4000, 0.001),
            SiteTrace(extra, "weight", 0.0, 0.0, 0.0, 800, 0.0),
            SiteTrace("conv1.input", "activation", 1.0, 0.1, 0.1, 192, 0.005),
        ),
        settings={"estimator": "ggn", "seconds": 1.25},
        notes=("The network looks <untrained>.",),
    ).save(folder / "sensitivity.json")
    rows = []
    for a in WIDTHS:
        for b in WIDTHS:
            for c in WIDTHS:
                picked = (a, b, c)
                omega = sum(next(o.omega for o in s.options if o.bits == k) for s, k in zip(weights, picked)) + 0.001
                rows.append((sum(s.numel * k for s, k in zip(weights, picked)) / 8, omega, picked))
    rows.sort()
    best, kept = float("inf"), []
    for cost, omega, picked in rows:
        if omega < best:
            kept.append((cost, omega, *picked, 8))
            best = omega
    with (folder / "frontier.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cost", "omega", *(s.name for s in weights), "conv1.input"])
        writer.writerows(kept)
    with (folder / "loss_check.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["site", "kind", "bits", "predicted", "measured"])
        for s in weights:
            for o in s.options:
                writer.writerow([s.name, "weight", o.bits, o.omega / 2, o.omega * 0.7 - (1e-6 if o.bits == 8 else 0)])
    metrics = {
        "accuracy": {"float": 0.98, "quantized": 0.91, "fine_tuned": 0.975},
        "sizes": {"float_bytes": 30000},
        "seconds": {"traces": 1.25},
        "seed": 7,
        "history": [{"epoch": 0, "val_acc": 0.95}, {"epoch": 1, "val_acc": 0.975}],
        "command": ["hawq-lightning", "select.budget=8x"],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return plan


class Page(html.parser.HTMLParser):
    """Tags, ids and links of a page; fails on tags that do not pair."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, str]:
    folder = tmp_path_factory.mktemp("run")
    plan = fill(folder)
    assert write_report(folder) == folder / "report.html"
    return folder, plan, (folder / "report.html").read_text(encoding="utf-8")


def test_every_figure_has_words_a_table_a_csv_and_a_png(full: tuple[Path, Plan, str]) -> None:
    folder, _, text = full
    page = Page(text)
    plots = page.of("svg")
    assert len(plots) == 5
    assert all(p["role"] == "img" and len(p["aria-label"] or "") > 40 for p in plots)
    figures = {p.stem for p in (folder / "figures").glob("*.png")}
    assert figures == {"frontier", "bits", "traces", "loss_check", "training"}
    downloads = {a["download"] for a in page.of("a")}
    assert downloads == {f"{f}.csv" for f in figures} == {p.name for p in (folder / "figures").glob("*.csv")}
    assert all((folder / "figures" / f"{f}.png").read_bytes()[:4] == b"\x89PNG" for f in figures)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_page_needs_nothing_from_outside(full: tuple[Path, Plan, str]) -> None:
    page = Page(full[2])
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "data"):
            assert (attributes.get(key) or "#").startswith(("#", "data:"))
    outside = re.findall(r"(?:https?:)?//[a-z][^\s\"'<]*", re.sub(r"data:[^\"]*", "", full[2]))
    assert [u for u in outside if "w3.org" not in u] == []  # an XML namespace is a name, not a request
    assert "@import" not in full[2] and set(re.findall(r"url\((.)", full[2])) <= {"#"}


def test_csv_holds_the_numbers(full: tuple[Path, Plan, str]) -> None:
    folder, plan, _ = full
    with (folder / "figures" / "bits.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["site"]: int(r["bits"]) for r in rows} == plan.bits
    with (folder / "figures" / "traces.csv").open() as file:
        traces = {r["site"]: float(r["mean_trace"]) for r in csv.DictReader(file)}
    assert traces["conv1.weight"] == 0.05 and traces["last.weight"] == 0.0
    with (folder / "figures" / "frontier.csv").open() as file:
        front = list(csv.DictReader(file))
    costs = [float(r["weight_bytes"]) for r in front]
    assert costs == sorted(costs) and len(costs) == len(read_run(folder).frontier) > 3


def test_headline_and_sizes(full: tuple[Path, Plan, str]) -> None:
    run = read_run(full[0])
    bits = 400 * 8 + 4000 * 4 + 800 * 2
    assert {label: value for value, label in headline(run)}["smaller weights"] == f"{5200 * 32 / bits:.1f}×"
    assert ("97.50%", "accuracy, float 98.00%") in headline(run)
    rows = {r[0]: r[1] for r in size_rows(run)}
    assert rows["weights, codes (W-Comp)"] == size(bits / 8)
    assert rows["mean bits of a weight"] == f"{bits / 5200:.2f}"
    assert "−0.50 points" in full[2] and "91.00%" in full[2]


def test_uniform_points_and_the_chosen_plan_stand_on_the_frontiers_scale(full: tuple[Path, Plan, str]) -> None:
    folder, plan, _ = full
    uniform = uniform_points(plan, 0.001)
    assert [u[0] for u in uniform] == [2, 4, 8]
    assert uniform[1][1] == 5200 * 4 / 8
    np.testing.assert_allclose(uniform[1][2], 2.51 * 4.0**-4 + 0.001)
    drawings, _ = draw_all(read_run(folder))
    frontier = next(d for d in drawings if d.name == "frontier")
    mark = next(t for t in frontier.tooltips if t.text.startswith("the chosen"))
    wanted = 2.0 * 4.0**-8 + 0.5 * 4.0**-4 + 0.01 * 4.0**-2 + 0.001
    np.testing.assert_allclose([mark.x * 1024, mark.y], [(3200 + 16000 + 1600) / 8, wanted], rtol=1e-6)
    assert mark.text.endswith("bits 8 4 2")


def test_tooltips_lie_on_the_marks(full: tuple[Path, Plan, str]) -> None:
    drawings, _ = draw_all(read_run(full[0]))
    for drawing in drawings:
        text = drawing.svg()
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())
        spots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)"', text)]
        assert spots and all(0 <= x <= width and 0 <= y <= height for x, y in spots)
    # training draws circles with <use x= y=>: the spots must lie on them
    training = next(d for d in drawings if d.name == "training").svg()
    marks = [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', training)]
    spots = re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)"', training)
    assert len(spots) == 2
    for x, y in spots:
        assert min(abs(float(x) - a) + abs(float(y) - b) for a, b in marks) < 0.3


def test_what_was_uncertain_is_said(full: tuple[Path, Plan, str]) -> None:
    said = doubts(read_run(full[0]))
    assert "The network looks <untrained>." in said
    assert any("Zero or negative" in s and "last.weight" in s for s in said)
    assert any("two standard errors" in s and "conv2.weight" in s and "conv1" not in s for s in said)
    assert "&lt;untrained&gt;" in full[2] and "<untrained>" not in full[2]


def test_a_file_of_another_size_than_predicted_is_reported(tmp_path: Path) -> None:
    fill(tmp_path).replace(costs={"file_bytes": 100}).save(tmp_path / "plan.json")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 90)
    assert any("90 bytes where 100 were predicted" in s for s in doubts(read_run(tmp_path)))


def test_strings_from_files_are_escaped(tmp_path: Path) -> None:
    fill(tmp_path, NASTY)
    title = "<script>alert(1)</script>"
    text = write_report(tmp_path, title=title).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.of("script") and not page.of("b")
    assert title in page.text and NASTY in page.text
    assert any(NASTY in (a["aria-label"] or "") for a in page.of("svg"))


def test_quadratic_forms_are_held_against_the_divergence(tmp_path: Path) -> None:
    plan = fill(tmp_path)
    (tmp_path / "loss_check.csv").write_text(
        "site,kind,bits,predicted,measured,q,kl\n"
        + "".join(
            f"{s.name},weight,{o.bits},{o.omega / 2},{-1e-4},{o.omega},{o.omega * 1.1}\n"
            for s in plan.weights
            for o in s.options
        )
        + f"{plan.sites[0].name},weight,7,0.1,0.1,,\n"
    )
    run = read_run(tmp_path)
    assert run.loss_check[-1].q is None and run.loss_check[-1].outcome == 0.1
    drawings, absent = draw_all(run)
    assert not absent
    drawing = next(d for d in drawings if d.name == "loss_check")
    assert "KL" in drawing.figure.axes[0].get_ylabel() and drawing.columns[-2:] == ["q", "kl"]
    assert drawing.rows[-1][-2:] == ["", ""]


FILES = ["plan.json", "sensitivity.json", "frontier.csv", "metrics.json", "loss_check.csv"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [None, "{ not json, not csv"])
def test_a_missing_or_damaged_file_costs_only_its_section(tmp_path: Path, name: str, damage: str | None) -> None:
    fill(tmp_path)
    (tmp_path / name).unlink()
    if damage:
        (tmp_path / name).write_text(damage)
    drawings, absent = draw_all(read_run(tmp_path))
    assert len(drawings) == 4
    reasons = f"{name} (could not be read|holds too little)" if damage else f"{name} is not in the run folder"
    assert len(absent) == 1 and re.search(reasons, absent[0][1])


def test_absent_sections_are_said_on_the_page(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "frontier.csv").unlink()
    (tmp_path / "sensitivity.json").write_text("{")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert len(page.of("svg")) == 3
    assert "frontier.csv is not in the run folder" in page.text
    assert "sensitivity.json could not be read" in page.text
    model_card(tmp_path)


@pytest.mark.parametrize("keep", FILES)
def test_one_file_alone_is_enough(tmp_path: Path, keep: str) -> None:
    fill(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != keep:
            path.unlink()
    drawings, absent = draw_all(read_run(tmp_path))
    assert (len(drawings), len(absent)) == (1, 4)
    model_card(tmp_path)


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(HawqError, match="Nothing to report"):
        write_report(tmp_path)
    with pytest.raises(HawqError, match="No run folder"):
        model_card(tmp_path / "none")
    fill(tmp_path)
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(HawqError, match="Cannot write"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "metrics",
    [
        {"accuracy": 0.9, "history": 3, "sizes": [], "seconds": "long"},
        {"accuracy": {"float": None, "quantized": "x"}, "history": [{"epoch": 0}, 5, {"epoch": "a", "val_acc": 1}]},
        {"accuracy": {"float": float("nan")}, "history": [], "seconds": {"a": None}, "command": {"a": 1}},
    ],
)
def test_odd_metrics_do_not_stop_the_report(tmp_path: Path, metrics: dict) -> None:
    fill(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert len(draw_all(read_run(tmp_path))[0]) == 4
    model_card(tmp_path)


def test_detection_has_map(tmp_path: Path) -> None:
    fill(tmp_path)
    history = [{"epoch": 0, "val_map": 0.4}, {"epoch": 1, "val_map": 0.52}]
    (tmp_path / "metrics.json").write_text(json.dumps({"map": {"float": 0.53, "fine_tuned": 0.52}, "history": history}))
    text = model_card(tmp_path).read_text(encoding="utf-8")
    training = next(d for d in draw_all(read_run(tmp_path))[0] if d.name == "training")
    assert "val_map over 2 epochs" in training.alt and "to 0.520" in training.alt
    assert "mAP" in text and "0.520" in text and "−0.010" in text


def test_rank_correlation() -> None:
    up = [LossCheck(f"a{i}", "weight", 4, float(i), float(i**3)) for i in range(1, 6)]
    down = [LossCheck(f"b{i}", "activation", 4, float(i), 10.0 - i) for i in range(1, 6)]
    found = rank_correlations(up + down)
    assert found["weight"] == pytest.approx(1) and found["activation"] == pytest.approx(-1)
    assert -1 < found["all"] < 1
    assert rank_correlations(up[:1]) == {}


def test_the_card(tmp_path: Path) -> None:
    fill(tmp_path, "odd|name.weight")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2048)
    text = model_card(tmp_path, title="My *net*").read_text(encoding="utf-8")
    assert text.startswith("# My \\*net\\*\n")
    assert "| after fine-tuning | 97.50% | −0.50 points |" in text
    assert "| conv2.weight | 1000x4 | 4 | affine | float |" in text
    assert "| conv1.weight | 100x4 | 8 | affine | 8 |" in text
    assert "odd\\|name.weight" in text
    assert "hawq-lightning select.budget=8x" in text and "load_packed" in text and "2.0 KiB" in text


def test_command_from_hydra(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "metrics.json").unlink()
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- select.budget=12x\n- 'data.root=/a b'\n")
    assert read_run(tmp_path).command == "hawq-lightning select.budget=12x 'data.root=/a b'"
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[")
    assert read_run(tmp_path).command is None


@pytest.mark.parametrize("low", [2e-6, 8e-4, 0.02, 3.0])
@pytest.mark.parametrize("span", [1.6, 3.0, 12.0, 1e4])
def test_every_log_axis_shows_two_numbers(low: float, span: float) -> None:
    if span < 20 and tuple(int(n) for n in matplotlib.__version__.split(".")[:2]) < (3, 11):
        pytest.skip(
            "matplotlib before 3.11 writes too few or equal numbers where an axis has less than two powers of ten"
        )
    with canvas() as (figure, (ax,)):
        ax.plot([1, 2], [low, low * span])
        log_scale(ax, "y")
        ax.set_ylim(low, low * span)
        figure.draw_without_rendering()
        ticks = zip(ax.get_yticks().tolist() + ax.get_yticks(minor=True).tolist(), ax.get_yticklabels(which="both"))
        shown = [label.get_text() for value, label in ticks if low <= value <= low * span and label.get_text()]
    assert 2 <= len(shown) <= 10 and len(set(shown)) == len(shown), shown


def test_short_texts() -> None:
    assert [size(x) for x in (None, 0, 1023, 1024, 3 << 20)] == ["–", "0 B", "1,023 B", "1.0 KiB", "3.0 MiB"]
    assert names(list("abcdefgh"), 3) == "a, b, c and 5 more"


def test_report_and_export_import_neither_lightning_nor_hydra() -> None:
    package = Path(hawq_lightning.__file__).parent
    files = [*package.glob("report/*.py"), *package.glob("export/*.py")]
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in imported:
                assert name.split(".")[0] not in ("lightning", "hydra", "omegaconf"), f"{path.name} imports {name}"


@chromium.needed
def test_chromium_opens_it_without_a_complaint(full: tuple[Path, Plan, str], tmp_path: Path) -> None:
    script = """
      const circles = document.querySelectorAll("#frontier svg.plot circle.tip");
      const last = circles[circles.length - 1];
      last.scrollIntoView();
      const there = last.getBoundingClientRect();
      const hit = document.elementFromPoint(there.x + there.width / 2, there.y + there.height / 2);
      document.title = "TIP " + hit.querySelector("title").textContent.split("\\n")[0]
        + "|" + performance.getEntriesByType("resource").length;
    """
    complaints, page = chromium.opened(full[2], script, tmp_path)
    assert not complaints
    assert "<title>TIP the chosen plan|0</title>" in page
