"""Two small transformers and their data, as anybody would write them: a vision transformer, and a language model."""

from __future__ import annotations

import importlib
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from hawq_lightning.data import DigitsDataModule

CONTEXT = 64  # characters that the language model reads


class Classifier(pl.LightningModule):
    """Softmax over the last axis: a class an image, or a character a position.

    Args:
        net: images or characters -> logits.
        lr: peak of a one-cycle schedule.
    """

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def forward(self, x: Tensor) -> Tensor:
        """Logits, also of nets that return them with other things."""
        out = self.net(x)
        return out if isinstance(out, Tensor) else out.logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x).flatten(0, -2), y.flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Share of right answers."""
        x, y = batch
        self.log("accuracy", (self(x).argmax(-1) == y).float().mean(), batch_size=len(x))

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Characters(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of the manual that Python brings along (``pydoc_data.topics``), a character a token.

    Args:
        train: the first nine tenths, otherwise the last.
    """

    def __init__(self, train: bool) -> None:
        text = "\n".join(importlib.import_module("pydoc_data.topics").topics.values())
        codes = torch.tensor([min(ord(c), 127) for c in text])
        cut = len(codes) * 9 // 10
        self.codes = codes[:cut] if train else codes[cut:]

    def __len__(self) -> int:
        return (len(self.codes) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        piece = self.codes[index * CONTEXT : (index + 1) * CONTEXT + 1]
        return piece[:-1], piece[1:]


class Manual(pl.LightningDataModule):
    """Loaders of :class:`Characters`."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled pieces."""
        return DataLoader(Characters(train=True), batch_size=64, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Held-out pieces, in order."""
        return DataLoader(Characters(train=False), batch_size=128)


class Grey(nn.Module):
    """torchvision's ViT with 16 patches of 2 x 2 pixels, for grey images."""

    def __init__(self) -> None:
        from torchvision.models import VisionTransformer

        super().__init__()
        self.vit = VisionTransformer(
            8, 2, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10, dropout=0.1
        )

    def forward(self, x: Tensor) -> Tensor:
        """Grey images (batch, 1, 8, 8) -> logits."""
        return self.vit(x.expand(-1, 3, -1, -1))


def vision_transformer() -> tuple[nn.Module, pl.LightningDataModule]:
    """On scikit-learn's digits."""
    return Grey(), DigitsDataModule()


def language_model() -> tuple[nn.Module, pl.LightningDataModule]:
    """GPT-2 of transformers: 128 characters, 4 layers of width 128, the decoder tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=128, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), Manual()


NETS = {"vit": vision_transformer, "gpt2": language_model}
EPOCHS = {"vit": (100, 10), "gpt2": (3, 1)}  # float, fine-tuning
