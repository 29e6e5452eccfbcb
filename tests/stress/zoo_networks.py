"""Architectures that people train, with random weights and at small sizes: how each is made, fed and scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Member:
    """One architecture.

    Attributes:
        make: the network.
        batch: what its loss reads.
        loss: network, batch -> scalar.
        inputs: batch -> positional inputs of ``forward`` for an exported file; ``None``: it takes no such.
        free_batch: the first axis of every input is a batch of any size; graphs are exported at their own.
    """

    make: Make
    batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    inputs: Callable[[Any], tuple[Tensor, ...]] | None = lambda b: (b[0],)
    free_batch: bool = True


def images(size: int, count: int = 2, classes: int = 5) -> Callable[[], tuple[Tensor, Tensor]]:
    """Noise and labels."""
    return lambda: (torch.randn(count, 3, size, size), torch.arange(count) % classes)


def classify(net: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of logits, or of the field that holds them."""
    out = net(batch[0])
    return F.cross_entropy(out if isinstance(out, Tensor) else out.logits, batch[1])


def timm_net(name: str, size: int = 64, **options: Any) -> Member:
    """A classifier of timm."""

    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=5, **options)

    return Member(make, images(size), classify)


TIMM = {
    "vit_tiny_patch16_224": timm_net("vit_tiny_patch16_224", img_size=64, depth=2),
    "deit_tiny_distilled": timm_net("deit_tiny_distilled_patch16_224", img_size=64, depth=2),
    "swin_tiny": timm_net("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 2, 1)),
    "swinv2_tiny": timm_net("swinv2_tiny_window8_256", img_size=64, window_size=2, depths=(1, 1, 2, 1)),
    "beit_base": timm_net("beit_base_patch16_224", img_size=64, depth=2, embed_dim=96, num_heads=3),
    "beitv2_base": timm_net("beitv2_base_patch16_224", img_size=64, depth=2, embed_dim=96, num_heads=3),
    "eva02_tiny": timm_net("eva02_tiny_patch14_224", 56, img_size=56, depth=2),
    "convnext_atto": timm_net("convnext_atto"),
    "convnextv2_atto": timm_net("convnextv2_atto"),
    "efficientnetv2_b0": timm_net("tf_efficientnetv2_b0"),
    "efficientnet_b0": timm_net("efficientnet_b0"),
    "mobilenetv2_100": timm_net("mobilenetv2_100"),
    "mobilenetv3_small_100": timm_net("mobilenetv3_small_100"),
    "mobilenetv4_conv_small": timm_net("mobilenetv4_conv_small"),
    "mobilenetv4_hybrid_medium": timm_net("mobilenetv4_hybrid_medium"),
    "maxvit_pico": timm_net("maxvit_rmlp_pico_rw_256", img_size=64),
    "nfnet_l0": timm_net("nfnet_l0"),
    "nf_regnet_b0": timm_net("nf_regnet_b0"),
    "resnetv2_50": timm_net("resnetv2_50x1_bit"),
    "regnety_002": timm_net("regnety_002"),
    "densenet121": timm_net("densenet121"),
    "repvgg_a0": timm_net("repvgg_a0"),
    "ghostnet_100": timm_net("ghostnet_100"),
    "mixer_s32": timm_net("mixer_s32_224", img_size=64),
    "resmlp_12": timm_net("resmlp_12_224", img_size=64),
    "gmlp_s16": timm_net("gmlp_s16_224", img_size=64),
    "xcit_nano": timm_net("xcit_nano_12_p16_224", img_size=64, depth=2),
    "cait_xxs24": timm_net("cait_xxs24_224", img_size=64, depth=2),
    "poolformer_s12": timm_net("poolformer_s12"),
    "mobilevit_xxs": timm_net("mobilevit_xxs"),
    "edgenext_xx_small": timm_net("edgenext_xx_small"),
    "coat_lite_tiny": timm_net("coat_lite_tiny", img_size=64),
    "pvt_v2_b0": timm_net("pvt_v2_b0"),
    "davit_tiny": timm_net("davit_tiny", 224, depths=(1, 1, 1, 1)),
}

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 100, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens() -> tuple[Tensor, Tensor]:
    """Random tokens and labels."""
    return torch.randint(3, 100, (4, 12)), torch.arange(4) % 3


def text_classifier(kind: str, **options: Any) -> Member:
    """A sequence classifier of transformers, from its config."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**(TEXT | TINY | options), num_labels=3)
        return transformers.AutoModelForSequenceClassification.from_config(config)

    return Member(make, tokens, classify)


def language_model(kind: str, **options: Any) -> Member:
    """A causal language model of transformers, which computes its own loss."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**(TEXT | TINY | {"use_cache": False} | options))
        return transformers.AutoModelForCausalLM.from_config(config)

    return Member(make, tokens, lambda net, b: net(b[0], labels=b[0]).loss)


def vision(kind: str, size: int = 32, **options: Any) -> Member:
    """An image classifier of transformers."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**({"image_size": size} | options), num_labels=5)
        return transformers.AutoModelForImageClassification.from_config(config)

    return Member(make, images(size), classify)


def _t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                   decoder_start_token_id=0, pad_token_id=0, use_cache=False)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    import transformers

    config = transformers.BartConfig(vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=1,
                                     encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                                     decoder_ffn_dim=64, max_position_embeddings=32, use_cache=False)  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


SPEECH = {"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 16,
          "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16, "mask_time_prob": 0.0,
          "layerdrop": 0.0}  # fmt: skip


def speech(kind: str) -> Member:
    """A classifier of waveforms of transformers."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**TINY, **SPEECH, num_labels=3)
        return transformers.AutoModelForAudioClassification.from_config(config)

    return Member(make, lambda: (torch.randn(2, 400), torch.arange(2)), classify)


def _clip() -> nn.Module:
    import transformers

    text = {**TEXT, **TINY, "eos_token_id": 99}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config={**TINY, "image_size": 32, "patch_size": 8},
                                projection_dim=16)
    )  # fmt: skip


