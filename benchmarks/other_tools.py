"""The exported files in the tools that they are for: trained ResNet20, real images, one tool a run.

    python benchmarks/other_tools.py qonnx --weights resnet20_cifar10.pt --root cifar10 [--images 40]

Each tool wants an environment of its own, so a run measures one of them and keeps its figures in
benchmarks/results/other_tools.json; other_tools.md is written anew from all of them. Weights have 4, 5, 6 and 8 bits in
turn, activations 8 over the range of 256 training images; nothing is fine-tuned.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from export import turns
from torch import nn

from hawq_lightning import quantize, sites
from hawq_lightning.export import (
    compare,
    compare_executorch,
    compare_litert,
    export,
    to_executorch,
    to_litert,
    to_torchao,
)
from hawq_lightning.export.onnx import compare_qonnx, float_onnx, open_session
from hawq_lightning.models import resnet20

RESULTS = Path(__file__).parent / "results" / "other_tools.json"
WIDTHS = (4, 5, 6, 8)
Row = dict[str, object]
TURN = 0.04  # seconds of one program's calls at a time


def images(root: Path, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of a fixed random order, normalised, and their classes."""
    from torchvision import datasets, transforms

    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    data = datasets.ImageFolder(str(root / split), transforms.Compose([transforms.ToTensor(), normalise]))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return torch.stack([data[i][0] for i in order]), torch.tensor([data[i][1] for i in order])


def trained(weights: Path, x: torch.Tensor, widths: tuple[int, ...] = WIDTHS, code: str = "affine"):
    net = resnet20(weights=weights).eval()
    plan = turns(net, sites(net, x[:2]), x, widths, code)
    return quantize(net, plan), plan


def qonnx(args: argparse.Namespace, folder: Path) -> list[Row]:
    x, _ = images(args.root, "train", 256)
    pictures, _ = images(args.root, "val", args.images or 40)
    rows: list[Row] = []
    for code, widths in (("affine", WIDTHS), ("midrise", (1, 2, 4, 7))):
        net, plan = trained(args.weights, x, widths, code)
        path = folder / "model.qonnx.onnx"
        declared = export(net, plan, path, "qonnx", example_input=x[:2])
        found = compare_qonnx(net, path, [pictures])
        macs = {y.name: y.macs for y in plan.layers}
        rows.append({
            "plan": f"{code}, {'/'.join(map(str, widths))} bits", "bytes": path.stat().st_size,
            "same class": f"{found.same} of {found.images}", "largest difference": f"{found.difference:.2g}",
            "BOPs, qonnx": f"{found.bops:,}",
            "BOPs, declared widths": f"{sum(n * declared.weights[k] * declared.reads[k] for k, n in macs.items()):,}",
            "BOPs, plan": f"{sum(y.macs * plan[y.weight].bits * plan[y.activation].bits for y in plan.layers):,}",
            "wider than the plan": f"{len(declared.wider)} of {len(plan.sites)} sites",
        })  # fmt: skip
    return rows


def aimet(args: argparse.Namespace, folder: Path) -> list[Row]:
    import onnx
    from aimet_onnx.quantsim import QuantizationSimModel, load_encodings_to_sim

    x, _ = images(args.root, "train", 256)
    pictures, _ = images(args.root, "val", args.images or 64)
    rows: list[Row] = []
    net, plan = trained(args.weights, x)
    with torch.no_grad():
        expected = net(pictures).numpy()
    for fold in (True, False):
        written = export(net, plan, folder / "m.aimet.onnx", "aimet", example_input=x[:2], fold=fold)
        for form in ("m.aimet.encodings", "m.aimet.0_6_1.encodings"):
            simulator = QuantizationSimModel(onnx.load(str(folder / "m.aimet.onnx")))
            load_encodings_to_sim(simulator, str(folder / form), strict=False)
            run = simulator.session.run
            actual = np.concatenate([run(None, {"input": image[None].numpy()})[0] for image in pictures])
            rows.append({
                "file": form, "BatchNorm": "folded" if fold else "as it is",
                "encodings": f"{len(written.weights)} + {len(written.activations)}",
                "bits": "/".join(map(str, sorted(set(written.weights.values())))),
                "codes clamped": sum(written.clamped.values()),
                "same class": f"{int((expected.argmax(1) == actual.argmax(1)).sum())} of {len(pictures)}",
                "largest difference": f"{np.abs(expected - actual).max():.2g}",
            })  # fmt: skip
    return rows


