"""Sites from a real forward pass: what shares a weight, what reads one tensor, what stays float and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning import HawqError, sites
from hawq_lightning.layers import must_be_called
from hawq_lightning.quantization import prepare, unquantize
from hawq_lightning.sensitivity import batch_images
from tests.cases import ConvNet, SharedHead, Tied
from tests.trainers import mlp


def test_a_head_over_three_levels_is_one_site_with_three_tensors():
    table = sites(SharedHead(), torch.randn(2, 2, 8, 8))
    by_layer = {x.name: x for x in table.layers}
    # levels are also read by the layers that make the next level: all of it is one component
    assert table["down.0.input"].layers == ("down.0", "down.1", "tower")
    assert table["down.0.input"].numel == 3 * (64 + 16 + 4)
    assert by_layer["score"].activation == by_layer["box"].activation == "score.input"
    assert table["score.input"].layers == ("score", "box")
    assert by_layer["tower"].macs == 27 * 3 * (64 + 16 + 4)


def test_readers_of_one_tensor_share_a_site_and_the_skip_does_not():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x):
            x = F.relu(x)
            return self.c(F.relu(self.a(x)) + self.b(x) + x)

    table = sites(Block(), torch.randn(1, 4, 3, 3))
    assert [s.layers for s in table.activations] == [("a", "b"), ("c",)]


def test_a_tensor_changed_in_place_is_another_tensor():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x + 0
            y = self.a(x)
            x.relu_()
            return y + self.b(x)

    assert len(sites(Twice(), torch.randn(2, 4)).activations) == 2


def test_shared_weights_are_one_site():
    table = sites(Tied(), torch.randn(2, 3, 4))
    assert table["a.weight"].layers == ("a", "b")
    assert len(table.weights) == 3


@pytest.mark.parametrize(
    ("layer", "x", "macs"),
    [
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 5, 5), 25 * 8 * 2 * 9),
        (nn.Conv1d(3, 5, 2), (2, 3, 7), 6 * 5 * 3 * 2),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 3, 3), 9 * 4 * 6 * 4),
        (nn.Linear(6, 7), (2, 5, 6), 5 * 6 * 7),
        (nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3), 8 * 3 * 2 * 8),
    ],
)
def test_macs_agree_with_a_count_by_hand(layer, x, macs):
    table = sites(nn.Sequential(layer), torch.randn(x))
    assert table.layers[0].macs == macs
    assert table["0.weight"].channels == layer.weight.shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0]


class OwnLSTM(nn.LSTM):
    def forward(self, x):
        return super().forward(x)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


def test_what_stays_float_is_listed_with_its_share():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8, sparse=True)
            self.lstm = OwnLSTM(8, 8, batch_first=True)
            self.attend = OwnAttention(8, 2, batch_first=True)
            self.norm = nn.LayerNorm(8)
            self.scaled = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            x, _ = self.lstm(self.embed(x))
            x, _ = self.attend(x)
            return self.out(self.scaled(self.norm(x)).mean(1))

    table = sites(Net(), torch.randint(0, 10, (2, 5)))
    reasons = {f.name: f.reason for f in table.floats}
    assert [s.name for s in table.weights] == ["scaled.weight", "out.weight"]
    assert "sparse" in reasons["embed"] and "of LSTM with a forward of its own" in reasons["lstm"]
    assert "of MultiheadAttention with a forward of its own" in reasons["attend"]
    rows = table.rows()
    assert sum(r["bytes_share"] for r in rows) == pytest.approx(1)
    assert sum(r["macs_share"] for r in rows) == pytest.approx(1)
    assert next(r for r in rows if r["name"] == "out.weight")["macs_share"] < 0.2
    assert "embed" in str(table)


def test_a_module_that_is_called_a_quantizer_is_told_and_ours_are_not():
    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.codebook = nn.Parameter(torch.randn(64, 4))

        def forward(self, z):
            return z + (self.codebook[torch.cdist(z, self.codebook).argmin(1)] - z).detach()

    net = nn.ModuleDict({"enc": nn.Linear(4, 4), "vector_quantizer": Codes(), "dec": nn.Linear(4, 4)})
    net.forward = lambda x: net["dec"](net["vector_quantizer"](net["enc"](x)))
    prepare(net, quantizer="lsq")
    for found in (sites(net, torch.randn(3, 4)), sites(unquantize(net), torch.randn(3, 4))):
        assert [(f.name, f.bytes) for f in found.floats] == [("vector_quantizer", 64 * 4 * 4)]


def test_long_names_and_types_keep_the_columns():
    class NameOfATypeThatIsLongerThanItsColumn(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_part_whose_name_has_more_than_forty_letters = nn.ModuleDict({"inner": nn.Linear(4, 4)})
            self.big = NameOfATypeThatIsLongerThanItsColumn(4, 4)

        def forward(self, x):
            return self.big(self.a_part_whose_name_has_more_than_forty_letters["inner"](x))

    head, *lines = str(sites(Net(), torch.randn(2, 4))).split("\n")
    assert max(line.index("weight") for line in lines if " weight " in line) > 40
    for line in lines:
        kind = head.index("kind")
        assert line[kind - 1] == " " and line[kind:].split()[0] in ("weight", "activation", "float"), line
        assert line[: len(head)].rstrip().endswith("%"), line  # the last column ends where its heading does


class AuxiliaryHeadLast(nn.Module):
    """As torchvision's segmentation networks: a shallow head is called after the deep one."""

    def __init__(self, inplace):
        super().__init__()
        self.stem, self.body, self.head, self.aux = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.relu = nn.ReLU(inplace)

    def forward(self, x):
        low = self.relu(self.stem(x))
        deep = self.relu(self.body(low)).reshape(low.shape)
        deep += low
        return {"out": F.interpolate(self.head(deep), scale_factor=2), "aux": self.aux(low.transpose(2, 3))}


