"""Packages that only this package's extras install."""

from __future__ import annotations

import importlib
from typing import Any

from hawq_lightning._errors import HawqError

_EXTRA_OF = {
    "torchvision": "vision", "pytorchcv": "vision", "faster_coco_eval": "detection",
    "onnx": "export", "onnxscript": "export", "onnxruntime": "export",
    "qonnx": "qonnx", "torchao": "torchao", "openvino": "openvino",
    "executorch": "executorch", "litert_torch": "litert", "ai_edge_litert": "litert",
    "bitarray": "huffman", "stable_baselines3": "search", "gymnasium": "search", "optuna": "search",
}  # fmt: skip


def require(module: str) -> Any:
    """Import an optional dependency.

    Args:
        module: dotted name.

    Raises:
        HawqError: it is not installed or cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        extra = _EXTRA_OF.get(package)
        target = f"'hawq-lightning[{extra}]'" if extra else package.replace("_", "-")
        raise HawqError(f"This needs {package} ({error}): pip install {target}.") from error