def torchao(args: argparse.Namespace, folder: Path) -> list[Row]:
    rows: list[Row] = []
    torch.set_num_threads(1)
    for width, reads in ((512, 64), (1024, 64), (2048, 64), (1024, 1)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)).eval()
        x = torch.randn(reads + 1, width)
        whole = copy.deepcopy(net)
        quantize(net, plan := turns(net, sites(net, x), x, WIDTHS))
        made = to_torchao(net, plan, x)
        layers = [(made.model[i], net[i]) for i in (0, 2)]
        equal = all(torch.equal(a.weight.dequantize(), b.quantized_weight) for a, b in layers)
        x = x[:reads]
        with torch.no_grad():
            apart = (made.model(x) - net(x)).abs().max() / net(x).abs().max()
            runs = [whole, made.model, torch.compile(whole), torch.compile(made.model)]
            times = interleaved([partial(f, x) for f in runs])
        rows.append({
            "network": f"2 x Linear({width}, {width}), {reads} rows", "weights bit-equal": "yes" if equal else "NO",
            "difference / largest output": f"{float(apart):.2g}", "float, ms": f"{times[0]:.3f}",
            "torchao, x of float": f"{times[0] / times[1]:.2f}",
            "compiled, x of float compiled": f"{times[2] / times[3]:.2f}",
        })  # fmt: skip
    return rows


