"""What leaves the workshop: the packed file, ONNX, a torch.export program."""

from hawq_lightning.export.agreement import Agreement, compare
from hawq_lightning.export.deployed import Deployed, deploy
from hawq_lightning.export.folding import Folding, fold_batch_norm
from hawq_lightning.export.network import network_of
from hawq_lightning.export.onnx_file import to_onnx, to_program
from hawq_lightning.export.packed import PackedFile, load_packed, packed_overhead, read_packed, save_packed

__all__ = [
    "Agreement",
    "Deployed",
    "Folding",
    "PackedFile",
    "compare",
    "deploy",
    "fold_batch_norm",
    "load_packed",
    "network_of",
    "packed_overhead",
    "read_packed",
    "save_packed",
    "to_onnx",
    "to_program",
]
