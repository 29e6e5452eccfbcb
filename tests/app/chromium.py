"""Opens a page in headless Chromium (Debian's package)."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

needed = pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"


def opened(text: str, script: str, folder: Path, *flags: str) -> tuple[str, str]:
    """What the browser complains about, and the page's text after a script of ours has run in it."""
    text = text.replace("img-src data:", "img-src data:; script-src 'unsafe-inline'")  # the page itself has no script
    probe = f"<script>addEventListener('load', () => {{{script}}});</script></body>"
    (folder / "page.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    done = run(folder, folder / "page.html", "--dump-dom", *flags)
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line), done.stdout


def run(folder: Path, page: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Chromium on a page of the disk, with a profile of its own and nothing that it asks for by itself."""
    return subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--no-first-run",
         "--window-size=1100,6000", "--disable-background-networking", "--disable-component-update",
         f"--user-data-dir={folder}/profile", *flags, f"file://{page}"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip


def requests(log: Path) -> list[str]:
    """Addresses that a page asked for, from a log that ``--log-net-log`` wrote; not what Chromium asks for itself."""
    held = json.loads(log.read_text(encoding="utf-8"))
    start = held["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [e["params"] for e in held["events"] if e["type"] == start and "url" in e.get("params", {})]
    own = ("file:", "data:", "chrome:", "chrome-extension:")
    return [a["url"] for a in asked if a.get("initiator") != "not an origin" and not a["url"].startswith(own)]
