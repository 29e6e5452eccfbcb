"""Small versions of the zoo's families, a network and a loss of its outputs apart: dense curvature fits them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.stress.zoo_own import DLRM, ConvTasNet, FusionTransformer, GatedResidual, LanguageLSTM, Video

Run = Callable[[nn.Module, Any], Sequence[Tensor]]


@dataclass(frozen=True)
class Small:
    """One network.

    Attributes:
        family: that it stands for.
        make: the network.
        batch: floats are made float64.
        loss: its outputs and the batch -> scalar.
        run: network, batch -> what comes out of it.
    """

    family: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, ...]]
    loss: Callable[[Sequence[Tensor], Any], Tensor]
    run: Run = lambda net, b: (net(b[0]),)


def classes(out: Sequence[Tensor], batch: Any) -> Tensor:
    """Cross-entropy of the first output over its second axis."""
    return F.cross_entropy(out[0], batch[-1])


def logits(net: nn.Module, batch: Any) -> Sequence[Tensor]:
    """Of a network of transformers."""
    return (net(batch[0]).logits,)


def images(size: int = 8, count: int = 3, channels: int = 3) -> Callable[[], tuple[Tensor, Tensor]]:
    """Noise and three labels."""
    return lambda: (torch.randn(count, channels, size, size), torch.arange(count) % 3)


def tokens(count: int = 3, length: int = 5, words: int = 12) -> Callable[[], tuple[Tensor, Tensor]]:
    """Random words and three labels."""
    return lambda: (torch.randint(3, words, (count, length)), torch.arange(count) % 3)


def next_word(out: Sequence[Tensor], batch: Any) -> Tensor:
    """Cross-entropy of the word that follows."""
    return F.cross_entropy(out[0][:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


# ---- convolutions ----


class Residual(nn.Module):
    """Convolutions, BatchNorm, a shortcut with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.one, self.two = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.short, self.head = nn.Conv2d(4, 4, 1, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        return self.head(F.relu(self.short(x) + self.two(F.relu(self.one(x)))).mean((2, 3)))


class Mobile(nn.Module):
    """Depthwise convolution, squeeze and excitation, hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.deep = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.squeeze, self.excite, self.down = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.deep(F.hardswish(self.up(x))))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(self.down(x * gate).mean((2, 3)))


class Modern(nn.Module):
    """A ConvNeXt block: LayerNorm over channels, GELU, a scale a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.gamma, self.head = nn.Parameter(torch.full((4,), 0.5)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(self.deep(x).permute(0, 2, 3, 1))))) * self.gamma
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class StandardisedConv(nn.Conv2d):
    """Its weight is standardised in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.flatten(1)
        w = (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5)
        return F.conv2d(x, w.view_as(self.weight), self.bias, self.stride, self.padding)


class UNet(nn.Module):
    """One level down and up, a shortcut by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(x))
        return self.out(torch.cat([x, F.relu(self.up(F.relu(self.deep(x))))], 1))


def dice(out: Sequence[Tensor], batch: Any) -> Tensor:
    """Cross-entropy and soft Dice, as segmentation is trained."""
    p, y = out[0].softmax(1), F.one_hot(batch[1], 3).permute(0, 3, 1, 2)
    return F.cross_entropy(out[0], batch[1]) + 1 - 2 * (p * y).sum() / (p + y).sum()


# ---- detection ----


