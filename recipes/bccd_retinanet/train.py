"""A small RetinaNet on BCCD: float training by an ordinary Trainer, then another with one added callback.

python recipes/bccd_retinanet/train.py /data/bccd
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl

from hawq_lightning import HAWQ, MeasureConfig, save_packed
from hawq_lightning.data import CocoData
from hawq_lightning.models import retinanet_resnet18
from hawq_lightning.tasks import DetectionTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder with train2017/, val2017/ and annotations/")
    parser.add_argument("--weights", help="state dict or checkpoint of the float network; its training is then skipped")
    parser.add_argument("--budget", default="8x")
    parser.add_argument("--float-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=32, help="to measure traces on")
    parser.add_argument("--rtol", type=float, default=0.2, help="standard error of a trace to reach")
    parser.add_argument("--subset", type=int, help="use only this many images of each split")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bccd_retinanet"))
    args = parser.parse_args()

    pl.seed_everything(args.seed, workers=True)
    data = CocoData(args.data, num_classes=3, longest=320, vflip=True, subset=args.subset)
    task = DetectionTask(retinanet_resnet18(3, weights=args.weights, anchor_size=16), lr=1e-3)
    common = {"logger": False, "enable_checkpointing": False, "gradient_clip_val": 10.0, "default_root_dir": args.out}
    if args.weights is None:
        pl.Trainer(max_epochs=args.float_epochs, limit_val_batches=0, **common).fit(task, data)
    trainer = pl.Trainer(max_epochs=args.epochs, **common)
    before = trainer.validate(task, data, verbose=False)[0]

    task.lr = 1e-4
    bits = (2, 3, 4, 5, 6, 8)
    measure = MeasureConfig(images=args.images, rtol=args.rtol, seed=args.seed)
    hawq = HAWQ(bits, 8, args.budget, measure=measure, dirpath=args.out)
    trainer = pl.Trainer(max_epochs=args.epochs, callbacks=[hawq], **common)
    trainer.fit(task, data)
    size = save_packed(task, hawq.plan, args.out / "model.safetensors")
    after = trainer.callback_metrics
    print(f"mAP {before['val/map']:.4f} -> {after['val/map']:.4f}, AP50 {after['val/map_50']:.4f}, {size} bytes")


if __name__ == "__main__":
    main()
