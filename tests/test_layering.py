"""Imports point one way, and the method needs neither lightning nor hydra."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import hawq_lightning

ROOT = Path(hawq_lightning.__file__).parent
ORDER = ["errors", "progress", "batches", "site_table", "plan", "norms", "sites", "sensitivity", "quantization",
         "selection", "callbacks", "export", "report", "tasks", "models", "data", "cli"]  # fmt: skip
# the callback predicts the packed file's size, so it looks down once
ALLOWED = {("callbacks", "export"), ("data", "models"), ("tasks", "models"), ("tasks", "data"), ("models", "data")}


def test_the_method_is_useful_alone():
    code = (
        "import sys, hawq_lightning as h, hawq_lightning.sensitivity, hawq_lightning.quantization,"
        "hawq_lightning.selection, hawq_lightning.export, hawq_lightning.report;"
        "h.measure, h.select, h.quantize, h.load_packed;"
        "bad = [m for m in ('lightning', 'hydra', 'pytorch_lightning') if m in sys.modules]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_imports_point_up_the_list():
    rank = {name: i for i, name in enumerate(ORDER)}
    wrong = []
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part not in rank:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            for name in names:
                bits = name.split(".")
                if bits[0] == "hawq_lightning" and len(bits) > 1 and bits[1] in rank:
                    down = rank[bits[1]] > rank[part] and (part, bits[1]) not in ALLOWED
                    if down:
                        wrong.append(f"{path.name} ({part}) imports {bits[1]}")
    assert not wrong, wrong
    assert len(list(ROOT.rglob("*.py"))) > 40


def test_only_one_folder_touches_lightnings_internals():
    private = ("fit_loop._", "_data_source", "_average_model", "_current_fx_name", "_on_before_batch_transfer")
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "_lightning":
            found = [p for p in private if p in path.read_text()]
            assert not found, (path, found)
