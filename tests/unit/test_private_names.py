"""Private names of torch and Lightning that the package uses: all are in CONTRIBUTING.md's table, and there."""

import ast
import re
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import launchers
from lightning.pytorch.utilities import CombinedLoader
from matplotlib.figure import Figure
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "CONTRIBUTING.md"
ROWS = re.findall(r"^\| `(_\w+)` \| `(.+?)` \| (.+) \|$", TABLE.read_text("utf-8"), re.M)
PUBLIC = {"_fields", "_Hash"}  # of named tuples, which promise it; a type's name in typeshed


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.fixture(scope="module")
def names():
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    return {
        "torch": torch, "nn": nn, "trainer": trainer, "launchers": launchers, "figure": Figure(), "Double": Double,
        "LightningModule": LightningModule, "StochasticWeightAveraging": StochasticWeightAveraging,
        "ReduceLROnPlateau": ReduceLROnPlateau, "CombinedLoader": CombinedLoader,
        "MeanMetric": MeanMetric,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "place", "purpose"), ROWS, ids=[r[0] for r in ROWS])
def test_a_private_name_is_where_it_was(name, place, purpose, names):
    assert name in place.split("[")[-1] or name in place
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            eval(place, names)
    except AttributeError as error:
        pytest.fail(f"{name} is gone ({error}). It serves: {purpose}. Find another way, and mend {TABLE.name}.")


def used() -> dict[str, str]:
    """Private attributes of what is not ours, and where: those that no file of the package defines or stores."""
    trees = {f: ast.parse(f.read_text("utf-8")) for f in (ROOT / "hawq_lightning").rglob("*.py")}
    own, found = set(), {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                    own.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store()):
                    own.add(name)
                case ast.ImportFrom(module=str(module), names=aliases) if not module.startswith("hawq_lightning"):
                    for name in (*module.split("."), *(a.name for a in aliases)):
                        found.setdefault(name, path)
                case ast.Attribute(attr=name):
                    found.setdefault(name, path)
                case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]):
                    found.setdefault(name, path)
                case _:
                    pass
    private = {n: str(f.relative_to(ROOT)) for n, f in found.items() if n.startswith("_") and not n.startswith("__")}
    ours = own | {p.stem for p in trees}
    return {n: f for n, f in private.items() if n not in ours and n not in PUBLIC}


def test_every_private_name_has_a_row():
    missing = {n: f for n, f in used().items() if n not in {r[0] for r in ROWS}}
    assert not missing, f"Private names of others without a row in {TABLE.name}: {missing}"


def test_no_row_is_idle():
    text = "".join(f.read_text("utf-8") for f in (ROOT / "hawq_lightning").rglob("*.py"))
    assert not [name for name, *_ in ROWS if name not in text]
