"""What is replaced while a user's code runs is replaced there alone: not for other threads, and not a moment longer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule

from hawq_lightning import HawqError, load_from_checkpoint
from hawq_lightning.quantization import enabled_bits
from tests.trainers import Classifier, fit, hawq, loader, trainer

BACKWARD = torch.Tensor.backward


def in_another_thread(work: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures, failures


class Watching(Classifier):
    """Sends its loss back by hand, and looks at what others see meanwhile."""

    def training_step(self, batch, batch_idx):
        assert torch.Tensor.backward is BACKWARD
        in_another_thread(self.elsewhere)
        loss = self.loss(batch)
        loss.backward(gradient=torch.ones(()), retain_graph=True)
        return loss

    def elsewhere(self) -> None:
        x = torch.ones(3, requires_grad=True)
        y = (x * x).sum()
        y.backward()
        assert torch.equal(x.grad, 2 * torch.ones(3))
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()  # its graph was let go of: nobody keeps it for probes


def test_backward_is_replaced_for_the_measured_step_alone(tmp_path):
    torch.manual_seed(0)
    model = Watching()
    fit(tmp_path, model, loader(), limit_train_batches=1)
    assert enabled_bits(model) and torch.Tensor.backward is BACKWARD


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    fitted = trainer(folder, hawq(), limit_train_batches=1)
    fitted.fit(Classifier(), loader())
    fitted.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


class Loading(Classifier):
    """Another thread loads a module of the same class while this one is loaded."""

    def on_load_checkpoint(self, checkpoint):
        if threading.current_thread() is threading.main_thread():
            in_another_thread(self.elsewhere)

    def elsewhere(self) -> None:
        other = Loading()
        other.on_load_checkpoint({"state_dict": {"net.0.weight_quantizer.num_bits": torch.ones(())}})
        assert type(other.net[0]) is torch.nn.Linear


def test_a_classs_hook_is_replaced_for_the_thread_that_loads_alone(checkpoint):
    for kind in (Loading, Classifier):
        before = kind.__dict__.get("on_load_checkpoint")
        assert enabled_bits(load_from_checkpoint(kind, checkpoint))
        assert kind.__dict__.get("on_load_checkpoint") is before
    assert Classifier.on_load_checkpoint is LightningModule.on_load_checkpoint


def test_a_folder_of_shards_is_one_sentence(tmp_path):
    with pytest.raises(HawqError, match="is a folder of shards; make one file of it: .*consolidate_checkpoint"):
        load_from_checkpoint(Classifier, tmp_path)
