"""InceptionV3 for ImageNet (paper, Table 1b), from torchvision, and its layers grouped into the paper's blocks."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hawq_lightning._extra import require
from hawq_lightning.models._weights import build

AUXILIARY = "AuxLogits"


def inception_v3(
    num_classes: int = 1000,
    pretrained: bool = False,
    weights: str | Path | None = None,
    auxiliary: bool = True,
    dropout: float = 0.5,
) -> nn.Module:
    """InceptionV3 at 299 pixels: 95 weight sites, 90.8 MiB of quantizable weights.

    The auxiliary head is called in training only; its names are in ``quantization_exclude`` (no quantizer, not counted)
    and in ``training_only`` (not part of the network that is deployed).

    Args:
        num_classes: outputs of both heads; downloaded weights have 1000.
        pretrained: download torchvision's weights (77.29% top-1; the paper starts from 77.45%).
        weights: a state dict on disk instead.
        auxiliary: keep the auxiliary head; images must then be 299 pixels, without it 75 are enough.
        dropout: before the last layer.

    Raises:
        HawqError: torchvision is missing, or the weights cannot be had or do not fit.
    """
    models = require("torchvision.models")

    def make(download: bool) -> nn.Module:
        head: dict[str, int] = {} if download else {"num_classes": num_classes, "init_weights": weights is None}
        # the file that torchvision downloads holds the auxiliary head: built first, cut off where it is not wanted
        model = models.inception_v3(
            weights="IMAGENET1K_V1" if download else None, aux_logits=True, dropout=dropout, **head
        )
        if not auxiliary:
            model.aux_logits, model.AuxLogits = False, None
        # the published weights expect inputs in [-1, 1]; this lets all models here share one normalisation
        model.transform_input = True
        model.quantization_exclude = (f"{AUXILIARY}.*",) if auxiliary else ()
        model.training_only = (AUXILIARY,) if auxiliary else ()
        net: nn.Module = model
        return net

    return build(
        "inception_v3",
        make,
        pretrained=pretrained,
        weights=weights,
        source="torchvision" if num_classes == 1000 else None,
        head="fc",
        drop=() if auxiliary else (AUXILIARY,),
    )


def inception_blocks(model: nn.Module) -> dict[str, list[str]]:
    """The paper's 17 blocks: the five stem convolutions and the classifier alone, each Inception module as one.

    Args:
        model: an InceptionV3, or a module that holds one, whose name then stands before the sites'.

    Returns:
        Block name -> weight sites that take one bit-width together, in network order (Figures 2 and 4).
    """
    blocks: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        block = next((part for part in name.split(".") if part.startswith(("Conv2d", "Mixed", "fc", AUXILIARY))), None)
        if isinstance(module, nn.Conv2d | nn.Linear) and block not in (None, AUXILIARY):
            blocks.setdefault(str(block), []).append(f"{name}.weight")
    return blocks
