"""Real files of more than 2 GiB: a small quantized layer behind embeddings that stay float."""

import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = 12  # GB
PROGRAM = """
import resource, sys
import numpy as np, onnxruntime, torch
from pathlib import Path
from torch import nn
from hawq_lightning import Plan, PlanSite, quantize, sites
from hawq_lightning.export import to_onnx
from hawq_lightning.export.onnx import float_onnx

form, tables, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
rows = int(2.3 * (1 << 30) / 4 / 1024 / tables)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding.from_pretrained(torch.full((rows, 1024), 0.25)) for _ in range(tables))
        self.head = nn.Linear(1024, 4)

    def forward(self, words):
        return self.head(sum(table(words) for table in self.tables).mean(1))


torch.manual_seed(0)
net, words = Words().eval(), torch.randint(0, rows, (2, 3))
for table in net.tables:
    table.weight[words] = torch.randn(2, 3, 1024)
if form == "float":
    float_onnx(net, words, folder / "m.onnx")
else:
    plan = Plan((PlanSite("head.weight", "weight", ("head",), (4, 1024), 4096, 4, "affine"),))
    quantize(net, plan)
    to_onnx(net, plan, words, folder / "m.onnx")
wanted = net(words).detach().numpy()
del net
size = (folder / "m.onnx.data").stat().st_size
session = onnxruntime.InferenceSession(folder / "m.onnx")
found = session.run(None, {session.get_inputs()[0].name: words.numpy()})[0]
assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max(), (found, wanted)
print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20)
"""


@pytest.mark.stress
@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("form", ["float", "quantized"])
def test_more_than_two_gibibytes(form, tables, tmp_path):
    pytest.importorskip("onnxruntime")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        free = next(
            int(line.split()[1]) >> 20
            for line in meminfo.read_text("ascii").splitlines()
            if line.startswith("MemAvailable")
        )
        if free < MEMORY:
            pytest.skip(f"needs {MEMORY} GB of memory; {free} are available")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, form, str(tables), str(tmp_path)], capture_output=True, text=True
    )
    for file in tmp_path.iterdir():
        file.unlink()
    assert done.returncode == 0, done.stderr[-3000:]
    size, peak = map(int, done.stdout.split()[-2:])
    print(f"{size} bytes, {peak} GB of memory")
    assert size > 2 << 30
