"""Transformers of the ``transformers`` and ``timm`` packages, from their configs: whole, trained, resumed, packed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning import HAWQ, MeasureConfig, load_packed, save_packed, sites
from hawq_lightning.quantization import enabled_bits
from tests.trainers import weights_only

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS: dict[str, Any] = {
    "bert": lambda: transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **SIZES),
    "roberta": lambda: transformers.RobertaConfig(vocab_size=40, max_position_embeddings=16, pad_token_id=0, **SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=40, max_position_embeddings=16, dim=16, n_layers=1, n_heads=2, hidden_dim=32
    ),
    "electra": lambda: transformers.ElectraConfig(
        vocab_size=40, max_position_embeddings=16, embedding_size=8, **SIZES
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
}  # fmt: skip


def _build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.num_labels = 3
    return transformers.AutoModelForSequenceClassification.from_config(config)


class Text(LightningModule):
    """Fine-tuning as the package's users write it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = _build(name)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        tokens, mask, labels = batch
        return F.cross_entropy(self.net(input_ids=tokens, attention_mask=mask).logits, labels)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def _data() -> DataLoader:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 40, (8, 6), generator=g)
    mask = (torch.arange(6) < torch.randint(3, 7, (8, 1), generator=g)).long()
    return DataLoader(TensorDataset(tokens * mask, mask, torch.arange(8) % 3), batch_size=8)


def _trainer(name: str, epochs: int, tmp_path: Any) -> Trainer:
    # two of them with default settings, the others with fewer probes
    measure = None if name in ("bert", "gpt2") else MeasureConfig(rtol=0.5)
    hawq = HAWQ(budget="6x", measure=measure, progress=False, dirpath=tmp_path)
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[hawq], default_root_dir=tmp_path,
    )  # fmt: skip


# the others are BERT with other names for its layers
@pytest.mark.parametrize(
    "name", [n if n in ("bert", "gpt2") else pytest.param(n, marks=pytest.mark.stress) for n in CONFIGS]
)
def test_it_trains_resumes_tests_and_packs(name, tmp_path):
    model = Text(name)
    trainer = _trainer(name, 1, tmp_path)
    trainer.fit(model, _data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    plan = trainer.callbacks[0].plan
    matrices = {f"net.{n}" for n, p in model.net.named_parameters() if p.ndim == 2}
    # token types of which the text has one, and positions, are tables as well
    assert {s.name for s in plan.weights} == matrices and set(enabled_bits(model)) >= matrices
    moved = {n: p.detach().clone() for n, p in model.named_parameters()}
    resumed, again = _trainer(name, 2, tmp_path), Text(name)
    resumed.fit(again, _data(), ckpt_path=tmp_path / "last.ckpt", **weights_only(False))
    assert resumed.callbacks[0].plan.bits == plan.bits
    assert any(not torch.equal(p, moved[n]) for n, p in again.named_parameters())
    assert math.isfinite(resumed.test(again, _data(), verbose=False)[0]["test_loss"])
    save_packed(again.eval(), plan, tmp_path / "net")
    loaded = load_packed(tmp_path / "net", Text(name).eval())
    batch = next(iter(_data()))
    with torch.no_grad():
        assert torch.equal(loaded.training_step(batch, 0), again.training_step(batch, 0))


def test_a_vision_transformer_of_timm_is_found_whole():
    timm = pytest.importorskip("timm")
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    table = sites(net, torch.randn(2, 3, 32, 32))
    quantized = sum(r["bytes_share"] for r in table.rows() if r["quantized"])
    assert quantized > 0.98 and {s.name for s in table.weights} == {
        n for n, p in net.named_parameters() if p.ndim in (2, 4)
    }