class Detector(nn.Module):
    """Two levels, one head over both: classes, boxes, centreness, as FCOS has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.tower, self.score = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.box, self.centre = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.stem(x))
        levels = [F.relu(self.tower(level)) for level in (x, F.relu(self.down(x)))]
        heads = [[h(t).flatten(2).mT for t in levels] for h in (self.score, self.box, self.centre)]
        scores, boxes, centres = (torch.cat(h, 1) for h in heads)
        return scores, boxes, centres


def detection(out: Sequence[Tensor], batch: Any) -> Tensor:
    """Focal loss, smooth L1 of positives, binary cross-entropy of centreness."""
    scores, boxes, centres = out[0], out[1].exp(), out[2]
    target = (torch.arange(scores.numel()).view_as(scores) % 5 == 0).to(scores.dtype)
    p, positive = scores.sigmoid(), target.amax(-1) > 0
    entropy = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    focal = ((p * target + (1 - p) * (1 - target)) - 1).square() * entropy
    number = positive.sum()
    distance = F.smooth_l1_loss(boxes[positive], torch.full_like(boxes[positive], 1.3), reduction="sum")
    centreness = F.binary_cross_entropy_with_logits(centres[positive], torch.full_like(centres[positive], 0.4))
    return (focal.sum() + distance) / number + centreness


class Retina(nn.Module):
    """torchvision's own head on two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection.retinanet import RetinaNetHead

        self.stem, self.head = nn.Conv2d(3, 2, 3, 4, 1), RetinaNetHead(2, 1, 2)
        for layer in self.head.modules():  # it is drawn so that nothing comes through two channels
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.head([F.relu(self.stem(x))])
        return out["cls_logits"], out["bbox_regression"]


def retina(out: Sequence[Tensor], batch: Any) -> Tensor:
    """Sums over anchors, as torchvision's, of a target at every third."""
    scores, boxes = out
    target = (torch.arange(scores.numel()).view_as(scores) % 3 == 0).to(scores.dtype)
    entropy = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    p = scores.sigmoid()
    focal = 0.25 * entropy * (1 - (p * target + (1 - p) * (1 - target))).square()
    return (focal.sum() + F.smooth_l1_loss(boxes, boxes.new_full(boxes.shape, 0.2), reduction="sum")) / 4


# ---- attention ----


class Encoder(nn.Module):
    """torch's encoder layer over patches."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 4, 4, 4)
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 6, 0.0, "gelu", batch_first=True, norm_first=norm_first
        )  # fmt: skip
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patch(x).flatten(2).mT).mean(1))


class Windows(nn.Module):
    """Attention inside of two windows with a bias by place, its weights read by functions, as Swin's."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.qkv, self.out = nn.Linear(12, 4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.place, self.head = nn.Parameter(torch.randn(2, 4, 4) * 0.1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(F.pixel_unshuffle(x, 2).flatten(2).mT.reshape(-1, 4, 12))
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT) / math.sqrt(2) + self.place).softmax(-1) @ v
        x = x + F.linear(y.transpose(1, 2).flatten(2), self.out.weight, self.out.bias)
        return self.head(x.reshape(-1, 16, 4).mean(1))


class Translator(nn.Module):
    """torch's encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 4)
        self.transformer = nn.Transformer(4, 2, 1, 1, 4, 0.0, batch_first=True)
        self.head = nn.Linear(4, 12)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.transformer(self.words(source), self.words(target)))


TEXT = {"vocab_size": 12, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TINY = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}


def of_transformers(kind: str, task: str = "SequenceClassification", **options: Any) -> Callable[[], nn.Module]:
    """A network of transformers from its config, with attention that can be differentiated twice."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**(TEXT | TINY | options), attn_implementation="eager")
        if task != "CausalLM":
            config.num_labels = 3
        return getattr(transformers, f"AutoModelFor{task}").from_config(config, attn_implementation="eager")

    return make


def _t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(vocab_size=12, d_model=4, d_kv=2, d_ff=6, num_layers=1, num_heads=2,
                                   decoder_start_token_id=0, pad_token_id=0, use_cache=False)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _wav2vec2() -> nn.Module:
    import transformers

    config = transformers.Wav2Vec2Config(
        **TINY, conv_dim=(4,), conv_kernel=(8,), conv_stride=(4,), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, classifier_proj_size=3, mask_time_prob=0.0, layerdrop=0.0, num_labels=3,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.Wav2Vec2ForSequenceClassification(config)


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A classifier of timm."""

    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=3, **options)

    return make


# ---- recurrent, graph, experts, embeddings ----


class Recurrent(nn.Module):
    """A recurrent layer of torch's and a head: mean and spread."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(2, 3, batch_first=True, **options)
        self.head = nn.Linear(3 * (1 + bool(options.get("bidirectional"))), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])


