"""Random selection problems that look like networks."""

from __future__ import annotations

import math

import numpy as np

from hawq_lightning import Candidate, Layer, Site, SiteTable
from hawq_lightning.selection import Problem
from hawq_lightning.sensitivity import Sensitivity, SiteTrace


def random_network(seed, count, weight_bits=(2, 4, 8), activation_bits=(4, 8), *, tied=True, device=False, share=0.3):
    """A problem like a network's: weights, activations that some layers share, ties, a device's pairs."""
    rng = np.random.default_rng(seed)
    weights, acts, layers, options = [], [], [], {}
    for i in range(count):
        name = f"l{i}"
        numel = int(rng.integers(1, 60)) * 16
        weights.append(Site(f"{name}.weight", "weight", (name,), (16, numel // 16), numel, 16))
        if not acts or rng.random() > share:
            acts.append(
                Site(f"{name}.input", "activation", (name,), (int(rng.integers(1, 99)),), int(rng.integers(1, 99)))
            )
        layers.append(Layer(name, "Linear" if i % 5 == 4 else "Conv2d", weights[-1].name, acts[-1].name, numel * 7))
    records = []
    for s in (*weights, *acts):
        bits = weight_bits if s.kind == "weight" else activation_bits
        trace = math.exp(rng.normal(0, 2))
        moved = [s.numel * 4.0**-b * math.exp(rng.normal(0, 0.3)) for b in bits]
        options[s.name] = tuple(Candidate(b, "affine", trace * m, m) for b, m in zip(bits, moved))
        records.append(SiteTrace(s.name, s.kind, trace * s.numel, 0.1, 0.1, s.numel, trace))
    ties = [[f"l{i}.weight", f"l{i + 2}.weight"] for i in range(0, count - 2, 4)] if tied else ()
    pairs = {"Conv2d": [(w, a) for w in weight_bits for a in activation_bits if w <= a]} if device else None
    table = SiteTable((*weights, *acts), tuple(layers))
    return Problem(table, options, Sensitivity(tuple(records)), 100, ties=ties, pairs=pairs), ties, pairs
