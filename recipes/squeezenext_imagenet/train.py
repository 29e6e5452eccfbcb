"""SqueezeNext on ImageNet: an ordinary Trainer, one added callback.

python recipes/squeezenext_imagenet/train.py /data/imagenet
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl

from hawq_lightning import HAWQ, MeasureConfig, save_packed
from hawq_lightning.data import ImageFolderDataModule
from hawq_lightning.models import squeezenext
from hawq_lightning.tasks import ClassificationTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder with train/<wnid>/ and val/<wnid>/")
    parser.add_argument("--weights", help="state dict of the float network; default: download")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=128, help="images a process")
    parser.add_argument("--images", type=int, default=512, help="to measure traces on")
    parser.add_argument("--rtol", type=float, default=0.05, help="standard error of a trace to reach")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/squeezenext_imagenet"))
    args = parser.parse_args()

    pl.seed_everything(args.seed, workers=True)
    data = ImageFolderDataModule(
        args.data, size=args.size, resize=round(args.size * 8 / 7), batch_size=args.batch, augment="resized_crop",
        num_classes=args.classes, num_workers=args.workers,
    )  # fmt: skip
    net = squeezenext(args.classes, pretrained=args.weights is None, weights=args.weights)
    task = ClassificationTask(net, args.classes, lr=0.01, weight_decay=1e-5, schedule="cosine")
    budget = "9.40x"
    measure = MeasureConfig(images=args.images, rtol=args.rtol, seed=args.seed)
    hawq = HAWQ((3, 4, 8), 8, budget, measure=measure, dirpath=args.out)
    trainer = pl.Trainer(max_epochs=args.epochs, callbacks=[hawq], logger=False, default_root_dir=args.out)
    trainer.fit(task, data)
    if trainer.is_global_zero:
        size = save_packed(task, hawq.plan, args.out / "model.safetensors")
        smaller = f"{hawq.plan.costs['w_comp']:.2f}x smaller weights"
        print(f"top-1 {trainer.callback_metrics['val/acc']:.4f}, {smaller}, {size} bytes")


if __name__ == "__main__":
    main()
