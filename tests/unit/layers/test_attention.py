"""``nn.MultiheadAttention`` and Transformers of torch: projections as weight sites, read by functions."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import quantize, sites
from hawq_lightning.layers import kind_of
from hawq_lightning.quantization import prepare
from tests.layer_checks import check_quantized, check_traces, plan_for, table_of


class Attended(nn.Module):
    """Attention of tokens to themselves (``own``), to a memory, or to keys and values of other sizes."""

    def __init__(self, form: str = "own", batch_first: bool = True) -> None:
        super().__init__()
        self.form, self.first = form, batch_first
        sizes = {"kdim": 3, "vdim": 5} if form == "sizes" else {}
        self.attn = nn.MultiheadAttention(4, 2, batch_first=batch_first, add_bias_kv=form == "memory", **sizes)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = v = x
        if self.form == "memory":
            k = v = x[:, :3] * 2
        elif self.form == "three":
            k, v = x.flip(1), x * 2
        elif self.form == "sizes":
            k, v = x[..., :3], torch.cat([x, x[..., :1]], -1)
        q, k, v = (t if self.first else t.transpose(0, 1) for t in (x, k, v))
        if self.form == "own":
            k = v = q
        elif self.form == "memory":
            v = k
        y, _ = self.attn(q, k, v, need_weights=self.form == "own")
        return self.head(y.mean(1 if self.first else 0))


class Encoded(nn.Module):
    """A Transformer's encoder with padded sequences, which torch runs by fused kernels and nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = torch.arange(x.shape[1]) >= torch.tensor([5, 3, 4, 5])[: len(x), None]
        y = self.encoder(x, src_key_padding_mask=padding)
        return self.head(y.masked_fill(padding[:, : y.shape[1], None], 0).mean(1))


class Decoded(nn.Module):
    """Encoder and decoder, time first."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch recommends batch_first
            self.body = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(x), dtype=x.dtype)
        return self.head(self.body(x, x[:3], tgt_mask=mask[:3, :3]).mean(0))


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _case(kind: Any, size: int = 4, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = kind().to(dtype).eval()
    return net, (torch.randn(4, 5, size, dtype=dtype), torch.tensor([0, 1, 2, 1]))


FORMS = [("own", True), ("own", False), ("memory", False), ("three", True), ("sizes", True)]


@pytest.mark.parametrize("form, batch_first", FORMS)
def test_traces_are_the_dense_ones(form, batch_first):
    net, batch = _case(lambda: Attended(form, batch_first))
    table = check_traces(net, batch, _loss, exact=("head", "attn.out_proj"))
    first = ["attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"] if form == "sizes" else [
        "attn.in_proj_weight"]  # fmt: skip
    assert [s.name for s in table.weights] == [*first, "attn.out_proj.weight", "head.weight"]
    assert [s.name for s in table.activations] == [f"{n}.input" for n in (*first, "attn.out_proj.weight", "head")]
    assert not any(f.name.startswith("attn") and f.bytes for f in table.floats)
    positions, memory = 5, {"own": 5, "memory": 3}.get(form, 5)
    features = (4, 3, 5) if form == "sizes" else (4, 4, 4)
    macs = [4 * positions * features[0], 4 * memory * features[1], 4 * memory * features[2]]
    expected = (macs if form == "sizes" else [sum(macs)]) + [positions * 16, 12]
    assert [x.macs for x in table.layers] == expected


@pytest.mark.parametrize("form, batch_first", FORMS)
def test_it_is_quantized_trained_and_packed(form, batch_first, tmp_path):
    _, batch = _case(lambda: Attended(form, batch_first), dtype=torch.float32)

    def build() -> nn.Module:
        return _case(lambda: Attended(form, batch_first), dtype=torch.float32)[0]

    net = check_quantized(build, batch, _loss, tmp_path)
    assert (net.attn.out_proj_weight_quantizer.bits > 0) and type(net.attn).__name__ == "QMultiheadAttention"


@pytest.mark.parametrize("kind", [Encoded, Decoded])
def test_transformers_of_torch_are_quantized_whole(kind, tmp_path):
    net, batch = _case(kind, 8, torch.float32)
    table = table_of(net, batch, _loss)
    matrices = [n for n, p in net.named_parameters() if p.ndim == 2]
    assert {s.name for s in table.weights} == set(matrices)
    quantized = check_quantized(lambda: _case(kind, 8, torch.float32)[0], batch, _loss, tmp_path)
    # with and without gradients: the fused kernels, and nested tensors of padded sequences, do not read past it
    with torch.no_grad():
        fast = quantized(batch[0])
    assert torch.allclose(quantized(batch[0]), fast, atol=1e-5)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            assert torch.allclose(quantized(batch[0]), fast, atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_traces_of_an_encoder_with_padding_are_the_dense_ones():
    net, batch = _case(Encoded, 8)
    table = check_traces(net, batch, _loss, exact=("head",))
    assert len(table.weights) == 9


def _masks(shape: tuple[int, ...]) -> list[torch.Tensor | None]:
    boolean = torch.rand(shape) > 0.7
    boolean[..., 0] = False
    return [None, boolean, torch.randn(shape)]


@pytest.mark.parametrize("batch_first, bias, extra, zero", [
    (True, True, False, False), (False, True, True, False), (True, False, False, True), (False, False, True, True),
])  # fmt: skip
def test_every_form_of_call_is_as_torch_has_it(batch_first, bias, extra, zero):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(
        4, 2, bias=bias, add_bias_kv=extra, add_zero_attn=zero, batch_first=batch_first
    ).eval()  # fmt: skip
    for own, batched, weights in itertools.product((True, False), repeat=3):
        average = own
        q, k = torch.randn(3, 5, 4), torch.randn(3, 4, 4)
        q, k = (x if batch_first else x.transpose(0, 1) for x in (q, k)) if batched else (q[0], k[0])
        k = q if own else k
        keys = 5 if own else 4
        attention = _masks((5, keys)) + _masks((6 if batched else 2, 5, keys))[1:]
        for mask, padding in itertools.product(attention, _masks((3, keys) if batched else (keys,))):
            if mask is not None and padding is not None and mask.dtype != padding.dtype:
                continue  # torch warns of these
            options = {"key_padding_mask": padding, "need_weights": weights, "attn_mask": mask,
                       "average_attn_weights": average}  # fmt: skip
            want, want_weights = layer(q, k, k, **options)
            got, got_weights = kind_of(layer).explicit_forward(layer, q, k, k, **options)
            assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
            assert (got_weights is None) == (want_weights is None)
            assert want_weights is None or torch.allclose(got_weights, want_weights, atol=1e-5)


def test_a_layer_that_is_off_is_the_float_one_bit_for_bit():
    net, batch = _case(Attended, dtype=torch.float32)
    with torch.no_grad():
        before = net(batch[0])
    prepare(net)
    with torch.no_grad():
        assert torch.equal(net(batch[0]), before)


def test_half_of_a_plan_can_be_float():
    net, batch = _case(Attended, dtype=torch.float32)
    plan = plan_for(net, batch, _loss)
    kept = plan.replace(sites=tuple(s for s in plan.sites if not s.name.startswith("attn.in_proj")))
    quantize(net, kept)
    assert net.attn.in_proj_weight_quantizer.bits == 0 and net.attn.out_proj_weight_quantizer.bits > 0
    assert [r["name"] for r in sites(net, batch).rows() if not r["quantized"] and r["bytes_share"]] == []