def gaussian(out: Sequence[Tensor], batch: Any) -> Tensor:
    """Likelihood of a normal distribution."""
    mean, spread = out[0].unbind(-1)
    return F.gaussian_nll_loss(mean, batch[1], F.softplus(spread) + 0.1)


class Graph(nn.Module):
    """Two convolutions over neighbours, with means or with attention."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 3)
        self.source, self.target = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        h = self.one(x)
        if self.attention:
            score = F.leaky_relu(self.source(h)[source] + self.target(h)[target], 0.2).exp()
            total = torch.zeros_like(h[:, :1]).index_add(0, target, score)
            share = score / (total[target] + 1e-9)
        else:
            share = torch.full_like(h[source, :1], 0.4)
        h = F.elu(h + torch.zeros_like(h).index_add(0, target, share * h[source]))
        out = self.two(h)
        return out + torch.zeros_like(out).index_add(0, target, out[source] * 0.4)


class Routed(nn.Module):
    """Each token goes to one of three experts, weighed by the router."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(1)
            y = y.index_add(0, rows, F.silu(expert(x[rows])) * share[rows, None])
        return self.head(x + y)


class Fused(nn.Module):
    """All experts in one parameter of three axes, all of them read."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(4, 2), nn.Linear(4, 3)
        self.up = nn.Parameter(torch.randn(2, 4, 5) * 0.5)
        self.down = nn.Parameter(torch.randn(2, 5, 4) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        y = torch.bmm(F.gelu(torch.bmm(x.expand(2, *x.shape), self.up)), self.down)
        return self.head(x + (share.T[..., None] * y).sum(0))


class Towers(nn.Module):
    """Two towers of embeddings and a learned temperature: images of a batch are coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(8, 4), nn.EmbeddingBag(8, 4, mode="mean")
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        left = F.normalize(self.left(self.users(users)), dim=1)
        right = F.normalize(self.right(self.items(items)), dim=1)
        return left @ right.T * self.scale.exp()


def contrastive(out: Sequence[Tensor], batch: Any) -> Tensor:
    """Both ways, as CLIP."""
    y = torch.arange(len(out[0]))
    return (F.cross_entropy(out[0], y) + F.cross_entropy(out[0].T, y)) / 2


# ---- generative, sound, points ----


class VAE(nn.Module):
    """In evaluation the code is its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return self.decoder(mean), mean, log_variance


def evidence(out: Sequence[Tensor], batch: Any) -> Tensor:
    """Bernoulli likelihood and divergence."""
    decoded, mean, log_variance = out
    pixels = F.binary_cross_entropy_with_logits(decoded, batch[0].sigmoid(), reduction="none").sum(1)
    return (pixels + 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(1)).mean()


class Critic(nn.Module):
    """A generator in front of a discriminator with spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2), nn.Tanh()
        )
        self.critic = nn.Sequential(
            spectral_norm(nn.Conv2d(2, 4, 3, 2)), nn.LeakyReLU(0.2), nn.Flatten(), spectral_norm(nn.Linear(16, 1))
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.critic(self.generator(z))


class Points(nn.Module):
    """A perceptron for every point, their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Conv1d(3, 5, 1), nn.ReLU(), weight_norm(nn.Conv1d(5, 6, 1)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.points(x).amax(-1))


class Gated(nn.Module):
    """The gated block of temporal fusion transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = GatedResidual(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


def speakers(out: Sequence[Tensor], batch: Any) -> Tensor:
    """Logarithm of noise to signal."""
    target = batch[1][..., : out[0].shape[-1]]
    return ((out[0] - target).square().sum(-1) / target.square().sum(-1) + 1e-3).log().mean()


def quantiles(out: Sequence[Tensor], batch: Any) -> Tensor:
    """Pinball loss, its corner rounded off."""
    error = batch[1][..., None] - out[0]
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=error.dtype)
    return (F.softplus(8 * error) / 8 - (1 - levels) * error).mean()


def video() -> nn.Module:
    """The zoo's own with four channels."""
    net = Video()
    net.stem = nn.Conv3d(3, 4, (3, 2, 2), (1, 2, 2), (1, 0, 0))
    net.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True), 1)
    net.head = nn.Linear(4, 3)
    return net


