"""Integer-only inference of trained ResNet20: is it the same everywhere, and how far from onnxruntime's kernels?

    python benchmarks/integer_only.py --weights resnet20_cifar10.pt --root cifar10 [--images 5000] [--numpy 1000]

The program of integers runs in numpy, its ONNX certificate in onnxruntime and in onnx's own evaluator. Classes are
compared with the fake-quant network and with onnxruntime's integer kernels, which multiply by float scales; codes of
every layer with those kernels. Weights have 8 bits, or 4, 5, 6 and 8 in turn; activations 8 over the range of 256
training images; nothing is fine-tuned. The script fails where anything is not equal to the bit, or fewer than 998 of
1,000 classes are the kernels'.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from other_tools import WIDTHS, Row, images, table, trained

from hawq_lightning import HawqError
from hawq_lightning.export import kernel_differences, to_integer_only
from hawq_lightning.export.onnx import open_session, session

# weights' bits in turn, bits of multipliers
CASES = (((8,), 31), ((8,), 16), ((8,), 12), (WIDTHS, 31))
REFERENCE = 2  # images for onnx's evaluator, which is slow
LEAST = 0.998  # of classes, with multipliers of 31 bits


def classes(run: object, pictures: torch.Tensor) -> np.ndarray:
    """Of all images."""
    return np.concatenate([run.run(None, {"input": x.numpy()})[0].argmax(1) for x in pictures.split(100)])  # type: ignore[attr-defined]


@torch.no_grad()
def measured(args: argparse.Namespace, widths: tuple[int, ...], bits: int, folder: Path) -> tuple[Row, list[Row]]:
    """One row, and the layers' codes."""
    x, _ = images(args.root, "train", 256)
    pictures, truth = images(args.root, "val", args.images)
    net, plan = trained(args.weights, x, widths)
    path = folder / "model.onnx"
    made = to_integer_only(net, plan, x[:2], path, batches=[x], multiplier_bits=bits)
    (port,), run = made.network.outputs, session(path, 1)
    equal = 0
    for part in pictures[: args.numpy].split(50):
        codes = made.network.codes({"input": part.numpy()})
        ours, theirs = made.network.run(codes)[port.name], run.run(None, codes)[0]
        equal += int((ours == theirs).all(1).sum())
    codes = made.network.codes({"input": pictures[:REFERENCE].numpy()})
    evaluated = ReferenceEvaluator(onnx.load(str(path))).run(None, codes)[0]
    same = int((evaluated == made.network.run(codes)[port.name]).all(1).sum())
    found = {
        "integers": classes(open_session("onnxruntime", path, 1), pictures),
        "kernels": classes(session(made.kernels, 1), pictures),
        "fake-quant": torch.cat([net(part).argmax(1) for part in pictures.split(100)]).numpy(),
    }
    alike = {k: int((v == found["integers"]).sum()) for k, v in found.items()}
    apart = kernel_differences(made, [pictures[: args.numpy]])
    total = {k: sum(getattr(v, k) for v in apart.layers.values()) for k in ("codes", "differ", "one_step")}
    if equal != min(args.numpy, len(pictures)) or same != REFERENCE:
        raise HawqError(f"numpy and onnxruntime agree on {equal} images, with onnx's evaluator on {same}.")
    if bits == CASES[0][1] and alike["kernels"] < LEAST * len(pictures):
        raise HawqError(f"Only {alike['kernels']} of {len(pictures)} classes are those of the integer kernels.")
    row: Row = {
        "weights": "/".join(map(str, widths)), "multipliers": f"{bits} bits",
        "numpy = onnxruntime": f"{equal} of {args.numpy}", "= onnx's evaluator": f"{same} of {REFERENCE}",
        "accuracy": f"{100 * (found['integers'] == truth.numpy()).mean():.2f}",
        "of the kernels": f"{100 * (found['kernels'] == truth.numpy()).mean():.2f}",
        "of fake-quant": f"{100 * (found['fake-quant'] == truth.numpy()).mean():.2f}",
        "same class as the kernels": f"{alike['kernels']:,} of {len(pictures):,}",
        "as fake-quant": f"{alike['fake-quant']:,}",
        "codes that differ": f"{total['differ'] / total['codes']:.3%}",
        "in one step": f"{total['one_step']:,} of {total['codes']:,}",
    }  # fmt: skip
    layers: list[Row] = [
        {"gives codes": k, "codes": f"{v.codes:,}", "differ": f"{v.differ:,}", "in one step": v.one_step,
         "most": v.largest} for k, v in apart.layers.items()
    ]  # fmt: skip
    print(row, flush=True)
    return row, layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="of ResNet20, a state dict")
    parser.add_argument("--root", type=Path, required=True, help="folder of CIFAR-10 with train/ and val/")
    parser.add_argument("--images", type=int, default=5000, help="whose classes are compared")
    parser.add_argument("--numpy", type=int, default=1000, help="that numpy runs, and whose codes are compared")
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first so many")
    parser.add_argument("--out", type=Path, help="write the tables there as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    first: list[Row] = []
    for widths, bits in CASES[: args.cases]:
        with tempfile.TemporaryDirectory() as folder:
            row, layers = measured(args, widths, bits, Path(folder))
        rows.append(row)
        first = first or layers
    text = "\n".join(
        [
            "# Integer-only inference",
            "",
            f"Made by `benchmarks/integer_only.py`, onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}. "
            "Trained ResNet20, CIFAR-10 (`val`), not fine-tuned.",
            "",
            *table(rows),
            "",
            f"Codes of every layer beside onnxruntime's integer kernels, on {args.numpy} images, first row above. In "
            "one step: both start from onnxruntime's codes.",
            "",
            *table(first),
        ]
    )  # fmt: skip
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
