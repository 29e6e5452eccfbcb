"""Sparse matrices of graphs and complex spectral weights beside layers: measured as dense ones, packed or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl

NODES = 9


class Graph(nn.Module):
    def __init__(self, layout: str, persistent: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        dense = torch.rand(NODES, NODES) * (torch.rand(NODES, NODES) < 0.3)
        forms = {"dense": dense, "coo": dense.to_sparse(), "csr": dense.to_sparse_csr()}
        self.register_buffer("adjacency", forms[layout], persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.adjacency @ self.first(x))
        return self.adjacency @ self.second(h)


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)
        self.spectrum = nn.Parameter(torch.randn(5, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.spectrum, n=8))


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def planned(net: nn.Module, batch, estimator: str) -> tuple[dict[str, float], hl.Plan]:
    table = hl.sites(net, batch[0])
    traces = hl.measure(net, [batch], loss, sites=table, estimator=estimator, max_probes=3, rtol=9.0, progress=False)
    problem = hl.Problem(table, hl.candidates(net, [batch], traces, table, loss), traces)
    return {r.name: r.trace for r in traces}, hl.select(problem, "6x")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("estimator", ["exact", "hutchinson"])
def test_a_sparse_matrix_is_measured_as_a_dense_one(tmp_path, layout, estimator):
    torch.manual_seed(1)
    batch = torch.randn(NODES, 4), torch.arange(NODES) % 3
    expected, _ = planned(Graph("dense").eval(), batch, estimator)
    net = Graph(layout, persistent=False).eval()
    found, plan = planned(net, batch, estimator)
    assert found == pytest.approx(expected, rel=1e-3)
    hl.quantize(net, plan)
    hl.save_packed(net, plan, tmp_path / "net.safetensors")
    again = hl.load_packed(tmp_path / "net.safetensors", Graph(layout, persistent=False).eval())
    assert torch.equal(again(batch[0]), net(batch[0]))
    kept = hl.quantize(Graph(layout).eval(), plan)
    with pytest.raises(hl.HawqError, match="'adjacency' is sparse.*persistent=False"):
        hl.save_packed(kept, plan, tmp_path / "kept.safetensors")


def test_complex_parameters_are_packed(tmp_path):
    torch.manual_seed(1)
    net, batch = Spectral().eval(), (torch.randn(6, 8), torch.arange(6) % 3)
    _, plan = planned(net, batch, "exact")
    hl.quantize(net, plan)
    size = hl.save_packed(net, plan, tmp_path / "net.safetensors")
    assert size == (tmp_path / "net.safetensors").stat().st_size
    fresh = Spectral().eval()
    fresh.spectrum.data.zero_()
    assert torch.equal(hl.load_packed(tmp_path / "net.safetensors", fresh)(batch[0]), net(batch[0]))
    safetensors = pytest.importorskip(
        "safetensors", minversion="0.7", reason="earlier ones cannot open complex numbers"
    )
    with safetensors.safe_open(tmp_path / "net.safetensors", "np") as file:
        assert file.get_slice("spectrum").get_dtype() == "C64"


class Filtered(nn.Module):
    """A spectrum as the output, perhaps conjugated, of a module with a parameter or of none."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.form = nn.Linear(5, 6), nn.Linear(6, 8), form
        self.last = Weighted() if form != "linear" else nn.Linear(5, 4, dtype=torch.complex64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(torch.fft.rfft(self.second(self.first(x).relu())))
        return y.conj() if self.form == "conjugated" else y


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


OF_SPECTRA = {
    "distance": lambda y, t: (y - t).abs().square().mean(),
    "parts": lambda y, t: (y.real - t.real).square().mean() + y.imag.pow(4).mean(),
    "magnitude": lambda y, t: (y.abs() - t.abs()).square().mean(),
    "viewed": lambda y, t: F.mse_loss(torch.view_as_real(y.resolve_conj()), torch.view_as_real(t)),
    "classes": lambda y, t: F.cross_entropy(y.abs(), t.real.argmax(1)),
}


@pytest.mark.parametrize("form", ["filter", "conjugated", "linear"])
@pytest.mark.parametrize("what", OF_SPECTRA)
def test_complex_outputs_count_with_both_parts(form, what):
    net = Filtered(form).eval()
    torch.manual_seed(1)
    batch = torch.randn(6, 5), torch.randn(6, 4 if form == "linear" else 5, dtype=torch.complex64)

    def of(model: nn.Module, some) -> torch.Tensor:
        return OF_SPECTRA[what](model(some[0]), some[1])

    table = hl.sites(net, batch, forward=of)
    traces = hl.measure(net, [batch], of, sites=table, estimator="exact", progress=False)
    found = {r.name: r.trace for r in traces}
    weight = net.second.weight  # the outputs are linear in it, so that no second derivative is left out

    def at(w: torch.Tensor) -> torch.Tensor:
        return OF_SPECTRA[what](torch.func.functional_call(net, {"second.weight": w}, batch[0]), batch[1])

    dense = torch.autograd.functional.hessian(at, weight.detach()).reshape(weight.numel(), -1)
    assert found["second.weight"] == pytest.approx(float(dense.trace()), rel=1e-3)
    listed = hl.candidates(net, [batch], traces, table, of, weight_bits=(2, 4), activation_bits=(8,))
    ahead = hl.forecast(net, [batch], of, table, listed, mode="accurate")
    plan = hl.select(hl.Problem(table, listed, traces), "7.9x", selector="uniform")
    assert {plan.bits[s.name] for s in table.weights} == {4}
    net.form = "filter"  # the distance is that of what the last layer puts out
    with torch.no_grad():
        before = torch.view_as_real(net(batch[0]))
        hl.quantize(net, plan)
        after = torch.view_as_real(net(batch[0]))
    truth = float((after - before).square().sum() / (before - before.mean()).square().sum())
    assert ahead.measured_uniform[4] == pytest.approx(truth, rel=0.05)


class Seen(nn.Module):
    """Reads its buffer, which may be a lazily conjugated or negated view."""

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("seen", buffer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(x + as_real(self.seen))))


def as_real(x: torch.Tensor) -> torch.Tensor:
    return x.real + x.imag if x.is_complex() else x


VIEWS = {"conjugate": torch.conj, "negative": lambda z: z.conj().imag}


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_conjugate_and_negative_views_are_what_they_say(tmp_path, view, in_batch):
    torch.manual_seed(1)
    z, x, y = torch.randn(5, dtype=torch.complex64), torch.randn(6, 5), torch.arange(6) % 3
    lazy = VIEWS[view](z)
    assert lazy.is_conj() or lazy.is_neg()
    plain = lazy.resolve_conj().resolve_neg().clone()
    results = []
    for buffer in (plain, lazy):
        net = Seen(torch.zeros_like(plain) if in_batch else buffer).eval()
        batch = (x, y, buffer) if in_batch else (x, y)

        def step(model, batch):
            return F.cross_entropy(model(sum(as_real(part) for part in batch[::2])), batch[1])

        table = hl.sites(net, batch[0])
        traces = hl.measure(net, [batch], step, sites=table, estimator="exact", progress=False)
        problem = hl.Problem(table, hl.candidates(net, [batch], traces, table, step), traces)
        plan = hl.select(problem, "6x")
        hl.quantize(net, plan)
        hl.save_packed(net, plan, tmp_path / "net.safetensors")
        again = hl.load_packed(tmp_path / "net.safetensors", Seen(torch.zeros_like(plain)).eval())
        assert torch.equal(again(x), net(x))
        results.append((traces.fingerprint, {r.name: r.trace for r in traces}))
    assert results[0] == results[1]
