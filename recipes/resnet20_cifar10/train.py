"""ResNet20 on CIFAR-10: an ordinary Trainer, one added callback.

python recipes/resnet20_cifar10/train.py /data/cifar10 /data/resnet20_cifar10.pt --budget 8x
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lightning.pytorch as pl

from hawq_lightning import HAWQ, MeasureConfig, SelectConfig, save_packed
from hawq_lightning.data import ImageFolderDataModule
from hawq_lightning.models import resnet20
from hawq_lightning.tasks import ClassificationTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("weights", help="state dict of the float network")
    parser.add_argument("--budget", default="8x")
    parser.add_argument("--selector", default="pareto", help="pareto, or uniform for one width everywhere")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8], help="weight widths to choose from")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/resnet20_cifar10"))
    args = parser.parse_args()

    pl.seed_everything(args.seed)
    data = ImageFolderDataModule(args.data, num_classes=10, augment="shift_flip", memory=True)
    task = ClassificationTask(resnet20(weights=args.weights), num_classes=10, lr=args.lr)
    measure, select = MeasureConfig(seed=args.seed), SelectConfig(args.budget, args.selector)
    hawq = HAWQ(args.bits, 8, measure=measure, select=select, dirpath=args.out)
    trainer = pl.Trainer(max_epochs=args.epochs, callbacks=[hawq], logger=False, enable_checkpointing=False)
    before = trainer.validate(task, data, verbose=False)[0]["val/acc"]
    trainer.fit(task, data)
    after = trainer.callback_metrics["val/acc"].item()

    size = save_packed(task, hawq.plan, args.out / "model.safetensors")
    found = {"float": before, "fine_tuned": after, "w_comp": hawq.plan.costs["w_comp"], "file_bytes": size}
    (args.out / "result.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
