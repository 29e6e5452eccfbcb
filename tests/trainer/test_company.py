"""Beside other people's callbacks: each works, in both orders, on an armed network with unequal bits."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger

from hawq_lightning import load_from_checkpoint
from hawq_lightning.quantization import enabled_bits
from tests.trainers import Classifier, assert_mixed, hawq, loader, trainer

ORDERS = pytest.mark.parametrize("first", [True, False], ids=["hawq_first", "hawq_last"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def fit(folder, model, callback, others, first, **kwargs):
    callbacks = [callback, *others] if first else [*others, callback]
    t = trainer(folder, *callbacks, **({"max_epochs": 3} | kwargs))
    t.fit(model, loader(), loader(shuffle=False))
    assert_mixed(model, callback)
    return t


class Sanity(Callback):
    """Bits seen by every validation."""

    def __init__(self):
        self.bits = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            self.bits.append(enabled_bits(pl_module))


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "ema_slow": lambda: EMAWeightAveraging(decay=0.9999, use_buffers=True),
    "average": lambda: WeightAveraging(use_buffers=True),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}


@pytest.mark.feature(
    "Other callbacks", "WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging, listed before or after", "works"
)
@ORDERS
@pytest.mark.parametrize("kind", AVERAGES)
def test_weight_averaging(tmp_path, kind, first):
    model, callback, sanity = Classifier(), hawq(), Sanity()
    t = fit(tmp_path, model, callback, [AVERAGES[kind](), sanity], first, num_sanity_val_steps=1)
    wanted = enabled_bits(model)
    assert sanity.bits and all(bits == wanted for bits in sanity.bits)
    assert all(
        float(v) == round(float(v)) for k, v in model.state_dict().items() if k.endswith("_quantizer.num_bits")
    ), "widths stay whole numbers"
    before = t.validate(model, loader(shuffle=False), verbose=False)
    assert before[0]["val_loss"] < 2.0


@pytest.mark.feature("Other callbacks", "checkpoints of averaged weights", "hold the plan")
@ORDERS
def test_averaged_checkpoints_keep_the_plan(tmp_path, first):
    model, callback = Classifier(), hawq()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, model, callback, [EMAWeightAveraging(decay=0.9), saver], first, enable_checkpointing=True)
    loaded = load_from_checkpoint(Classifier, tmp_path / "last.ckpt")
    assert enabled_bits(loaded) == enabled_bits(model)


@pytest.mark.feature("Other callbacks", "ModelPruning, listed before or after", "works; pruned weights stay 0")
@ORDERS
def test_pruning(tmp_path, first):
    model, callback = Classifier(), hawq()
    pruning = ModelPruning("l1_unstructured", amount=0.3, parameter_names=["weight"], make_pruning_permanent=True,
                           parameters_to_prune=[(model.net[0], "weight"), (model.net[4], "weight")])  # fmt: skip
    fit(tmp_path, model, callback, [pruning], first)
    assert (model.net[4].weight == 0).float().mean() > 0.25
    assert type(model.net[4].weight) is torch.nn.Parameter


@pytest.mark.feature(
    "Other callbacks", "LearningRateFinder, listed before or after", "works; it tries rates on the quantized network"
)
@ORDERS
def test_learning_rate_finder_sees_the_armed_network(tmp_path, first):
    seen = []

    class Tuned(Classifier):
        def __init__(self):
            super().__init__()
            self.lr = 0.02

        def training_step(self, batch, batch_idx):
            seen.append(bool(enabled_bits(self)))
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    model, callback = Tuned(), hawq()
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    fit(tmp_path, model, callback, [finder], first, max_epochs=8)  # the finder's steps count towards the epochs
    measured = seen.index(True)
    assert all(seen[measured:]) and len(seen) - measured >= 20 + 4  # its trial steps, then training
    assert finder.optimal_lr.suggestion() == model.lr != 0.02


@pytest.mark.feature("Other callbacks", "BatchSizeFinder, listed before or after", "works")
@ORDERS
def test_batch_size_finder(tmp_path, first):
    class Sized(Classifier):
        def __init__(self):
            super().__init__()
            self.batch_size = 4

        def train_dataloader(self):
            return loader(self.batch_size)

        def val_dataloader(self):
            return loader(shuffle=False)

    model, callback = Sized(), hawq()
    callbacks = [callback, BatchSizeFinder(steps_per_trial=2, max_trials=2)]
    trainer(tmp_path, *(callbacks if first else callbacks[::-1])).fit(model)
    assert_mixed(model, callback)


@pytest.mark.feature(
    "Other callbacks", "EarlyStopping, ModelCheckpoint, LearningRateMonitor, ModelSummary, CSVLogger", "works"
)
@ORDERS
def test_early_stopping_checkpointing_and_the_rest(tmp_path, first):
    model, callback = Classifier(), hawq()
    stop = EarlyStopping("val_loss", patience=1, mode="max")  # improving is bad: it stops
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    logger = CSVLogger(tmp_path, name="", version="")
    others = [stop, saver, LearningRateMonitor(), ModelSummary(max_depth=2)]
    t = fit(
        tmp_path, model, callback, others, first, max_epochs=8, logger=logger, enable_checkpointing=True,
        enable_model_summary=True, num_sanity_val_steps=1,
    )  # fmt: skip
    assert stop.stopped_epoch > 0 or t.current_epoch == 8
    assert t.validate(model, loader(shuffle=False), ckpt_path="best", verbose=False)
    assert_mixed(model, callback)


@pytest.mark.feature("Optimizers", "OneCycleLR, LambdaLR, SequentialLR, CosineAnnealingLR", "works")
@pytest.mark.parametrize("schedule", ["OneCycleLR", "LambdaLR", "SequentialLR", "CosineAnnealingLR"])
def test_schedulers(tmp_path, schedule):
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            s = torch.optim.lr_scheduler
            scheduler = {
                "OneCycleLR": lambda: s.OneCycleLR(optimizer, max_lr=0.02, total_steps=12),
                "LambdaLR": lambda: s.LambdaLR(optimizer, lambda step: 0.9**step),
                "SequentialLR": lambda: s.SequentialLR(
                    optimizer, [s.ConstantLR(optimizer), s.ExponentialLR(optimizer, 0.9)], milestones=[2]
                ),
                "CosineAnnealingLR": lambda: s.CosineAnnealingLR(optimizer, 12),
            }[schedule]()
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    fit(tmp_path, Scheduled(), hawq(), [], True)


@pytest.mark.feature("Settings", "a submodule compiled in place (`net.compile()`)", "works")
def test_a_compiled_network_is_measured_and_armed(tmp_path):
    model, callback = Classifier(), hawq()
    model.net.compile(backend="eager")
    fit(tmp_path, model, callback, [], True, max_epochs=1)


@pytest.mark.feature("Settings", "`gradient_clip_val` and `accumulate_grad_batches`", "works")
def test_gradient_clipping_and_accumulation(tmp_path):
    fit(tmp_path, Classifier(), hawq(), [], True, gradient_clip_val=0.5, accumulate_grad_batches=3)


@pytest.mark.feature("Settings", "`precision` 64-true, bf16-true", "works; quantization steps stay float32")
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_true_precisions(tmp_path, precision):
    model = Classifier()
    fit(tmp_path, model, hawq(), [], True, precision=precision, max_epochs=1)
    scales = [v for k, v in model.state_dict().items() if k.endswith("_quantizer.scale")]
    assert scales and all(v.dtype == torch.float32 for v in scales)


@pytest.mark.feature("Modules", "`deepcopy` and pickle of the fitted module", "works")
def test_the_fitted_module_copies_and_pickles(tmp_path):
    model, callback = Classifier(), hawq()
    fit(tmp_path, model, callback, [], True, max_epochs=1)
    model.trainer = None
    twin = copy.deepcopy(model)
    assert enabled_bits(twin) == enabled_bits(model)
    torch.save(model.net, tmp_path / "net.pt")
    net = torch.load(tmp_path / "net.pt", weights_only=False).eval()
    x = torch.randn(5, 12)
    model.eval()
    assert torch.equal(net(x), model(x)) and torch.equal(twin.eval()(x), model(x))
