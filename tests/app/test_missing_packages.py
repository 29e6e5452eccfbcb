"""Only the application needs Hydra, plots and pages: the callback works without, a program names what is missing."""

import subprocess
import sys

import pytest

from tests.console import python

WITHOUT = """
import importlib.metadata as metadata, sys
from importlib.machinery import PathFinder
modules, distributions = set(), set()
class Finder:
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in modules else PathFinder.find_spec(name, path, target)
    def find_distributions(self, *arguments, **keywords):
        return PathFinder.find_distributions(*arguments, **keywords)
original = metadata.distribution
def distribution(name):
    if name.lower() in distributions:
        raise metadata.PackageNotFoundError(name)
    return original(name)
metadata.distribution = distribution
finders = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
sys.meta_path[:] = [Finder() if finder is PathFinder else finder for finder in finders]
"""

CALLBACK = """
modules.update(("hydra", "omegaconf", "antlr4", "matplotlib", "sklearn", "PIL", "rich", "jinja2", "torchvision",
                "pytorchcv", "faster_coco_eval", "onnx", "onnxscript", "onnxruntime", "pandas", "jsonargparse"))
distributions.update(modules, ("hydra-core", "antlr4-python3-runtime", "scikit-learn", "pillow", "faster-coco-eval"))
import torch
from torch import nn
from lightning.pytorch import LightningModule, Trainer
from hawq_lightning import HAWQ, save_packed

class Task(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,)))
silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
hawq, task = HAWQ(weight_bits=(2, 4, 8), activation_bits=8, budget="6x", progress=False), Task()
Trainer(max_epochs=1, accelerator="cpu", callbacks=[hawq], **silent).fit(task, torch.utils.data.DataLoader(data, 16))
save_packed(task, hawq.plan, "model.safetensors")
assert not modules & {name.partition(".")[0] for name in sys.modules}
print("trained")
"""

SCRIPT = """
modules.add(sys.argv[1])
for name in list(sys.modules):
    if name.partition(".")[0] in modules or name.startswith(("hawq_lightning.cli", "hawq_lightning.report")):
        del sys.modules[name]
from importlib.metadata import entry_points
main = next(iter(entry_points(group="console_scripts", name=sys.argv[2]))).load()
sys.argv = [sys.argv[2], *sys.argv[3:]]
main()
"""


@pytest.mark.stress
def test_the_callback_and_a_packed_file_need_nothing_of_the_application(tmp_path):
    command = [sys.executable, "-c", WITHOUT + CALLBACK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr


SCRIPTS = ("hawq-lightning", "hawq-lightning-analyze", "hawq-lightning-export", "hawq-lightning-collect")


@pytest.mark.parametrize(
    "script, missing",
    [
        ("hawq-lightning", "hydra"),
        ("hawq-lightning-export", "jinja2"),
        *(
            pytest.param(s, m, marks=pytest.mark.stress)
            for s in SCRIPTS
            for m in ("hydra", "matplotlib", "jinja2", "rich")
        ),
    ],
)
def test_a_missing_package_of_the_application_is_one_line(tmp_path, script, missing):
    done = python(WITHOUT + SCRIPT, missing, script, cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and missing in line and "pip install" in line
    assert not list(tmp_path.iterdir())