def interleaved(runs: list[Callable[[], object]], rounds: int = 15) -> list[float]:
    """Median milliseconds of CPU time of a call of each, in turns of many calls."""
    calls = [max(1, int(TURN / max(_seconds(run, 3), 1e-6))) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken, n in zip(runs, times, calls):
            taken.append(1000 * _seconds(run, n))
    return [statistics.median(t) for t in times]


def _seconds(run: Callable[[], object], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def openvino(args: argparse.Namespace, folder: Path) -> list[Row]:
    x, _ = images(args.root, "train", 256)
    pictures, classes = images(args.root, "val", args.images or 5000)
    net, plan = trained(args.weights, x, (8,))
    floats = resnet20(weights=args.weights).eval()
    float_onnx(floats, x[:2], folder / "float.onnx")
    export(net, plan, folder / "model.onnx", example_input=x[:2])
    rows: list[Row] = []
    feeds = {n: {"input": pictures[:n].numpy()} for n in (1, 32)}
    for runtime in ("openvino", "onnxruntime"):
        integers = runtime == "openvino"
        runs = {n: open_session(runtime, folder / n, 1, integers) for n in ("float.onnx", "model.onnx")}
        agreement = compare(net, folder / "model.onnx", pictures.split(100), codes=False, runtime=runtime)
        logits = np.concatenate([runs["model.onnx"].run(None, {"input": b.numpy()})[0] for b in pictures.split(100)])
        row: Row = {"runtime": runtime, "same class": f"{agreement.same} of {agreement.images}",
                    "accuracy": f"{100 * (logits.argmax(1) == classes.numpy()).mean():.2f}"}  # fmt: skip
        for n, feed in feeds.items():
            times = interleaved([partial(run.run, None, feed) for run in runs.values()])
            row |= {f"float, ms, {n}": f"{times[0]:.2f}", f"x of its float, {n}": f"{times[0] / times[1]:.2f}"}
        rows.append(row)
    return rows


def executorch(args: argparse.Namespace, folder: Path) -> list[Row]:
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(1)  # its pool has as many threads as the machine has cores

    def load(path: Path) -> Callable[[torch.Tensor], object]:
        program = Runtime.get().load_program(str(path))
        method = program.load_method("forward")
        return lambda x, keep=program: method.execute([x])  # a method dies with its program

    return mobile(args, folder, "executorch", to_executorch, compare_executorch, load)


def litert(args: argparse.Namespace, folder: Path) -> list[Row]:
    from ai_edge_litert.interpreter import Interpreter

    def load(path: Path) -> Callable[[torch.Tensor], object]:
        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
        takes = interpreter.get_input_details()[0]
        images = np.zeros(takes["shape"], takes["dtype"])

        def run(x: torch.Tensor) -> None:
            interpreter.set_tensor(takes["index"], images)
            interpreter.invoke()

        return run

    return mobile(args, folder, "litert", to_litert, compare_litert, load)


def micro(path: Path, pictures: torch.Tensor) -> str:
    """Classes of the file in the microcontrollers' interpreter beside those in LiteRT's."""
    try:
        from tflite_micro import runtime
    except ModuleNotFoundError:
        return "no tflite-micro"
    from ai_edge_litert.interpreter import Interpreter

    whole = Interpreter(str(path), num_threads=1)
    whole.allocate_tensors()
    takes, gives = whole.get_input_details()[0], whole.get_output_details()[0]
    small = runtime.Interpreter.from_file(str(path), arena_size=4 << 20)
    scale, zero = takes["quantization"]
    same = equal = 0
    for image in pictures.numpy():
        codes = np.clip(np.round(image[None] / scale) + zero, -128, 127).astype(np.int8)
        whole.set_tensor(takes["index"], codes)
        whole.invoke()
        small.set_input(codes, 0)
        small.invoke()
        a, b = whole.get_tensor(gives["index"]), small.get_output(0)
        same, equal = same + int(a.argmax() == b.argmax()), equal + int((a == b).all())
    return f"{same} of {len(pictures)}, {equal} bit for bit"


def mobile(args, folder, name, write, compare_with, load) -> list[Row]:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    x, _ = images(args.root, "train", 256)
    pictures, _ = images(args.root, "val", args.images or 1000)
    float_onnx(resnet20(weights=args.weights).eval(), x[:2], folder / "float.onnx")
    whole = open_session("onnxruntime", folder / "float.onnx", 1)
    one = pictures[:1].contiguous()
    rows: list[Row] = []
    for widths in ((8,), WIDTHS):
        net, plan = trained(args.weights, x, widths)
        path = folder / f"model.{name}"
        written = write(net, plan, x[:2], path, batches=[x])
        agreement = compare_with(net, path, [pictures])
        feed = {"input": one.numpy()}
        run = load(path)
        times = interleaved([partial(whole.run, None, feed), partial(run, one)])
        rows.append({
            "weights": "/".join(map(str, widths)), "bytes": path.stat().st_size,
            "grids": f"{written.integers.planned} planned, {written.integers.calibrated} calibrated",
            "codes clamped": sum(written.integers.clamped.values()),
            **({"delegates": written.delegates, "left": len(written.left)} if name == "executorch" else {}),
            **({"TFLM gives LiteRT's class": micro(path, pictures)} if name == "litert" else {}),
            "same class": f"{agreement.same} of {agreement.images} ({agreement.same / agreement.images:.1%})",
            "ms": f"{times[1]:.3f}", "x of onnxruntime float": f"{times[0] / times[1]:.2f}",
        })  # fmt: skip
    return rows


TOOLS: dict[str, tuple[Callable[[argparse.Namespace, Path], list[Row]], str]] = {
    "openvino": (openvino, "## OpenVINO (f32 hint, one thread) and the exact file of 8 bits everywhere,"),
    "executorch": (executorch, "## ExecuTorch (XNNPACK, one image, one thread),"),
    "litert": (litert, "## LiteRT (int8 in and out, one image, one thread), ai-edge-litert"),
    "qonnx": (qonnx, "## QONNX, run and counted by qonnx"),
    "aimet": (aimet, "## AIMET encodings, loaded by AIMET-ONNX's simulator"),
    "torchao": (torchao, "## torchao, linear layers alone, one thread"),
}


def table(rows: list[Row]) -> list[str]:
    heads = list(rows[0])
    body = [[str(v) for v in row.values()] for row in rows]
    return [f"| {' | '.join(r)} |" for r in (heads, ["---"] * len(heads), *body)]


def version(tool: str) -> str:
    from importlib.metadata import version as of

    return of({"aimet": "aimet-onnx", "litert": "ai-edge-litert"}.get(tool, tool))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=sorted(TOOLS))
    parser.add_argument("--weights", type=Path, help="of ResNet20, a state dict")
    parser.add_argument("--root", type=Path, help="folder of CIFAR-10 with train/ and val/")
    parser.add_argument("--images", type=int, help="compared")
    args = parser.parse_args()
    kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        rows = TOOLS[args.tool][0](args, Path(folder))
    kept[args.tool] = {"version": version(args.tool), "torch": torch.__version__, "rows": rows}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    lines = ["# The exported files in the tools that they are for", "",
             "Made by `benchmarks/other_tools.py`, one run a tool. Trained ResNet20, CIFAR-10 (`val`), weights of "
             f"{', '.join(map(str, WIDTHS))} bits in turn unless told, 8-bit activations, not fine-tuned.", "",
    ]  # fmt: skip
    for tool, (_, title) in TOOLS.items():
        if tool in kept:
            lines += [f"{title} {kept[tool]['version']}", "", *table(kept[tool]["rows"]), ""]
    RESULTS.with_suffix(".md").write_text("\n".join(lines), "utf-8")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
