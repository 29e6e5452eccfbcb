"""Training what is deployed: does the integer file compute the network that was trained with ``deploy="integer"``?

    python benchmarks/integer_training.py --weights resnet20_cifar10.pt --root cifar10 [--images 5000] [--steps 60]

Trained ResNet20 is quantized by the callback (8x, activations of 8 and of 4 bits), fine-tuned for some steps on
CIFAR-10 and written as an integer file and as an exact one; both run in onnxruntime. With ``deploy="exact"`` the
integer file's own grids are calibrated on 512 training images; with ``deploy="integer"`` nothing is. The packed file
must reload to the bit.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import onnxruntime
import torch
from other_tools import Row, images, table
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning import HAWQ, HawqError, MeasureConfig, QuantizerConfig, SelectConfig, load_packed, save_packed
from hawq_lightning.export import to_onnx
from hawq_lightning.export.onnx import session
from hawq_lightning.models import resnet20
from hawq_lightning.tasks import ClassificationTask

CASES = (("exact", 8), ("integer", 8), ("exact", 4), ("integer", 4))
BATCH, CALIBRATED = 128, 512


@torch.no_grad()
def logits(net: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    """Of the fake-quant network."""
    return torch.cat([net(part) for part in x.split(250)]).numpy()


def run(path: Path, x: torch.Tensor, integers: bool) -> np.ndarray:
    """Logits of a file in onnxruntime."""
    opened = session(path, 1, integers=integers)
    return np.concatenate([opened.run(None, {"input": part.numpy()})[0] for part in x.split(250)])


def measured(args: argparse.Namespace, deploy: str, bits: int, folder: Path) -> Row:
    """One row."""
    pl.seed_everything(1, verbose=False)
    x, y = images(args.root, "train", BATCH * args.steps)
    pictures, truth = images(args.root, "val", args.images)
    task = ClassificationTask(resnet20(weights=args.weights), num_classes=10, lr=0.01)
    hawq = HAWQ(
        quantizer=QuantizerConfig(weight_bits=(2, 3, 4, 5, 6, 8), activation_bits=bits, deploy=deploy),
        measure=MeasureConfig(images=64, max_probes=8), select=SelectConfig("8x"), dirpath=folder, progress=False,
    )  # fmt: skip
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
              "enable_model_summary": False, "limit_val_batches": 0, "accelerator": "cpu"}  # fmt: skip
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)
    pl.Trainer(max_steps=args.steps, callbacks=[hawq], **silent).fit(task, loader)
    net = task.net.eval()
    ours = logits(net, pictures)
    calibration = None if deploy == "integer" else [x[:CALIBRATED]]
    made = to_onnx(net, None, x[:2], folder / "integer.onnx", integer=True, calibration=calibration)
    to_onnx(net, None, x[:2], folder / "exact.onnx")
    integer, exact = (run(folder / f"{k}.onnx", pictures, k == "integer") for k in ("integer", "exact"))
    save_packed(task, hawq.plan, folder / "model.safetensors")
    again = load_packed(folder / "model.safetensors", resnet20()).eval()
    if not np.array_equal(logits(again, pictures[:500]), ours[:500]):
        raise HawqError("The reloaded network gives other outputs.")
    classes = {k: v.argmax(1) for k, v in (("ours", ours), ("integer", integer), ("exact", exact))}
    right = {k: f"{100 * (v == truth.numpy()).mean():.2f}" for k, v in classes.items()}
    row: Row = {
        "deploy": deploy, "activations": f"{bits} bits", "accuracy": right["ours"],
        "its integer file": right["integer"],
        "same class": f"{int((classes['integer'] == classes['ours']).sum()):,} of {len(pictures):,}",
        "exact file": f"{int((classes['exact'] == classes['ours']).sum()):,}",
        "grids calibrated": made.grids,
    }  # fmt: skip
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="of ResNet20, a state dict")
    parser.add_argument("--root", type=Path, required=True, help="folder of CIFAR-10 with train/ and val/")
    parser.add_argument("--images", type=int, default=5000, help="whose classes are compared")
    parser.add_argument("--steps", type=int, default=60, help="of fine-tuning, 128 images each")
    parser.add_argument("--out", type=Path, help="write the table there as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    for deploy, bits in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(args, deploy, bits, Path(folder)))
    text = "\n".join(
        [
            "# Training what is deployed",
            "",
            f"Made by `benchmarks/integer_training.py`, onnxruntime {onnxruntime.__version__}. ResNet20, CIFAR-10 "
            f"(`val`), 8x, {args.steps} steps of fine-tuning. Accuracies differ by chance: their standard error is "
            "0.46 points.",
            "",
            *table(rows),
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
