"""A user's script for several processes: ``python -m tests.ddp_script FOLDER STRATEGY DEVICES``."""

import sys

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback

from tests.trainers import Classifier, assert_mixed, hawq, loader, trainer


class Report(Callback):
    """Every process tells what it holds before and after training."""

    def __init__(self, folder, callback):
        self.folder, self.callback = folder, callback

    def on_fit_end(self, trainer, pl_module):
        assert_mixed(pl_module, self.callback)
        torch.save(
            {
                "state": pl_module.state_dict(), "plan": self.callback.plan.to_dict(),
                "traces": {r.name: r.trace for r in self.callback.sensitivity},
                "images": self.callback.sensitivity.settings["images"], "world": trainer.world_size,
            },
            f"{self.folder}/rank{trainer.global_rank}.pt",
        )  # fmt: skip


def main(folder, strategy, devices):
    """Fit; then test in the process that the user sees."""
    torch.set_num_threads(1)
    seed_everything(5, verbose=False)
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


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