def _whisper() -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=100, num_mel_bins=16, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=20,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        use_cache=False, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


TRANSFORMERS = {
    "BERT": text_classifier("Bert"),
    "RoBERTa": text_classifier("Roberta"),
    "DistilBERT": text_classifier("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "ELECTRA": text_classifier("Electra", embedding_size=16),
    "ALBERT": text_classifier("Albert", embedding_size=16),
    "MPNet": text_classifier("MPNet"),
    "DeBERTa-v2": text_classifier("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "GPT-2": language_model("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "GPT-NeoX": language_model("GPTNeoX"),
    "OPT": language_model("OPT", ffn_dim=64, word_embed_proj_dim=32),
    "BLOOM": language_model("Bloom", n_layer=2, n_head=4),
    "Llama": language_model("Llama"),
    "Mistral": language_model("Mistral", num_key_value_heads=2),
    "Qwen2": language_model("Qwen2", num_key_value_heads=2),
    "Phi": language_model("Phi"),
    "Gemma": language_model("Gemma", num_key_value_heads=2, head_dim=8),
    "Mixtral": language_model("Mixtral", num_key_value_heads=2, num_local_experts=4),
    "T5": Member(_t5, tokens, lambda net, b: net(input_ids=b[0], labels=b[0]).loss, None),
    "BART": Member(_bart, tokens, lambda net, b: net(input_ids=b[0], labels=b[0]).loss, None),
    "ViT": vision("ViT", patch_size=8, **TINY),
    "DINOv2": vision("Dinov2", patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "SegFormer (classifier)": vision(
        "Segformer", depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4]
    ),
    "Wav2Vec2": speech("Wav2Vec2"),
    "HuBERT": speech("Hubert"),
    "CLIP": Member(
        _clip, lambda: (torch.randint(3, 99, (4, 8)), torch.randn(4, 3, 32, 32)),
        lambda net, b: net(input_ids=b[0], pixel_values=b[1], return_loss=True).loss, None,
    ),
    "Whisper": Member(
        _whisper, lambda: (torch.randn(2, 16, 40), torch.randint(3, 100, (2, 8))),
        lambda net, b: net(input_features=b[0], labels=b[1]).loss, None,
    ),
}  # fmt: skip


def segmenter(kind: str, encoder: str = "resnet18") -> Member:
    """A network of segmentation_models_pytorch."""

    def make() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, kind)(encoder, encoder_weights=None, classes=3)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))

    return Member(make, batch, classify)


def detector(name: str, size: int = 96, fixed: bool = False) -> Member:
    """A detector of torchvision, which computes its own losses; some have a fixed size."""

    def make() -> nn.Module:
        import torchvision

        net = getattr(torchvision.models.detection, name)(
            weights=None,
            weights_backbone=None,
            num_classes=3,
            **({} if fixed else {"min_size": size, "max_size": size}),
        )
        return net

    def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        target: dict[str, Tensor] = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
        target["masks"] = torch.zeros(1, size, size, dtype=torch.uint8)
        target["masks"][:, 10:70, 10:60] = 1
        return [torch.rand(3, size, size) for _ in range(2)], [dict(target), dict(target)]

    return Member(make, batch, lambda net, b: torch.stack(list(net(*b).values())).sum(), None)


SEGMENTATION = {f"{k} ({e})": segmenter(k, e) for k, e in (
    ("Unet", "resnet18"), ("UnetPlusPlus", "resnet18"), ("DeepLabV3Plus", "resnet18"), ("FPN", "resnet18"),
    ("PSPNet", "resnet18"), ("Segformer", "mit_b0"),
)}  # fmt: skip
DETECTION = {
    "Faster R-CNN": detector("fasterrcnn_mobilenet_v3_large_320_fpn"),
    "SSDlite": detector("ssdlite320_mobilenet_v3_large", 320, fixed=True),
    "FCOS": detector("fcos_resnet50_fpn"),
    "RetinaNet": detector("retinanet_resnet50_fpn"),
    "Mask R-CNN": detector("maskrcnn_resnet50_fpn"),
}
