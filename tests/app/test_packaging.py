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


def copy_sources(folder: Path) -> None:
    """What an install reads."""
    for name in ("hawq_lightning", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_sources(source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
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
    fast = ["debug=fast", "model.depth=8", "model.channels=4", "callbacks=none", "trainer=cpu", "measure.forecast=null"]
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


def packages() -> str:
    """The folder of what this interpreter has installed."""
    return str(Path(pytest.__file__).resolve().parent.parent)


@pytest.mark.stress
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_see_an_editable_install_and_it_runs(tmp_path, checker):
    if shutil.which(checker) is None and checker == "pyright":
        pytest.skip("pip install 'pyright[nodejs]'")
    (source := tmp_path / "source").mkdir()
    copy_sources(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    flags = ["-q", "--no-deps", "--no-build-isolation"]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", *flags, "-e", source]
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # the build backend and torch come from here; what lies here as an editable install of ours does not
    (site / "borrowed.pth").write_text(packages())
    subprocess.run(pip, check=True, capture_output=True, timeout=200)
    (user := tmp_path / "user").mkdir()
    (user / "script.py").write_text("from hawq_lightning import HAWQ\nHAWQ(buget='8x')\n")
    if checker == "mypy":
        command = [sys.executable, "-m", "mypy", "--python-executable", python, "script.py"]
    else:
        command = ["pyright", "--pythonpath", python, "script.py"]
    said = subprocess.run(command, cwd=user, capture_output=True, text=True, timeout=600).stdout
    assert "buget" in said, said
    program = "import hawq_lightning as h; print(h.__file__); from hawq_lightning.cli._train import main; main()"
    done = subprocess.run(
        [python, "-c", program, "--cfg", "job"], cwd=user, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.startswith(str(source)), done.stdout + done.stderr
    assert "select:" in done.stdout


@pytest.mark.stress
def test_the_source_distribution_is_whole_and_its_tests_run(tmp_path):
    pytest.importorskip("twine")
    build = [sys.executable, "-m", "hatchling", "build", "-d", tmp_path / "dist"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=300)
    files = sorted((tmp_path / "dist").iterdir())
    check = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(check, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr
    (archive,) = (f for f in files if f.name.endswith(".tar.gz"))
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (tree,) = tmp_path.glob("hawq_lightning-*")
    environment = os.environ | {"PYTHONPATH": str(tree)}
    tests = ["tests/unit/test_layering.py", "tests/unit/test_code_rules.py", "tests/app/test_conf.py"]
    collect = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for more in (["--collect-only", "tests"], tests):
        done = subprocess.run([*collect, *more], cwd=tree, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
