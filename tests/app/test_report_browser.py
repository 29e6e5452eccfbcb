"""The pages of a real run and of a sweep in a real browser: silent, offline, readable light, dark, narrow, on paper."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hawq_lightning.report import collect
from tests.app import chromium
from tests.app.test_collect import write_run
from tests.app.test_report import Page

pytestmark = pytest.mark.stress
FIGURES = {"report": {"frontier", "bits", "traces", "loss_check", "training"}, "sweep": {"accuracy_size"}}
WIDE, NARROW = 1100, 400

# the least contrast of a text with what lies behind it, everything unfolded, and how far the page overflows
PROBE = """
const parse = (c) => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
document.querySelectorAll("details").forEach((d) => { d.open = true; });
let least = 99, worst = "", texts = 0;
for (const e of document.body.querySelectorAll("*")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || e.closest("script, style, defs, circle, [hidden]")) continue;
  const style = getComputedStyle(e), drawn = e.closest("svg");
  const [a, b] = [light(parse(drawn ? style.fill : style.color)), light(behind(e))];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  texts += 1;
  if (ratio < least) { least = ratio; worst = e.textContent.trim().slice(0, 40); }
}
const root = document.documentElement;
document.title = "FOUND" + JSON.stringify({
  least, worst, texts, over: root.scrollWidth - root.clientWidth, width: innerWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  asked: performance.getEntriesByType("resource").length,
});
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """What ``make demo`` writes, and the page of a sweep of 12 runs."""
    base = tmp_path_factory.mktemp("pages")
    done = subprocess.run(
        [Path(sys.executable).parent / "hawq-lightning", "name=demo", f"hydra.run.dir={base / 'demo'}", "onnx=true"],
        cwd=base, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for seed in (1, 2, 3):
        for size, score in ((20_000, 0.98), (13_000, 0.96)):
            for i, rule in enumerate(("traces", "uniform")):
                folder = base / "sweep" / f"{rule}{size}{seed}"
                score -= 0.01 * i + 0.002 * seed
                write_run(folder, score, seed=seed, weight_bytes=size, overrides=[f"+rule={rule}"])
    collect(base / "sweep")
    return {"report": base / "demo" / "report.html", "sweep": base / "sweep" / "sweep.html"}


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_has_words_and_a_csv(pages, name):
    page = Page(pages[name].read_text("utf-8"))
    plots = page.of("svg")
    assert len(plots) == len(FIGURES[name])
    assert all(p["role"] == "img" and len(p["aria-label"] or "") > 60 for p in plots)
    downloads = {a["download"].removesuffix(".csv") for a in page.of("a") if a.get("download")}
    assert downloads >= FIGURES[name]
    for figure in FIGURES[name]:
        path = pages[name].parent / "figures" / f"{figure}.csv"
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert rows and all(len(r) == len(rows[0]) for r in rows), path
        assert path.with_suffix(".png").stat().st_size > 10_000
    assert all(p["aria-label"] in page.text for p in plots), "the words are on the page as well"


@chromium.needed
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", list(FIGURES))
def test_it_is_silent_offline_and_legible(pages, name, theme, tmp_path):
    flag, log = chromium.DARK if theme == "dark" else chromium.LIGHT, tmp_path / "net.json"
    complaints, text = chromium.opened(
        pages[name].read_text("utf-8"), PROBE, tmp_path, flag, f"--log-net-log={log}", f"--window-size={WIDE},3000"
    )
    assert not complaints
    assert chromium.requests(log) == []
    found = json.loads(re.search(r"<title>FOUND(.*?)</title>", text)[1].replace("&gt;", ">").replace("&lt;", "<"))
    assert found["dark"] is (theme == "dark") and found["asked"] == 0 and found["texts"] > 100
    assert found["least"] >= 4.5, found
    assert found["over"] <= 0


@chromium.needed
@pytest.mark.parametrize("name", list(FIGURES))
def test_a_telephone_needs_no_sideways_scrolling(pages, name, tmp_path):
    (tmp_path / "inner.html").write_bytes(pages[name].read_bytes())
    frame = f'<iframe id="f" src="inner.html" style="width:{NARROW}px;height:800px;border:0"></iframe>'
    script = """
      const root = document.getElementById("f").contentDocument.documentElement;
      document.title = "OVER" + (root.scrollWidth - root.clientWidth) + "|" + root.clientWidth;
    """
    _, text = chromium.opened(f"<body>{frame}</body>", script, tmp_path, "--allow-file-access-from-files")
    assert re.search(r"<title>OVER0\|(\d+)</title>", text)


@chromium.needed
@pytest.mark.parametrize("name", list(FIGURES))
def test_it_prints(pages, name, tmp_path):
    done = chromium.run(tmp_path, pages[name], f"--print-to-pdf={tmp_path / 'a.pdf'}", "--no-pdf-header-footer")
    raw = (tmp_path / "a.pdf").read_bytes()
    sheets = len(re.findall(rb"/Type\s*/Page\b", raw))
    assert raw[:5] == b"%PDF-" and 1 <= sheets <= 6, (sheets, done.stderr[-500:])
