"""RetinaNet on COCO: an ordinary Trainer, one added callback.

python recipes/retinanet_coco/train.py /data/coco RUN/checkpoints/float/last.ckpt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl

from hawq_lightning import HAWQ, MeasureConfig, save_packed
from hawq_lightning.data import CocoData
from hawq_lightning.models import retinanet_resnet50
from hawq_lightning.tasks import DetectionTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder with train2017/, val2017/ and annotations/")
    parser.add_argument("weights", help="state dict or checkpoint of the float network")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), help="short side, bound of the long side")
    parser.add_argument("--act", default="7.62x", help="A-Comp to reach with 4, 6 and 8 bits")
    parser.add_argument("--batch", type=int, default=2, help="images a process")
    parser.add_argument("--images", type=int, default=256, help="to measure traces on")
    parser.add_argument("--rtol", type=float, default=0.05, help="standard error of a trace to reach")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/retinanet_coco"))
    args = parser.parse_args()

    pl.seed_everything(args.seed, workers=True)
    data = CocoData(
        args.data, num_classes=args.classes, batch_size=args.batch, num_workers=args.workers, bad_boxes="fix"
    )
    net = retinanet_resnet50(args.classes, weights=args.weights, min_size=args.size[0], max_size=args.size[1])
    task = DetectionTask(net, optimizer="sgd", lr=0.001, schedule="cosine")
    budget = {"weights": "8.10x", "act": args.act}
    measure = MeasureConfig(images=args.images, rtol=args.rtol, seed=args.seed)
    hawq = HAWQ((3, 4, 8), (4, 6, 8), budget, measure=measure, dirpath=args.out)
    trainer = pl.Trainer(max_epochs=args.epochs, callbacks=[hawq], logger=False, default_root_dir=args.out)
    trainer.fit(task, data)
    if trainer.is_global_zero:
        size = save_packed(task, hawq.plan, args.out / "model.safetensors")
        smaller = f"{hawq.plan.costs['w_comp']:.2f}x smaller weights"
        print(f"mAP {trainer.callback_metrics['val/map']:.4f}, {smaller}, {size} bytes")


if __name__ == "__main__":
    main()
