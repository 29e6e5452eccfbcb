"""Opens a page in headless Chromium (Debian's package)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

needed = pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")


def opened(text: str, script: str, folder: Path) -> tuple[str, str]:
    """What the browser complains about, and the page's text after a script of ours has run in it."""
    probe = f"<script>addEventListener('load', () => {{{script}}});</script></body>"
    (folder / "page.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    done = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         "--window-size=1100,6000", f"--user-data-dir={folder}/profile", f"file://{folder}/page.html"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line), done.stdout
