"""What leaves the workshop: the packed file, ONNX and its kin, a torch.export program, torchao, files for phones."""

from hawq_lightning.export import _formats  # noqa: F401  the exporters register themselves
from hawq_lightning.export._bits import pack, unpack
from hawq_lightning.export._contents import PackedFile, StoredSite
from hawq_lightning.export._deployed import Deployed, deploy, portable, stored_layers
from hawq_lightning.export._exporters import EXPORTERS, Exporter, Verification, export, register_exporter
from hawq_lightning.export._files import check_writable
from hawq_lightning.export._folding import Folding, fold_batch_norm
from hawq_lightning.export._huffman import (
    HuffmanCheck,
    HuffmanSize,
    huffman_size,
    load_huffman,
    read_huffman,
    save_huffman,
)
from hawq_lightning.export._integer_ranges import Grid
from hawq_lightning.export._mobile import (
    MobileAgreement,
    MobileFile,
    compare_executorch,
    compare_litert,
    to_executorch,
    to_litert,
)
from hawq_lightning.export._network import DetectorNetwork, network_of
from hawq_lightning.export._packed import load_packed, read_packed, save_packed
from hawq_lightning.export._packed_size import packed_overhead
from hawq_lightning.export._pt2e import IntegerProgram, to_pt2e
from hawq_lightning.export._stored import stored_sites
from hawq_lightning.export._torchao import TorchaoNetwork, to_torchao
from hawq_lightning.export.onnx import (
    Agreement,
    IntegerOnly,
    KernelDifferences,
    compare,
    kernel_differences,
    to_aimet,
    to_integer_only,
    to_onnx,
    to_program,
    to_qonnx,
    to_tensorrt,
)

__all__ = [
    "EXPORTERS",
    "Agreement",
    "Deployed",
    "DetectorNetwork",
    "Exporter",
    "Folding",
    "Grid",
    "HuffmanCheck",
    "HuffmanSize",
    "IntegerOnly",
    "IntegerProgram",
    "KernelDifferences",
    "MobileAgreement",
    "MobileFile",
    "PackedFile",
    "StoredSite",
    "TorchaoNetwork",
    "Verification",
    "check_writable",
    "compare",
    "compare_executorch",
    "compare_litert",
    "deploy",
    "export",
    "fold_batch_norm",
    "huffman_size",
    "kernel_differences",
    "load_huffman",
    "load_packed",
    "network_of",
    "pack",
    "packed_overhead",
    "portable",
    "read_huffman",
    "read_packed",
    "register_exporter",
    "save_huffman",
    "save_packed",
    "stored_layers",
    "stored_sites",
    "to_aimet",
    "to_executorch",
    "to_integer_only",
    "to_litert",
    "to_onnx",
    "to_program",
    "to_pt2e",
    "to_qonnx",
    "to_tensorrt",
    "to_torchao",
    "unpack",
]
