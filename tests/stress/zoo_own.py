"""Kinds of networks that no package brings ready-made, as small as they are usually drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.stress.zoo_networks import Member, images


class LanguageLSTM(nn.Module):
    """Embedding, two LSTM layers, and a decoder that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(100, 32), nn.LSTM(32, 32, 2, batch_first=True)
        self.decoder = nn.Linear(32, 100)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.lstm(self.embedding(x))[0])


class DeepAR(nn.Module):
    """A recurrent forecaster: mean and spread of the next value."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 32, 2, batch_first=True), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0])


class GatedResidual(nn.Module):
    """The gated block of temporal fusion transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.gate = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.glu(self.gate(self.second(F.elu(self.first(x))))))


class FusionTransformer(nn.Module):
    """Variable selection, LSTM, attention over time, gated blocks."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.choose = nn.Linear(4, width), nn.Linear(4, 4)
        self.lstm, self.attention = (
            nn.LSTM(width, width, batch_first=True),
            nn.MultiheadAttention(width, 2, batch_first=True),
        )
        self.blocks, self.head = nn.ModuleList(GatedResidual(width) for _ in range(2)), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks[0](self.lstm(self.embed(x * self.choose(x).softmax(-1)))[0])
        return self.head(self.blocks[1](h + self.attention(h, h, h, need_weights=False)[0]))


class ConvTasNet(nn.Module):
    """Learned basis, dilated separable convolutions, a mask for each of two speakers."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv1d(1, width, 16, 8), nn.ConvTranspose1d(width, 1, 16, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, width, 1), nn.PReLU(), nn.GroupNorm(1, width),
                nn.Conv1d(width, width, 3, padding=d, dilation=d, groups=width), nn.PReLU(), nn.GroupNorm(1, width),
                nn.Conv1d(width, width, 1),
            )
            for d in (1, 2, 4)
        )  # fmt: skip
        self.masks = nn.Conv1d(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        basis = F.relu(self.encode(x))
        h = basis
        for block in self.blocks:
            h = h + block(h)
        masks = self.masks(h).sigmoid().unflatten(1, (2, -1))
        parts = (masks * basis[:, None]).flatten(0, 1)
        return self.decode(parts).unflatten(0, (-1, 2)).squeeze(2)


class DLRM(nn.Module):
    """Embedding bags and dense features, their dot products, a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(200, 16, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.top = nn.Sequential(nn.Linear(16 + 6, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        parts = torch.stack([x, *(bag(sparse[:, i]) for i, bag in enumerate(self.bags))], 1)
        products = parts @ parts.transpose(1, 2)
        i, j = torch.triu_indices(4, 4, 1)
        return self.top(torch.cat([x, products[:, i, j]], 1)).squeeze(1)


class VAE(nn.Module):
    """Gaussian code, Bernoulli pixels; the code is drawn anew in every training pass."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3 * 256))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return self.decoder(code), mean, log_variance


class GAN(nn.Module):
    """Generator and discriminator, with the losses of both added up."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16 * 16, 1)
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.discriminator(self.generator(z))


class AutoEncoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(64, 16), nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).relu(), self.encoder.weight.t(), self.bias)


class PointNet(nn.Module):
    """A perceptron shared by points, their maximum, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1))
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.points(x).amax(-1))


class Video(nn.Module):
    """3-D convolutions, then a transformer encoder over time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, (3, 4, 4), (1, 4, 4), (1, 0, 0))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x).mean((3, 4)).transpose(1, 2)).mean(1))


class Translator(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.transformer = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)
        self.head = nn.Linear(32, 100)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.transformer(self.embedding(source), self.embedding(target)))


def graph_network(kind: str) -> Member:
    """Two layers of torch_geometric on one small graph."""

    def make() -> nn.Module:
        from torch_geometric import nn as gnn

        return gnn.models.basic_gnn.__dict__[kind](8, 16, 2, 3)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(12, 8), torch.randint(0, 12, (2, 40)), torch.arange(12) % 3

    return Member(make, batch, lambda net, b: F.cross_entropy(net(b[0], b[1]), b[2]), lambda b: (b[0], b[1]), False)


def _vae_loss(net: nn.Module, batch: Any) -> Tensor:
    out, mean, log_variance = net(batch[0])
    pixels = F.binary_cross_entropy_with_logits(out, batch[0].flatten(1).sigmoid(), reduction="none").sum(1)
    divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(1)
    return (pixels + divergence).mean()


def _gan_loss(net: nn.Module, batch: Any) -> Tensor:
    real, z = batch
    return F.softplus(-net.discriminator(real)).mean() + F.softplus(net(z)).mean()


def _next_token(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


def _gaussian(net: nn.Module, batch: Any) -> Tensor:
    mean, spread = net(batch[0]).unbind(-1)
    return F.gaussian_nll_loss(mean, batch[1], F.softplus(spread) + 0.1)


def _quantiles(net: nn.Module, batch: Any) -> Tensor:
    error = batch[1][..., None] - net(batch[0])
    levels = torch.tensor([0.1, 0.5, 0.9])
    return (F.softplus(8 * error) / 8 - (1 - levels) * error).mean()  # pinball, its corner rounded off


def _speakers(net: nn.Module, batch: Any) -> Tensor:
    out, target = net(batch[0]), batch[1][..., : net(batch[0]).shape[-1]]
    noise = (out - target).square().sum(-1)
    return (noise / target.square().sum(-1)).add(1e-3).log().mean()


def _classes(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


OWN = {
    "LSTM language model": Member(LanguageLSTM, lambda: (torch.randint(0, 100, (4, 10)),), _next_token),
    "DeepAR (GRU)": Member(DeepAR, lambda: (torch.randn(4, 12, 3), torch.randn(4, 12)), _gaussian),
    "temporal fusion transformer": Member(
        FusionTransformer, lambda: (torch.randn(4, 12, 4), torch.randn(4, 12)), _quantiles
    ),
    "Conv-TasNet": Member(ConvTasNet, lambda: (torch.randn(2, 1, 256), torch.randn(2, 2, 256)), _speakers),
    "GCN": graph_network("GCN"),
    "GraphSAGE": graph_network("GraphSAGE"),
    "GAT": graph_network("GAT"),
    "GIN": graph_network("GIN"),
    "DLRM": Member(
        DLRM,
        lambda: (torch.randn(8, 8), torch.randint(0, 200, (8, 3, 4)), (torch.arange(8) % 2).float()),
        lambda net, b: F.binary_cross_entropy_with_logits(net(b[0], b[1]), b[2]),
        lambda b: (b[0], b[1]),
    ),
    "VAE": Member(VAE, images(16), _vae_loss),
    "GAN": Member(
        GAN, lambda: (torch.randn(4, 3, 8, 8), torch.randn(4, 8, 1, 1)), _gan_loss, lambda b: (b[1],)
    ),
    "tied autoencoder": Member(
        AutoEncoder, lambda: (torch.randn(8, 64),), lambda net, b: F.mse_loss(net(b[0]), b[0])
    ),
    "PointNet": Member(PointNet, lambda: (torch.randn(4, 3, 20), torch.arange(4) % 5), _classes),
    "video transformer": Member(Video, lambda: (torch.randn(2, 3, 4, 16, 16), torch.arange(2)), _classes),
    "nn.Transformer translator": Member(
        Translator,
        lambda: (torch.randint(0, 100, (3, 7)), torch.randint(0, 100, (3, 6))),
        lambda net, b: F.cross_entropy(net(b[0], b[1][:, :-1]).flatten(0, 1), b[1][:, 1:].flatten()),
        lambda b: (b[0], b[1]),
    ),
}  # fmt: skip
