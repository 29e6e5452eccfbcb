"""ONNX files: writing them, comparing them with the network, and how fast they run."""

from hawq_lightning.export.onnx._compare import Agreement, compare
from hawq_lightning.export.onnx._detections import OnnxDetector, detections
from hawq_lightning.export.onnx._export import float_onnx, to_onnx, to_program
from hawq_lightning.export.onnx._session import integer_kernels, session
from hawq_lightning.export.onnx._speed import layer_latencies, measure_file, vector_instructions, write_table
from hawq_lightning.export.onnx._storage import Storage

__all__ = [
    "Agreement",
    "OnnxDetector",
    "Storage",
    "compare",
    "detections",
    "float_onnx",
    "integer_kernels",
    "layer_latencies",
    "measure_file",
    "session",
    "to_onnx",
    "to_program",
    "vector_instructions",
    "write_table",
]
