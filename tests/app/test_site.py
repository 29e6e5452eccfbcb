"""The documentation as a site: it asks nobody for anything, and its search works from the disk."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.app import chromium

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.stress, chromium.needed]
TYPE = """setTimeout(() => {
  const box = document.querySelector("[data-md-component=search-query]")
  document.querySelector("#__search").click()
  box.focus()
  box.value = "frontier"
  box.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }))
  box.dispatchEvent(new Event("input", { bubbles: true }))
}, 1500)"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    return folder


def test_pages_load_nothing_from_elsewhere(site):
    tag = re.compile(r"<(?:script|img|iframe|link)[^>]*>")
    address = re.compile(r"(?:src|href)=\"((?:https?:)?//[^\"]+)")
    for page in site.rglob("*.html"):
        tags = [t for t in tag.findall(page.read_text("utf-8")) if "canonical" not in t]
        assert not [t for t in tags if address.search(t)], page


def test_the_search_finds_pages_without_a_server(site, tmp_path):
    page = site / "probe.html"
    start = (site / "index.html").read_text("utf-8")
    page.write_text(start.replace("</body>", f"<script>{TYPE}</script></body>"), encoding="utf-8")
    done = chromium.run(tmp_path, page, "--virtual-time-budget=12000", "--dump-dom")
    (count,) = re.findall(r"(\d+) matching documents", done.stdout)
    assert int(count) > 2
