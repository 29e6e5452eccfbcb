"""How fast the ONNX files run: float, onnxruntime's own quantizer, ours exact, ours for integer kernels.

    python benchmarks/export_speed.py [--models resnet20,demo] [--rounds 15] [--out benchmarks/results/export_speed.md]

Weights are random; widths 2, 3, 4, 5, 6 and 8 take turns over the layers, activations have 8 bits. One thread; CPU time
of the process, since others use the machine; variants take turns in every round and medians are compared. With the
extra ``openvino`` the same files run there as well, beside OpenVINO's own float (asked for float32).
"""

from __future__ import annotations

import argparse
import collections
import copy
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from export import turns
from torch import nn

from hawq_lightning import quantize, sites
from hawq_lightning.export import network_of, to_onnx
from hawq_lightning.export.onnx import float_onnx, integer_kernels, open_session, session
from hawq_lightning.models import resnet20, resnet50, retinanet_resnet50, squeezenext

Run = Callable[[np.ndarray], object]
RUNS_SECONDS = 0.04  # of one variant in one round
BIG, SMALL, GREY = (3, 224, 224), (3, 32, 32), (1, 8, 8)


def mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2 as make

    return make(num_classes=100)


def vit() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224", depth=4, num_classes=100)


# network, shape of an image, batch, what "integer" must reach (none: reported)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float | None]] = {
    "resnet20": (resnet20, SMALL, 1, 2.0),
    "resnet50": (resnet50, BIG, 1, 3.0),
    "squeezenext": (squeezenext, BIG, 1, 2.0),
    "mobilenet_v2": (mobilenet_v2, BIG, 1, 1.8),
    "vit": (vit, BIG, 1, 2.1),
    "retinanet_resnet50": (retinanet_resnet50, (3, 256, 320), 1, None),
    "demo": (partial(resnet20, in_channels=1), GREY, 1, 1.3),
    "demo, 32 images": (partial(resnet20, in_channels=1), GREY, 32, 2.0),
}


def onnx_run(name: str, folder: Path) -> Run:
    """A file in onnxruntime."""
    path = folder / f"{name}.onnx"
    run = session(path, 1, integers=integer_kernels(path))
    return lambda x: run.run(None, {"input": x})


def openvino_run(name: str, folder: Path) -> Run:
    """A file in OpenVINO."""
    run = open_session("openvino", folder / f"{name}.onnx", 1)
    return lambda x: run.run(None, {"input": x})


VARIANTS: dict[str, Callable[[Path], Run]] = {
    name: partial(onnx_run, name) for name in ("float", "quantize_static", "exact", "integer")
}
OPENVINO = importlib.util.find_spec("openvino") is not None
if OPENVINO:
    VARIANTS |= {f"OpenVINO {name}": partial(openvino_run, name) for name in ("float", "exact", "integer")}


class Calibration:
    """Images for onnxruntime's quantizer."""

    def __init__(self, images: np.ndarray) -> None:
        self.left = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next image, as onnxruntime asks for it."""
        image = next(self.left, None)
        return None if image is None else {"input": image[None]}


def write_static(folder: Path, images: torch.Tensor) -> None:
    """What onnxruntime's own quantizer makes of the float file: all weights 8 bits."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = folder / "ready.onnx"
    quant_pre_process(folder / "float.onnx", ready, skip_symbolic_shape=True)
    quantize_static(
        ready, folder / "quantize_static.onnx", Calibration(images.numpy()), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def operators(path: Path) -> collections.Counter[str]:
    """Those that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = f"{path}.optimized"
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(n.op_type for n in onnx.load(f"{path}.optimized").graph.node)


def measured(name: str, rounds: int, folder: Path) -> list[str]:
    """One row of the table."""
    make, shape, batch, least = MODELS[name]
    torch.manual_seed(0)
    net = network_of(make())
    x = torch.randn(8, *shape)
    with torch.no_grad():  # BatchNorms of random networks have seen nothing
        net.train()(x)
    net.eval()
    float_onnx(net, x[:2], folder / "float.onnx")
    write_static(folder, x)
    quantized = copy.deepcopy(net)
    plan = turns(quantized, sites(quantized, x[:2]), x)
    quantize(quantized, plan)
    to_onnx(quantized, plan, x[:2], folder / "exact.onnx")
    to_onnx(quantized, plan, x[:2], folder / "integer.onnx", integer=True, calibration=[x])
    runs = {k: start(folder) for k, start in VARIANTS.items()}
    images = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
    times: dict[str, list[float]] = {k: [] for k in runs}
    calls = {k: max(1, int(RUNS_SECONDS / cpu_seconds(run, images, 2))) for k, run in runs.items()}
    for _ in range(rounds):
        for k, run in runs.items():
            times[k].append(cpu_seconds(run, images, calls[k]))
    seconds = {k: float(np.median(v)) for k, v in times.items()}
    ratios = {k: seconds["OpenVINO float" if k.startswith("OpenVINO") else "float"] / v for k, v in seconds.items()}
    found = operators(folder / "integer.onnx")
    left = {k: found[k] for k in ("Conv", "Gemm", "MatMul", "DequantizeLinear") if found[k]}
    whole = sum(v for k, v in found.items() if k.startswith(("QLinear", "QGemm", "MatMulInteger")))
    size = {k: (folder / f"{k}.onnx").stat().st_size for k in ("float", "quantize_static", "exact", "integer")}
    print(f"{name}: {ratios['integer']:.2f}x, wanted {least}", flush=True)
    return [
        name,
        f"{1000 * seconds['float']:.2f} ms",
        *(f"{ratios[k]:.2f}" for k in runs if not k.endswith("float")),
        "none" if least is None else f"{least:.1f}",
        f"{whole}",
        ", ".join(f"{v} {k}" for k, v in left.items()) or "none",
        *(f"{v:,}" for v in size.values()),
    ]


def cpu_seconds(run: Run, x: np.ndarray, calls: int) -> float:
    """CPU time of one call."""
    start = time.process_time()
    for _ in range(calls):
        run(x)
    return (time.process_time() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=";".join(MODELS), help="separated by semicolons")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the table there as well")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    heads = ["model", "float", *(f"{k}, x" for k in VARIANTS if not k.endswith("float")), "wanted", "integer kernels",
             "left in float", "float, bytes", "quantize_static", "exact", "integer"]  # fmt: skip
    rows = []
    for name in args.models.split(";"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(name, args.rounds, Path(folder)))
    lines = [f"| {' | '.join(r)} |" for r in (heads, ["---"] + ["---:"] * (len(heads) - 1), *rows)]
    text = "\n".join(
        [
            "# How fast the ONNX files run",
            "",
            f"Made by `benchmarks/export_speed.py`, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, "
            "one thread of a shared machine (AMD EPYC with AVX512-VNNI); CPU time, medians of interleaved rounds. x: "
            "times faster than float in the same run. Exact files run with `session.disable_quant_qdq`."
            + (f" OpenVINO {version('openvino')} is over its own float, in float32." if OPENVINO else ""),
            "",
            *lines,
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
