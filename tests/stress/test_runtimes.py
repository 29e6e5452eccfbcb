"""Seventeen kinds of networks, 8 bits and mixed, exact and for integer kernels, in old and new onnxruntimes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch

from hawq_lightning import Plan, PlanSite, quantize, sites
from hawq_lightning.export import to_onnx
from hawq_lightning.export.onnx import open_session
from tests.deployed_networks import NETWORKS

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
RUNNER = Path(__file__).with_name("run_files.py")
# None: the one that is installed
VERSIONS = ("1.18.1", "1.22.1", "1.23.2", "1.26.0", "1.28.0", None)
QUICK = ("depthwise", "tied_linear")
FORMS = ("exact", "integer")


def plan_for(net: torch.nn.Module, x: torch.Tensor, mixed: bool) -> Plan:
    """Weights of 8 bits or of 2, 3, 4, 5, 6 and 8 in turn; activations of 8, or of 8, 4 and 6."""
    table = sites(net, x)
    widths, grids = ((2, 3, 4, 5, 6, 8), (8, 4, 6)) if mixed else ((8,), (8,))
    chosen = [
        PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, "affine")
        for s, bits in zip(table.weights, cycle(widths))
    ]
    for s, bits in zip(table.activations, cycle(grids)):
        zero = 1 << (bits - 1)
        chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, "affine", 8 / 2**bits, zero))
    return Plan(tuple(chosen), table.layers)


def write(name: str, mixed: bool, folder: Path, forms=FORMS) -> None:
    """Files of one network, and its images and outputs."""
    make, shape = NETWORKS[name]
    torch.manual_seed(1)
    net, x = make().eval(), torch.randn(16, *shape)
    plan = plan_for(net, x, mixed)
    quantize(net, plan)
    with torch.no_grad():
        wanted = net(x).numpy()
    stem = folder / f"{name}-{'mixed' if mixed else 'eight'}"
    np.savez(f"{stem}.npz", x=x.numpy(), wanted=wanted)
    with warnings.catch_warnings():  # torch's attention computes with the number of samples, which is 16 here
        warnings.filterwarnings("ignore", ".*samples at a time and no other number")
        for form in forms:
            to_onnx(net, plan, x, f"{stem}-{form}.onnx", integer=form == "integer")


def run(folder: Path, packages: Path | None = None) -> dict[str, float | str]:
    """File -> mean difference by the outputs' spread, or what went wrong; in a process with other packages in front."""
    paths = {"PYTHONPATH": str(packages)} if packages else {}
    done = subprocess.run(
        [sys.executable, RUNNER, folder], capture_output=True, text=True, env={**os.environ, **paths}, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float | str] = json.loads(done.stdout.splitlines()[-1])
    return found


def disagree(found: dict[str, float | str]) -> dict[str, float | str]:
    """Files that do not run or give something else.

    Additional grids of 8 bits move outputs of random networks with 4-bit activations by a quarter of their spread at
    most: a value that crosses a boundary there moves by a whole step.
    """
    most = {"exact": 1e-5, "eight-integer": 0.06, "mixed-integer": 0.25}
    bounds = {name: next(v for k, v in most.items() if name.endswith(k)) for name in found}
    return {k: v for k, v in found.items() if isinstance(v, str) or v > bounds[k]}


@pytest.mark.parametrize("name", QUICK[:1])
def test_a_network_agrees_in_the_installed_runtime(name, tmp_path):
    write(name, True, tmp_path, ("integer",))
    found = run(tmp_path)
    assert len(found) == 1 and not disagree(found)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name in NETWORKS:
        for mixed in (False, True):
            write(name, mixed, folder)
    return folder


def installed(folder: Path, *packages: str) -> Path:
    """Packages in a folder of their own."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, *packages]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{packages[0]} does not install here: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.stress
@pytest.mark.parametrize("version", VERSIONS)
def test_all_files_run_in_old_and_new_runtimes(version, files, tmp_path):
    packages = None
    if version is not None:
        older = ["numpy<2"] if version.startswith("1.18") else []
        packages = installed(tmp_path / "packages", f"onnxruntime=={version}", *older)
    found = run(files, packages)
    assert len(found) == 4 * len(NETWORKS) and not disagree(found)


@pytest.mark.stress
def test_all_files_run_in_openvino(files):
    pytest.importorskip("openvino")
    found: dict[str, float | str] = {}
    for file in sorted(files.glob("*.onnx")):
        held = np.load(f"{str(file).rpartition('-')[0]}.npz")
        try:
            opened = open_session("openvino", file, 1)
            (outputs,) = opened.run(None, {opened.get_inputs()[0].name: held["x"]})
            found[file.stem] = float(np.abs(outputs - held["wanted"]).mean() / held["wanted"].std())
        except Exception as error:
            found[file.stem] = f"{type(error).__name__}: {str(error)[:300]}"
    print(json.dumps(found, indent=1))
    assert len(found) == 4 * len(NETWORKS)
    failed = {k: v for k, v in found.items() if isinstance(v, str)}
    assert not failed, failed
    # its own integer kernels run the exact file too, so that it moves as the integer one does
    most = {"eight-exact": 0.06, "mixed-exact": 0.25, "eight-integer": 0.06, "mixed-integer": 0.25}
    apart = {k: v for k, v in found.items() if v > next(m for end, m in most.items() if k.endswith(end))}
    assert not apart, apart


SIMPLIFY = {
    "onnxsim": "import onnx, onnxsim; onnx.save(onnxsim.simplify(onnx.load(old))[0], new)",
    "onnxslim": "import onnxslim; onnxslim.slim(old, new)",
}


@pytest.mark.stress
@pytest.mark.parametrize("tool", list(SIMPLIFY))
def test_simplified_files_give_the_same_outputs(tool, files, tmp_path):
    packages = installed(tmp_path / "packages", tool, *(["onnx"] if tool == "onnxsim" else []))
    (tmp_path / "files").mkdir()
    program = (
        "import sys, pathlib, shutil\n"
        "for file in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    old, new = str(file), str(pathlib.Path(sys.argv[2]) / file.name)\n"
        f"    if file.suffix == '.onnx':\n        {SIMPLIFY[tool]}\n"
        "    else:\n        shutil.copy(old, new)\n"
    )
    command = [sys.executable, "-c", program, str(files), str(tmp_path / "files")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(packages)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert run(tmp_path / "files") == pytest.approx(run(files), abs=1e-6)
