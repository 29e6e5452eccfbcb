"""ONNX files and what goes by their graph: writing them, comparing them with the network, and how fast they run."""

from hawq_lightning.export.onnx._aimet import Encodings, to_aimet
from hawq_lightning.export.onnx._compare import Agreement, compare
from hawq_lightning.export.onnx._detections import OnnxDetector, detections
from hawq_lightning.export.onnx._export import float_onnx, to_onnx, to_program
from hawq_lightning.export.onnx._ports import Port
from hawq_lightning.export.onnx._qonnx import QonnxAgreement, Widths, compare_qonnx, to_qonnx
from hawq_lightning.export.onnx._session import RUNTIMES, check_runtime, integer_kernels, open_session, session
from hawq_lightning.export.onnx._speed import layer_latencies, measure_file, vector_instructions, write_table
from hawq_lightning.export.onnx._storage import Storage
from hawq_lightning.export.onnx._tensorrt import SymmetricFile, to_tensorrt
from hawq_lightning.export.onnx.integer_only import (
    IntegerNetwork,
    IntegerOnly,
    KernelDifferences,
    LayerDifference,
    kernel_differences,
    to_integer_only,
)

__all__ = [
    "RUNTIMES",
    "Agreement",
    "Encodings",
    "IntegerNetwork",
    "IntegerOnly",
    "KernelDifferences",
    "LayerDifference",
    "OnnxDetector",
    "Port",
    "QonnxAgreement",
    "Storage",
    "SymmetricFile",
    "Widths",
    "check_runtime",
    "compare",
    "compare_qonnx",
    "detections",
    "float_onnx",
    "integer_kernels",
    "kernel_differences",
    "layer_latencies",
    "measure_file",
    "open_session",
    "session",
    "to_aimet",
    "to_integer_only",
    "to_onnx",
    "to_program",
    "to_qonnx",
    "to_tensorrt",
    "vector_instructions",
    "write_table",
]
