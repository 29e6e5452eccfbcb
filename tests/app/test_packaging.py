"""The wheel holds all that it needs and runs outside the repository; the layers import in one direction."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("hawq_lightning", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_config_and_asset(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "hawq_lightning").rglob("*.py")}
    configs = {f"hawq_lightning/{p.relative_to(ROOT)}" for p in (ROOT / "conf").rglob("*.yaml")}
    assets = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "hawq_lightning").rglob("*")
        if p.suffix in (".html", ".css", ".js", ".typed", ".jinja", ".svg")
    }
    assert not (modules | configs | assets) - inside
    assert len(configs) > 30 and "hawq_lightning/py.typed" in inside
    assert not any(name.startswith(("tests/", "recipes/", "benchmarks/", "conf/")) for name in inside)
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_the_installed_wheel_runs_outside_the_repository(wheel, tmp_path):
    target = tmp_path / "site"
    prepare = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(prepare, check=True, capture_output=True, timeout=200)
    program = (
        f"import sys, hawq_lightning as h; assert h.__file__.startswith({str(target)!r}), h.__file__;"
        "from hawq_lightning.cli._train import main; main()"
    )
    fast = ["debug=fast", "model.depth=8", "model.channels=4", "callbacks=none", "trainer=cpu"]
    done = subprocess.run(
        [sys.executable, "-c", program, *fast],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "debug").iterdir()
    assert (folder / "model.safetensors").is_file() and (folder / "report.html").is_file()


def test_versions_agree():
    import hawq_lightning

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert hawq_lightning.__version__ == project["version"]
    assert f"version: {project['version']}" in (ROOT / "CITATION.cff").read_text()


def test_make_targets_exist():
    text = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "stress", "lint", "clean"):
        assert f"\n{target}:" in text
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
