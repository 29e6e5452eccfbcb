"""Print the card and the versions that the figures belong to."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def main() -> None:
    """One line a fact."""
    print("python", platform.python_version())
    for name in ("torch", "torchvision", "lightning", "triton", "onnx", "onnxscript", "onnxruntime", "hydra-core"):
        try:
            print(name, version(name))
        except PackageNotFoundError:
            print(name, "missing")
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        print(f"card {i}: {card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    if not torch.cuda.is_available():
        print("no GPU: every test is skipped")


if __name__ == "__main__":
    main()
