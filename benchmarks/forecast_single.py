"""The parts of ``forecast.py`` in which one site is quantized at a time."""

from __future__ import annotations

import time
from typing import Any

import torch
from forecast_subjects import Batches, kl, loss_fn
from torch import nn

from hawq_lightning import Candidates, SiteTable, candidates, measure
from hawq_lightning.quantization import FloatDistance, loss_per_site, new_statistics, rounding_errors

SINGLE = (2, 3, 4)


def single_sites(net: nn.Module, batches: Batches, table: SiteTable) -> dict[str, Any]:
    """Part 1: a row a site and width."""
    widths = {"weight_bits": SINGLE, "activation_bits": SINGLE, "input_bits": None}
    rounding = rounding_errors(net, candidates(net, batches, None, table, loss_fn, **widths), table)
    took: dict[str, float] = {}
    weighed: dict[str, Candidates] = {}
    for name, settings in (("all columns", {"estimator": "exact"}), ("drawn probes", {})):
        began = time.process_time()
        traces = measure(net, batches, loss_fn, sites=table, rounding=rounding, progress=False, **settings)
        took[name] = time.process_time() - began
        weighed[name] = candidates(net, batches, traces, table, loss_fn, **widths)
    rows = loss_per_site(net, batches, FloatDistance(net, batches, loss_fn), table, weighed["all columns"])
    for row in rows:
        for name, listed in weighed.items():
            c = next(c for c in listed[str(row["site"])] if c.bits == row["bits"])
            row[f"omega, {name}"], row[f"q, {name}"], row[f"stderr, {name}"] = c.omega, c.q, c.q_stderr
    return {"rows": rows, "seconds": took}


def again(net: nn.Module, batches: Batches, table: SiteTable) -> dict[str, Any]:
    """Part 2: a row a weight and width, with BatchNorm measured again."""
    widths = {"weight_bits": SINGLE, "activation_bits": None, "input_bits": None}
    of_widths = candidates(net, batches, None, table, loss_fn, **widths)
    rounding = rounding_errors(net, of_widths, table, batches, loss_fn)
    traces = measure(net, batches, loss_fn, sites=table, rounding=rounding, progress=False)
    weighed = candidates(net, batches, traces, table, loss_fn, **widths)
    forms = {(name, q.bits): q for name, listed in traces.forms.items() for q in listed}
    float_state = {k: v.clone() for k, v in net.state_dict().items()}
    measured_again(net, batches)
    target = FloatDistance(net, batches, loss_fn)
    net.load_state_dict(float_state)
    rows = []
    for site in table.weights:
        for c in weighed[site.name]:
            form = forms[site.name, c.bits]
            if form.renormalised is None:
                continue
            weight = net.get_parameter(site.name)
            with torch.no_grad():
                weight.add_(rounding.weights[site.name].whole()[[w.bits for w in weighed[site.name]].index(c.bits)])
            measured_again(net, batches)
            rows.append({
                "site": site.name, "kind": "weight", "bits": c.bits, "omega": c.omega, "q": form.value,
                "qb": form.renormalised, "measured": kl(net, batches, target),
            })  # fmt: skip
            net.load_state_dict(float_state)
    return {"rows": rows}


@torch.no_grad()
def measured_again(net: nn.Module, batches: Batches) -> None:
    """BatchNorm statistics are the plain averages of the batches."""
    with new_statistics(net):
        for batch in batches:
            net(batch[0])