@pytest.mark.parametrize("inplace", [False, True])
def test_the_last_layer_is_the_deepest_and_not_the_one_called_last(inplace):
    table = sites(AuxiliaryHeadLast(inplace), torch.randn(2, 3, 6, 6))
    assert [x.name for x in table.layers] == ["stem", "body", "head", "aux"]
    assert table.last == "head" and [x.name for x in table.first_to_last] == ["stem", "body", "aux", "head"]
    choices = {s.name: [hl.Candidate(b, "affine", 4.0**-b, 4.0**-b) for b in (2, 8)] for s in table.weights}
    problem = hl.Problem(table, choices, fixed={"last": 8, "first": 2})
    assert hl.select(problem, "7x").bits == {"stem.weight": 2, "body.weight": 2, "head.weight": 8, "aux.weight": 2}
    direct = hl.select(hl.Problem(table, choices), "6x", "direct").bits
    assert direct == {"stem.weight": 8, "body.weight": 2, "head.weight": 8, "aux.weight": 2}


def test_of_layers_equally_deep_the_last_is_the_one_called_last():
    assert sites(SharedHead(), torch.randn(2, 2, 8, 8)).last == "box"
    assert sites(mlp()).last == ""  # nothing was run


def test_uncalled_layers_get_no_site():
    class Net(ConvNet):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(4, 4)

    table = sites(Net(), torch.randn(2, 2, 8, 8))
    assert "spare.weight" not in [s.name for s in table]
    assert any(f.name == "spare" and "not called" in f.reason for f in table.floats)


def test_patterns_choose_and_unknown_ones_are_named():
    net, x = ConvNet(), torch.randn(2, 2, 8, 8)
    assert {s.layers[0] for s in sites(net, x, include=nn.Conv2d).weights} == {"stem", "grouped", "same"}
    assert {s.layers[0] for s in sites(net, x, exclude=["stem", "f*"]).weights} == {"grouped", "same"}
    assert {s.layers[0] for s in sites(net, x, include=lambda n, m: n == "fc").weights} == {"fc"}
    with pytest.raises(HawqError, match=r"'grouqed' matches no .* Did you mean 'grouped'"):
        sites(net, x, exclude="grouqed")
    with pytest.raises(HawqError, match="no quantizable layer"):
        sites(nn.Sequential(nn.ReLU()), x)


def test_without_a_batch_the_weights_are_still_known():
    table = sites(ConvNet())
    assert not table.traced and len(table.weights) == 4 and not table.activations


def test_the_model_is_left_alone_and_twins_count_as_layers():
    net, x = ConvNet(), torch.randn(2, 2, 8, 8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    one = sites(net, x)
    prepare(net)
    two = sites(net, x)
    assert one.sites == two.sites and one.layers == two.layers and net.training
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert not net.stem._forward_hooks and set(net.stem._forward_pre_hooks.values()) == {must_be_called}


@pytest.mark.parametrize(
    ("batch", "images"),
    [
        (torch.zeros(5, 3), 5),
        ((torch.zeros(4, 3), torch.zeros(4)), 4),
        ([torch.zeros(6, 3), torch.zeros(6)], 6),
        ({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, 2),
        (([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], [{}, {}]), 2),
        (({"a": torch.zeros(7, 1)}, torch.zeros(7)), 7),
    ],
)
def test_images_in_a_batch(batch, images):
    assert batch_images(batch) == images


def test_products_of_excluded_layers_are_theirs():
    table = hl.sites(mlp(), torch.randn(4, 12), exclude="6")
    (left,) = [f for f in table.floats if f.reason == "excluded"]
    assert left.macs == 24 * 4 and not any(f.type == "operations" for f in table.floats)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 4, dtype=torch.cfloat), torch.randn(2, 4, dtype=torch.cfloat)),
        (nn.Conv1d(4, 4, 1, dtype=torch.cfloat), torch.randn(2, 4, 3, dtype=torch.cfloat)),
        (nn.Conv2d(4, 4, 1, dtype=torch.cdouble), torch.randn(2, 4, 3, 3, dtype=torch.cdouble)),
    ],
)
def test_complex_layers_stay_float(layer, x):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.spectral, self.head = layer, nn.Linear(4, 3)

        def forward(self, x):
            y = self.spectral(x)
            return self.head(y.abs().flatten(2).mean(2).float() if y.ndim > 2 else y.abs().float())

    net = Net()
    table = sites(net, x)
    assert [x.name for x in table.layers] == ["head"]
    assert [f.reason for f in table.floats if f.name == "spectral"] == [f"its weight is {str(x.dtype)[6:]}"]
    batch = x, torch.tensor([0, 1])
    traces = hl.measure(net, [batch], lambda m, b: F.cross_entropy(m(b[0]), b[1]), estimator="exact", progress=False)
    assert [r.name for r in traces] == ["head.weight", "head.input"]
    prepare(net)
    assert type(net.spectral) is type(layer) and net(x).shape == (2, 3)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_products_of_fused_attention_are_counted(mask, grad):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            allowed = torch.ones(5, 5).tril().bool() if mask else None
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    net = Attention().requires_grad_(grad)
    table = sites(net, torch.randn(3, 5, 8))
    products = 2 * 5 * 5 * (4 + 4)  # of one sample
    assert sum(f.macs for f in table.floats) == products
    assert sum(r["macs_share"] for r in table.rows() if r["quantized"]) == pytest.approx(960 / (960 + products))
