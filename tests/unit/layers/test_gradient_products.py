"""Per-image weight gradients: every way of making them against autograd, image by image."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from hawq_lightning.layers import LayerCall, by_kernel, inner_products, projected_products
from tests.internals import internal

LAYERS = {
    "plain": (lambda: nn.Conv2d(3, 4, 3, padding=1), (9, 8)),
    "strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (9, 8)),
    "dilated": (lambda: nn.Conv2d(3, 4, (3, 1), dilation=2, padding=(2, 0)), (9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (9, 8)),
    "same, even kernel": (lambda: nn.Conv2d(3, 4, 4, padding="same"), (9, 8)),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"), (9, 8)),
    "one dimension": (lambda: nn.Conv1d(3, 4, 5, padding=2), (17,)),
    "three dimensions": (lambda: nn.Conv3d(2, 3, 3, padding=1), (5, 6, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (5, 6)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 6)),
    "linear": (lambda: nn.Linear(7, 5), (6, 7)),
}
KERNEL = [n for n in LAYERS if n != "linear"]


def _uses(
    name: str, images: int, calls: int, two: bool
) -> tuple[list[LayerCall], list[torch.Tensor], list[torch.Tensor]]:
    make, size = LAYERS[name]
    layer = make().double()
    generator = torch.Generator().manual_seed(3)
    uses, first, second = [], [], []
    for _ in range(calls):
        channels = () if isinstance(layer, nn.Linear) else (layer.in_channels,)
        x = torch.randn(images, *channels, *size, generator=generator, dtype=torch.float64)
        out = layer(x)
        grads = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
        for kept, grad in zip((first, second), grads):
            alone = [torch.autograd.grad(layer(x[n : n + 1]), layer.weight, grad[n : n + 1])[0] for n in range(images)]
            kept.append(torch.stack(alone))
        uses.append(LayerCall(layer, x, grads[0], grads[1] if two else None))
    return uses, first, second


def _take(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    for module in ("layers._conv_gradients", "layers._linear", "layers._projections"):
        monkeypatch.setattr(internal(module), "gram_is_less", lambda *a: how == "ghost")
    monkeypatch.setattr(internal("layers._conv_gradients"), "by_kernel", lambda *a: how == "kernel")


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths:UserWarning")
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("how", ["ghost", "product", "kernel"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_every_way_agrees_with_autograd(name, how, calls, two, per_image, monkeypatch):
    if how == "kernel" and name == "linear":
        pytest.skip("a linear layer has no convolution kernel")
    _take(monkeypatch, how)
    uses, first, second = _uses(name, 3, calls, two)
    g, h = (torch.stack(x).sum(0) for x in (first, second if two else first))
    if not per_image:
        g, h = g.sum(0, keepdim=True), h.sum(0, keepdim=True)
    expected = (g * h).flatten(1).sum(1)
    assert torch.allclose(inner_products(uses, per_image), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths:UserWarning")
@pytest.mark.parametrize("how", ["ghost", "product", "kernel"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_products_with_directions_agree_with_autograd(name, how, monkeypatch):
    _take(monkeypatch, how)
    for calls, two, per_image in itertools.product((1, 2), (True, False), (True, False)):
        uses, first, second = _uses(name, 3, calls, two)
        g, h = (torch.stack(x).sum(0) for x in (first, second if two else first))
        if not per_image:
            g, h = g.sum(0, keepdim=True), h.sum(0, keepdim=True)
        for count in (1, 4):  # by the layer's forward pass with one direction, by forming the gradient with four
            directions = torch.randn(count, *g.shape[1:], dtype=torch.float64)
            found = projected_products(uses, per_image, directions)
            along, other = (x.flatten(1) @ directions.flatten(1).T for x in (g, h))
            for value, expected in ((found.along, along), (found.other, other), (found.squares, along * other)):
                assert torch.allclose(value, expected, rtol=1e-10, atol=1e-10)
            assert torch.allclose(found.inner, inner_products(uses, per_image), rtol=1e-11, atol=1e-11)


def test_directions_made_in_parts_are_the_same(monkeypatch):
    """Of wide layers only some channels of the directions are there at a time."""
    for name, how in itertools.product(LAYERS, ("ghost", "product", "kernel")):
        if (name, how) == ("linear", "kernel"):
            continue
        _take(monkeypatch, how)
        uses, first, _ = _uses(name, 3, 1, False)
        for count in (1, 4):
            directions = torch.randn(count, *first[0].shape[1:], dtype=torch.float64)
            with monkeypatch.context() as patch:
                for constant in ("_CACHED", "_CHUNK"):
                    patch.setattr(internal("layers._projections"), constant, 1)
                found = projected_products(uses, True, directions)
            whole = projected_products(uses, True, directions)
            assert torch.allclose(found.along, whole.along, rtol=1e-11, atol=1e-11)
            assert torch.allclose(found.inner, whole.inner, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("images", [1, 20])
@pytest.mark.parametrize("name", KERNEL)
def test_images_side_by_side_and_one_by_one_are_the_same(name, images, monkeypatch):

    uses, *_ = _uses(name, images, 1, False)
    _take(monkeypatch, "kernel")
    together = inner_products(uses, True)
    monkeypatch.setattr(internal("layers._conv_gradients"), "_LIGHT", 0)
    assert torch.allclose(together, inner_products(uses, True), rtol=1e-11)


def test_channels_last_and_layers_called_without_a_batch():
    layer = nn.Conv2d(8, 8, 3, padding=1).double()
    x = torch.randn(4, 8, 40, 40, dtype=torch.float64)
    grad = torch.randn(4, 8, 40, 40, dtype=torch.float64)
    assert by_kernel(layer, 8 * 9 * 1600)
    plain = inner_products([LayerCall(layer, x, grad)], True)
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    x_last, grad_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    assert torch.allclose(inner_products([LayerCall(last, x_last, grad_last)], True), plain, rtol=1e-11)
    assert torch.allclose(inner_products([LayerCall(layer, x[0], grad[0])], False), plain[:1], rtol=1e-11)


def test_calls_without_images_count_for_nothing():
    torch.manual_seed(0)
    layer, x, g = nn.Linear(5, 3), torch.randn(4, 5), torch.randn(4, 3)
    none = LayerCall(layer, x[:0], g[:0])
    assert torch.equal(
        inner_products([LayerCall(layer, x, g), none], False), inner_products([LayerCall(layer, x, g)], False)
    )
    assert inner_products([none], False).tolist() == [0.0] and inner_products([none], True).tolist() == []
    nothing = projected_products([none], False, torch.ones(2, 3, 5))
    assert nothing.inner.tolist() == [0.0] and nothing.squares.tolist() == [[0.0, 0.0]]
