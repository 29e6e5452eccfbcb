"""A user's script for several processes: ``python -m tests.trainer.ddp_script FOLDER STRATEGY DEVICES [QUANTIZER]``."""

import sys

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from tests.trainers import CLASSES, FEATURES, Classifier, assert_mixed, blobs, hawq, loader, trainer

SEED = 5


class Report(Callback):
    """Every process tells what it holds before and after training."""

    def __init__(self, folder, callback):
        self.folder, self.callback = folder, callback

    def on_fit_end(self, trainer, pl_module):
        assert_mixed(pl_module, self.callback)
        known = self.callback.sensitivity if self.callback.measure_callback.has_sensitivity else None
        torch.save(
            {
                "state": pl_module.state_dict(), "plan": self.callback.plan.to_dict(),
                "traces": {r.name: r.trace for r in known or ()},
                "images": known and known.settings["images"], "world": trainer.world_size,
            },
            f"{self.folder}/rank{trainer.global_rank}.pt",
        )  # fmt: skip


class Plain(Classifier):
    """Without BatchNorm and Dropout, of which every process has its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, CLASSES)
        )


def learn(folder, strategy, devices, quantizer, plan=None):
    """Fit in batches that are, all processes together, the same 16 images a step."""
    torch.set_num_threads(1)
    seed_everything(SEED, verbose=False)
    callback = hawq(quantizer=quantizer, plan=plan, dirpath=folder)
    # Lightning gives several processes a sampler like this one
    sampler = DistributedSampler(blobs(), 1, 0, seed=SEED) if devices == 1 else None
    data = DataLoader(blobs(), 16 // devices, sampler=sampler)
    settings = {"strategy": strategy, "devices": devices, "max_epochs": 2}
    trainer(folder, callback, Report(folder, callback), **settings).fit(Plain(), data)
    print("done", flush=True)


def main(folder, strategy, devices):
    """Fit; then test in the process that the user sees."""
    torch.set_num_threads(1)
    seed_everything(SEED, verbose=False)
    model, callback = Classifier(), hawq()
    settings = {"strategy": strategy, "devices": devices, "max_epochs": 2}
    t = trainer(folder, callback, Report(folder, callback), **settings)
    t.fit(model, loader(8))
    assert len({s.bits for s in callback.plan.weights}) >= 2  # the parent of spawned processes knows the plan, too
    if strategy != "ddp":
        saved = torch.load(f"{folder}/rank0.pt", weights_only=True)
        alone = trainer(folder, callback).test(model, loader(shuffle=False), verbose=False)
        assert_mixed(model, callback)
        assert model.state_dict().keys() == saved["state"].keys()
        assert all(torch.equal(v, saved["state"][k]) for k, v in model.state_dict().items())
        again = trainer(folder).test(model, loader(shuffle=False), verbose=False)
        assert alone == again
    print("done", flush=True)


def by_loss(folder, strategy, devices):
    """Fit with a budget by loss, whose plans every process measures."""
    torch.set_num_threads(1)
    seed_everything(SEED, verbose=False)
    callback = hawq(weight_bits=(2, 3, 4, 8), budget={"kl": 0.004, "after": "batchnorm"})
    settings = {"strategy": strategy, "devices": devices, "max_epochs": 1}
    t = trainer(folder, callback, Report(folder, callback), **settings)
    t.fit(Classifier(), loader(8), loader(8, shuffle=False))
    print("done", flush=True)


if __name__ == "__main__":
    (learn if len(sys.argv) > 4 else main)(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
