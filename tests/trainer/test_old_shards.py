"""Checkpoints in shards (``torch.distributed.checkpoint``) of release 0.1.0, whose buffers had other names."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import checkpoint as shards
from torch.distributed.checkpoint.api import CheckpointException

from hawq_lightning.quantization import enabled_bits, prepare, quantized_layers
from tests.trainers import Classifier, hawq, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning", "ignore::FutureWarning")


def as_in_0_1_0(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace(".num_bits", ".width"): value for key, value in state.items()}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.9 writes shards by one
def test_they_are_told_and_their_one_file_loads(tmp_path):
    torch.manual_seed(0)
    model, callback = Classifier(), hawq()
    trainer(tmp_path, callback, limit_train_batches=1).fit(model, loader())
    old = as_in_0_1_0(model.state_dict())
    shards.save(old, checkpoint_id=tmp_path / "shards")
    fresh = Classifier()
    prepare(fresh)
    with pytest.raises(CheckpointException) as raised:
        shards.load(fresh.state_dict(), checkpoint_id=tmp_path / "shards")
    with pytest.warns(UserWarning, match="folder of shards is of release 0.1.0.*consolidate_checkpoint"):
        callback.on_exception(trainer(tmp_path), fresh, raised.value)
    whole = {key: torch.empty_like(value) for key, value in old.items()}  # what consolidating does
    shards.load(whole, checkpoint_id=tmp_path / "shards")
    fresh.load_state_dict(whole)
    assert enabled_bits(fresh) == enabled_bits(model) and len(quantized_layers(fresh)) == 3
    x = torch.randn(4, 12)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