def language_lstm() -> nn.Module:
    """The zoo's own with four channels, its decoder tied to its embedding."""
    net = LanguageLSTM()
    net.embedding, net.lstm = nn.Embedding(12, 4), nn.LSTM(4, 4, 1, batch_first=True)
    net.decoder = nn.Linear(4, 12)
    net.decoder.weight = net.embedding.weight
    return net


def dlrm() -> nn.Module:
    """The zoo's own with four channels."""
    net = DLRM()
    net.bags = nn.ModuleList(nn.EmbeddingBag(6, 4, mode="sum") for _ in range(3))
    net.bottom = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
    net.top = nn.Sequential(nn.Linear(4 + 6, 5), nn.ReLU(), nn.Linear(5, 1))
    return net


def graph_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Seven nodes, twelve edges."""
    return torch.randn(7, 3), torch.randint(0, 7, (2, 12)), torch.arange(7) % 3


def two(net: nn.Module, batch: Any) -> Sequence[Tensor]:
    """A network of two inputs."""
    return (net(batch[0], batch[1]),)


def series() -> tuple[Tensor, Tensor]:
    """Three series of four steps."""
    return torch.randn(3, 4, 2), torch.randn(3, 4)


def rows() -> tuple[Tensor, Tensor]:
    """Eight rows of four features."""
    return torch.randn(8, 4), torch.arange(8) % 3


def plain(net: nn.Module, batch: Any) -> Sequence[Tensor]:
    """A network of several outputs."""
    outputs: Sequence[Tensor] = net(batch[0])
    return outputs


SMALL = {
    "ResNet": Small("convolution", Residual, images(), classes),
    "MobileNetV3": Small("convolution", Mobile, images(4), classes),
    "ConvNeXt": Small("convolution", Modern, images(4), classes),
    "NFNet (standardised weights)": Small(
        "convolution",
        lambda: nn.Sequential(
            StandardisedConv(3, 4, 3), nn.SiLU(), StandardisedConv(4, 3, 2), nn.Flatten(), nn.Linear(3, 3)
        ),
        images(4), classes,
    ),
    "U-Net": Small(
        "segmentation", UNet, lambda: (torch.randn(2, 3, 4, 4), torch.arange(32).view(2, 4, 4) % 3), dice
    ),
    "FCOS": Small("detection", Detector, lambda: (torch.randn(2, 3, 8, 8),), detection, plain),
    "RetinaNet (torchvision's head)": Small("detection", Retina, lambda: (torch.randn(2, 3, 8, 8),), retina, plain),
    "ViT": Small("attention", lambda: Encoder(True), images(), classes),
    "encoder, norm behind": Small("attention", lambda: Encoder(False), images(), classes),
    "Swin": Small("attention", Windows, images(8, 2), classes),
    "vit_tiny (timm)": Small(
        "attention",
        of_timm("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=4, depth=1, num_heads=2), images(), classes,
    ),
    "eva02_tiny (timm)": Small(
        "attention",
        of_timm("eva02_tiny_patch14_224", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2), images(8, 2),
        classes,
    ),
    "BERT": Small("attention", of_transformers("Bert"), tokens(), classes, logits),
    "RoBERTa": Small("attention", of_transformers("Roberta"), tokens(3, 4), classes, logits),
    "DistilBERT": Small(
        "attention", of_transformers("DistilBert", dim=4, n_layers=1, n_heads=2, hidden_dim=6), tokens(), classes,
        logits,
    ),
    "ELECTRA": Small("attention", of_transformers("Electra", embedding_size=3), tokens(), classes, logits),
    "GPT-2": Small(
        "attention", of_transformers("GPT2", "CausalLM", n_embd=4, n_layer=1, n_head=2, n_positions=8, use_cache=False),
        tokens(2, 4), next_word, logits,
    ),
    "Llama": Small(
        "attention", of_transformers("Llama", "CausalLM", num_key_value_heads=1, use_cache=False), tokens(2, 4),
        next_word, logits,
    ),
    "T5": Small(
        "attention", _t5, tokens(2, 3), lambda out, b: F.cross_entropy(out[0].flatten(0, 1), b[0].flatten()),
        lambda net, b: (net(input_ids=b[0], labels=b[0]).logits,),
    ),
    "Wav2Vec2": Small(
        "attention", _wav2vec2, lambda: (torch.randn(2, 24), torch.arange(2)), classes, logits
    ),
    "translator": Small(
        "attention", Translator,
        lambda: (torch.randint(0, 12, (2, 4)), torch.randint(0, 12, (2, 3)), torch.arange(6) % 12),
        lambda out, b: F.cross_entropy(out[0].flatten(0, 1), b[2]), two,
    ),
    "video transformer": Small(
        "attention", video, lambda: (torch.randn(2, 3, 3, 4, 4), torch.arange(2)), classes
    ),
    "LSTM": Small("recurrent", lambda: Recurrent("LSTM"), series, gaussian),
    "LSTM, two layers, both ways": Small(
        "recurrent", lambda: Recurrent("LSTM", num_layers=2, bidirectional=True), series, gaussian
    ),
    "GRU (DeepAR)": Small("recurrent", lambda: Recurrent("GRU"), series, gaussian),
    "RNN": Small("recurrent", lambda: Recurrent("RNN"), series, gaussian),
    "LSTM language model": Small("recurrent", language_lstm, tokens(2, 4), next_word),
    "temporal fusion transformer": Small(
        "recurrent", lambda: FusionTransformer(4), lambda: (torch.randn(2, 3, 4), torch.randn(2, 3)), quantiles
    ),
    "gated residual": Small("recurrent", Gated, rows, classes),
    "GCN": Small("graph", lambda: Graph(False), graph_batch, classes, two),
    "GAT": Small("graph", lambda: Graph(True), graph_batch, classes, two),
    "experts, one a token": Small("experts", Routed, rows, classes),
    "experts in one parameter": Small("experts", Fused, rows, classes),
    "DLRM": Small(
        "embeddings", dlrm,
        lambda: (torch.randn(5, 3), torch.randint(0, 6, (5, 3, 2)), (torch.arange(5) % 2).double()),
        lambda out, b: F.binary_cross_entropy_with_logits(out[0], b[2]), two,
    ),
    "two towers, temperature": Small(
        "embeddings", Towers, lambda: (torch.arange(5), torch.randint(0, 8, (5, 3))), contrastive, two
    ),
    "VAE": Small("generative", VAE, lambda: (torch.randn(4, 6),), evidence, plain),
    "GAN, spectral norm": Small(
        "generative", Critic, lambda: (torch.randn(3, 3, 1, 1),), lambda out, b: F.softplus(out[0]).mean()
    ),
    "Conv-TasNet": Small(
        "sound", lambda: ConvTasNet(4), lambda: (torch.randn(2, 1, 32), torch.randn(2, 2, 32)), speakers
    ),
    "PointNet, weight norm": Small("points", Points, lambda: (torch.randn(4, 3, 5), torch.arange(4) % 3), classes),
}  # fmt: skip
