"""Imports point one way, and the method needs neither lightning nor hydra."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import hawq_lightning

ROOT = Path(hawq_lightning.__file__).parent
LIBRARY = [
    "layers",
    "sensitivity",
    "quantization",
    "selection",
    "export",
    "callbacks",
]  # each may import those before it
APPLICATION = ["pytorch_lightning", "report", "tasks", "models", "data", "cli"]
APPLICATION_MAY = {("data", "models"), ("tasks", "models"), ("tasks", "data"), ("cli", "report"), ("cli", "tasks"),
                   ("cli", "models"), ("cli", "data")}  # fmt: skip


def imports(path: Path) -> list[str]:
    """Every module that a file imports, within functions and under ``TYPE_CHECKING`` too."""
    out = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            out.append(node.module or "")
            out += [f"{node.module}.{a.name}" for a in node.names if a.name.startswith("_")]
        elif isinstance(node, ast.Import):
            out += [a.name for a in node.names]
    return [name for name in out if name.split(".")[0] == "hawq_lightning"]


def test_the_method_is_useful_alone():
    code = (
        "import sys, hawq_lightning as h, hawq_lightning.sensitivity, hawq_lightning.quantization,"
        "hawq_lightning.selection, hawq_lightning.export, hawq_lightning.report;"
        "h.measure, h.select, h.quantize, h.load_packed;"
        "bad = {'lightning', 'pytorch_lightning', 'hydra', 'omegaconf'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


WATCH_IMPORTS = """
import builtins, sys
original, seen = builtins.__import__, set()
def watch(name, globals=None, *rest, **keywords):
    importer = (globals or {}).get("__name__", "")
    if importer.startswith("hawq_lightning") and name.split(".")[0] in APPLICATION_ONLY:
        seen.add(f"{importer} imports {name}")
    return original(name, globals, *rest, **keywords)
builtins.__import__ = watch
"""


def test_the_five_lines_need_nothing_of_the_application(tmp_path):
    """Lightning imports some of these packages itself: what counts is who imports them, not whether they are there."""
    code = f"""
APPLICATION_ONLY = ("matplotlib", "jinja2", "markupsafe", "sklearn", "PIL", "rich", "torchvision", "hydra", "omegaconf")
{WATCH_IMPORTS}
import torch
from lightning.pytorch import LightningModule, Trainer
from hawq_lightning import HAWQ

class Task(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,)))
silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
callback = HAWQ(weight_bits=(2, 4, 8), activation_bits=8, budget="6x", progress=False)
trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **silent)
trainer.fit(Task(), torch.utils.data.DataLoader(data, 16))
assert callback.plan is not None
application = {APPLICATION!r}
loaded = [part for part in application if f"hawq_lightning.{{part}}" in sys.modules]
assert not seen and not loaded, (seen, loaded)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240, cwd=tmp_path)


def test_imports_point_up_the_list():
    wrong = []
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            target = [*name.split("."), ""][1]
            if part == target or part == "__init__.py" or target not in LIBRARY + APPLICATION:
                continue
            if part in LIBRARY:
                good = target in LIBRARY and LIBRARY.index(target) < LIBRARY.index(part)
            elif part in APPLICATION:
                good = target in LIBRARY or (part, target) in APPLICATION_MAY
            else:  # a file at the top: what the rest stands on, and it on what is known of layers
                good = target == "layers"
            if not good:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_nobody_imports_past_a_face():
    """``a.b._c`` is for files under ``a/b`` only; tests, recipes and benchmarks use public names."""
    wrong = []
    for folder in ("hawq_lightning", "tests", "recipes", "benchmarks"):
        for path in (ROOT.parent / folder).rglob("*.py"):
            where = path.relative_to(ROOT.parent).with_suffix("").parts
            for name in imports(path):
                parts = name.split(".")
                for depth, part in enumerate(parts):
                    if part.startswith("_") and not part.startswith("__") and tuple(parts[:depth]) != where[:depth]:
                        wrong.append(f"{'/'.join(where)} imports {name}")
    assert not wrong, wrong


def imported_files(path: Path) -> set[str]:
    """The files of the package that a file imports, one edge each; a package is its ``__init__``."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{n}" if is_file(f"{node.module}.{n}") else str(node.module) for n in names]
        out |= {name for name in names if is_file(name)}
    return out


def is_file(name: str) -> bool:
    where = ROOT.parent.joinpath(*name.split("."))
    return name.startswith("hawq_lightning") and (
        where.with_suffix(".py").is_file() or (where / "__init__.py").is_file()
    )


def test_no_import_circles():
    """Function-local and ``TYPE_CHECKING`` imports count: a circle is a fault of design before it is one of loading."""
    edges = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        edges[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = imported_files(path)
    reached = {name: reachable(name, edges) for name in edges}
    circles = {frozenset(x for x in reached[n] if n in reached[x]) for n in edges if n in reached[n]}
    assert not circles, "\n".join(" <-> ".join(sorted(circle)) for circle in circles)


def reachable(name: str, edges: dict[str, set[str]]) -> set[str]:
    """All that a file imports, and what that imports, and so on."""
    found: set[str] = set()
    waiting = list(edges[name])
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += edges[file]
    return found


def test_no_module_has_a_public_name_of_its_own():
    """Files are private, so that no function hides a module of its name."""
    shown = [p for p in ROOT.rglob("*.py") if not p.name.startswith("_")]
    assert len(list(ROOT.rglob("_*.py"))) > 100
    assert not shown, shown


def test_only_one_folder_touches_lightnings_internals():
    private = ("fit_loop._", "_data_source", "_average_model", "_current_fx_name", "_on_before_batch_transfer")
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "_trainer":
            found = [p for p in private if p in path.read_text()]
            assert not found, (path, found)
