"""Readers of every kind of file that the package writes and reads, each with an undamaged file of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch

from hawq_lightning import (
    Candidates,
    HawqError,
    MeasureConfig,
    Plan,
    load_packed,
    measure,
    quantize,
    save_packed,
    sites,
)
from hawq_lightning.callbacks import ApplyPlan
from hawq_lightning.cli import read_manifest, read_record, sealed_text
from hawq_lightning.quantization import enabled_bits
from hawq_lightning.selection import LatencyTable
from hawq_lightning.sensitivity import Sensitivity, TraceCache, guarded_mean_traces
from tests.trainers import Classifier, blobs, fit, loader
from tests.unit.export.old_network import Small

_OLD = Path(__file__).parent.parent / "unit" / "export" / "files" / "version_3_lq_nets.safetensors"
_LATENCIES = "layer,weight_bits,activation_bits,ms\n0,2,8,0.5\n0,4,8,0.75\n1,8,,1.5\n'=1,8,,2\n"
_RECORD = {
    "command": ["hawq-lightning", "seed=1"], "name": "digits", "seed": 1, "settings": "0123abcd" * 4,
    "sizes": {"float_bytes": 4000, "weight_bytes": 500, "float_weight_bytes": 4000, "file_bytes": 700},
    "seconds": {"float_training": 1.5, "total": 1.5}, "bops": None, "costs": {"weight_bytes": 500.0},
    "accuracy": {"float": 0.9, "quantized": 0.5, "fine_tuned": 0.875}, "loss": {"float": 0.25},
    "history": [{"epoch": 1, "phase": "fine_tuning", "val_acc": 0.75},
                {"epoch": 2, "phase": "fine_tuning", "val_acc": 0.875}],
}  # fmt: skip
_MANIFEST = {
    "format": "hawq_lightning.run_folder", "settings": "0123abcd" * 4, "committed": True,
    "files": ["README.md", "metrics.json", "plan.json"], "pages": {"README.md": "ab" * 32},
    "before": {"settings": "89ef" * 8, "committed": True, "files": ["plan.json"]},
}  # fmt: skip


def make(folder: Path) -> None:
    """Write the undamaged files."""
    torch.manual_seed(0)
    model = Classifier(width=8)
    callback = fit(folder, model, loader())
    save_packed(model, callback.plan, folder / "model.safetensors")
    callback.candidates.save(folder / "candidates.json")
    Sensitivity.load(folder / "sensitivity.json").save(folder / "cache.json")
    (folder / "version_3.safetensors").write_bytes(_OLD.read_bytes())
    (folder / "latency.csv").write_text(_LATENCIES)
    (folder / "metrics.json").write_text(sealed_text(_RECORD))
    (folder / ".hawq_lightning.json").write_text(sealed_text(_MANIFEST))
    _Partial(folder).begin(folder / "sensitivity.partial")


class Reader:
    """Reads a damaged file of one kind.

    Args:
        folder: with the undamaged files.
    """

    allowed: tuple[str, ...] = ()  # audit events that are no harm here

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, path: Path) -> object:
        """What the file says, in a form that :meth:`equal` compares."""
        raise NotImplementedError

    @staticmethod
    def equal(a: object, b: object) -> bool:
        """Whether two files say the same."""
        return a == b

    @staticmethod
    def unsealed(raw: bytes) -> bool:
        """Whether a file has no checksum (any more)."""
        return b'"sha256"' not in raw


class _Packed(Reader):
    make_network: Callable[[], torch.nn.Module] = staticmethod(lambda: Classifier(width=8))

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.manual_seed(1)
        self.start = self.make_network().eval()
        self.float = _states(self.start)

    def __call__(self, path: Path) -> object:
        model = copy.deepcopy(self.start)
        try:
            return _states(load_packed(path, model))
        except HawqError:
            assert self.equal(_states(model), self.float) and not enabled_bits(model), (
                "a refused file changed the model"
            )
            raise

    @staticmethod
    def equal(a, b) -> bool:
        return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

    @staticmethod
    def unsealed(raw: bytes) -> bool:
        return False


class _Version3(_Packed):
    make_network = staticmethod(Small)


class _Plan(Reader):
    def __call__(self, path: Path) -> object:
        plan = Plan.load(path)
        ApplyPlan(path)
        torch.manual_seed(1)
        return json.loads(json.dumps(plan.to_dict())), _states(quantize(Classifier(width=8).eval(), plan))

    @staticmethod
    def equal(a, b) -> bool:
        return a[0] == b[0] and _Packed.equal(a[1], b[1])


class _Traces(Reader):
    def __call__(self, path: Path) -> object:
        read = Sensitivity.load(path)
        guarded_mean_traces(read)
        return json.dumps(read.to_dict())


class _Cache(Reader):
    allowed = ("open",)  # the lock

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        table = sites(Classifier(width=8), next(iter(loader())))
        self.cache = TraceCache(folder / "cache", table)
        self.fingerprint = Sensitivity.load(folder / "cache.json").fingerprint

    def __call__(self, path: Path) -> object:
        entry = self.cache.path(self.fingerprint)
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_bytes(path.read_bytes())
        found = self.cache.find(self.fingerprint)
        self.cache.release()
        return None if found is None else json.dumps(found.to_dict())


class _Partial(Reader):
    allowed = ("open", "os.remove", "os.rename", "ctypes.dlopen")  # its own file, and the look for a GPU

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.manual_seed(2)
        self.net = torch.nn.Sequential(torch.nn.Linear(12, 3), torch.nn.ReLU(), torch.nn.Linear(3, 4)).eval()
        x, y = blobs(8).tensors
        self.batches = [(x[:4], y[:4]), (x[4:], y[4:])]

    def measure(self, path: Path, loss) -> Sensitivity:
        config = MeasureConfig(estimator="hutchinson", images=8, rtol=0.5, max_probes=6)
        return measure(self.net, self.batches, loss, config=config, resume=path, progress=False)

    def begin(self, path: Path) -> None:
        """Leave the file of a measurement that was cut short."""
        raw = b""

        def loss(model, batch):
            nonlocal raw
            if path.is_file():
                raw = path.read_bytes()
            return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

        self.measure(path, loss)
        path.write_bytes(raw)

    def __call__(self, path: Path) -> object:
        done = self.measure(path, lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]))
        return [(r.name, r.trace, r.stderr) for r in done], {k: list(v) for k, v in done.rows.items()}

    @staticmethod
    def unsealed(raw: bytes) -> bool:
        return False


class _Candidates(Reader):
    def __call__(self, path: Path) -> object:
        read = Candidates.load(path)
        str(read)
        return json.dumps(read.to_dict())


class _Latencies(Reader):
    def __call__(self, path: Path) -> object:
        return repr(LatencyTable.load(path))

    @staticmethod
    def unsealed(raw: bytes) -> bool:
        return True


class _Record(Reader):
    def __call__(self, path: Path) -> object:
        return {k: v for k, v in read_record(path).items() if k != "sha256"}


class _Manifest(Reader):
    def __call__(self, path: Path) -> object:
        return {k: v for k, v in read_manifest(path, ("README.md",)).items() if k != "sha256"}


def _states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


READERS = {
    "model.safetensors": _Packed, "version_3.safetensors": _Version3, "plan.json": _Plan, "sensitivity.json": _Traces,
    "cache.json": _Cache, "sensitivity.partial": _Partial, "candidates.json": _Candidates, "latency.csv": _Latencies,
    "metrics.json": _Record, ".hawq_lightning.json": _Manifest,
}  # fmt: skip
