"""Quadratic forms of rounding errors against dense matrices in float64, for every layer type and loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, Sensitivity, SiteTable, candidates, measure
from hawq_lightning.quantization import quantizable_layers, rounding_errors
from hawq_lightning.sensitivity import InputHooks, RoundingErrors, find_sites
from tests.cases import CASES, batch_for, build
from tests.oracle.generated import dense_forms, make_case, plain_networks

WIDTHS = {"weight_bits": (1, 2, 4), "activation_bits": (2, 4), "input_bits": None}


def errors_of(net: nn.Module, batch, loss_fn, table: SiteTable, **widths) -> RoundingErrors:
    weighed = candidates(net, [batch], None, table, loss_fn, **(WIDTHS | widths))
    return rounding_errors(net, weighed, table)


def second_derivative(loss: torch.Tensor, points: list[torch.Tensor], errors: list[torch.Tensor]) -> float:
    """``D^T H D`` by double backward."""
    slopes = torch.autograd.grad(loss, points, create_graph=True)
    along = sum((s * d).sum() for s, d in zip(slopes, errors))
    if not along.requires_grad:
        return 0.0
    products = torch.autograd.grad(along, points, allow_unused=True)
    return sum(float((h * d).sum()) for h, d in zip(products, errors) if h is not None)


def dense(net: nn.Module, batch, loss_fn, table: SiteTable, rounding: RoundingErrors) -> dict[str, list[float]]:
    """Of networks that are piecewise linear at every site, where the Hessian is Gauss-Newton's matrix."""
    layers, _ = quantizable_layers(net)
    truth: dict[str, list[float]] = {}
    for site in table.weights:
        weight = layers[site.layers[0]].weight
        truth[site.name] = [second_derivative(loss_fn(net, batch), [weight], [d]) for d in rounding.weights[site.name]]
    for site in table.activations:
        shifts: list[torch.Tensor] = []
        read: list[torch.Tensor] = []

        def visit(name: str, x: torch.Tensor, wanted=site.name, shifts=shifts, read=read) -> torch.Tensor:
            if name != wanted:
                return x
            shifts.append(torch.zeros_like(x, requires_grad=True))
            read.append(x.detach().clone())
            return x + shifts[-1]

        truth[site.name] = []
        for i in range(rounding.count(site.name)):
            shifts.clear()
            read.clear()
            with InputHooks(layers, {x.name: x.activation for x in table.layers if x.activation}, visit):
                loss = loss_fn(net, batch)
            errors = [list(rounding.activations[site.name](x))[i] for x in read]
            truth[site.name].append(second_derivative(loss, shifts, errors))
    return truth


def prepare(name: str):
    kind, loss_fn = CASES[name]
    net, batch = build(kind), batch_for(kind)
    table = find_sites(net, lambda: loss_fn(net, batch), 4)
    rounding = errors_of(net, batch, loss_fn, table)
    truth = dense(net, batch, loss_fn, table, rounding)
    assert any(abs(q) > 1e-9 for forms in truth.values() for q in forms)
    return net, batch, loss_fn, table, rounding, truth


# every network, and a loss of each form; the others, and what takes hundreds of columns, in the stress tests
EXACT = {"cross_entropy", "focal", "dice", "one_dimension", "three_dimensions", "tied_and_flattened"}
SAMPLED = {"cross_entropy", "focal"}


def some(names, quick) -> list[object]:
    """All names; those that are not quick in the stress tests."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.stress) for n in names]


@pytest.mark.parametrize("name", some(CASES, EXACT))
def test_all_output_columns_give_the_dense_form(name):
    net, batch, loss_fn, table, rounding, truth = prepare(name)
    found = measure(
        net, [batch], loss_fn, sites=table, estimator="exact", l1_curvature="zero", rounding=rounding, progress=False
    )
    for site, forms in truth.items():
        assert [f.value for f in found.forms[site]] == pytest.approx(forms, rel=1e-6, abs=1e-12), site
        assert all(f.stderr == 0 for f in found.forms[site])
        assert [f.bits for f in found.forms[site]] == [c.bits for c in rounding.candidates[site]]


@pytest.mark.parametrize("name", some(CASES, SAMPLED))
def test_random_probes_agree_within_their_standard_errors(name):
    net, batch, loss_fn, table, rounding, truth = prepare(name)
    found = measure(
        net, [batch], loss_fn, sites=table, rtol=0.05, max_probes=100, seed=3, l1_curvature="zero",
        rounding=rounding, progress=False,
    )  # fmt: skip
    for site, forms in truth.items():
        size = max(map(abs, forms))
        for form, right in zip(found.forms[site], forms):
            assert abs(form.value - right) <= 4.5 * form.stderr + 1e-8 * size, (site, form, right)


def _generated(seed: int) -> list[str]:
    case = make_case(seed)
    table = find_sites(case.net, lambda: case.loss_fn(case.net, case.batch), len(case.batch[0]))
    rounding = errors_of(case.net, case.batch, case.loss_fn, table, weight_bits=(2, 4))
    with plain_networks():
        truth = {s.name: dense_forms(case, s, rounding) for s in table}
    size = max(abs(q) for forms in truth.values() for q in forms)
    try:
        found: Sensitivity = measure(
            case.net, [case.batch], case.loss_fn, sites=table, estimator="exact", l1_curvature="zero",
            rounding=rounding, progress=False,
        )  # fmt: skip
    except HawqError as error:
        return [] if "no curvature" in str(error) and size <= 1e-9 else [f"{case.about}: {error}"]
    return [
        f"{case.about}: {site} at {form.bits} bits is {form.value:.6g}, dense {right:.6g}"
        for site, forms in truth.items()
        for form, right in zip(found.forms[site], forms, strict=True)
        if abs(form.value - right) > 1e-6 * abs(right) + 1e-9 * size
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", some(range(200), range(4)))
def test_forms_of_a_random_network_are_the_dense_ones(seed):
    assert not _generated(seed)
