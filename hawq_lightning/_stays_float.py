"""What a user is told where much of a network stays float."""

from __future__ import annotations

from collections.abc import Sequence

from hawq_lightning._errors import some
from hawq_lightning._shares import binary_size, percent
from hawq_lightning._site_table import SiteTable

MUCH = 0.1  # of the bytes of weights, or of the multiply-accumulates


def stays_float(table: SiteTable) -> str:
    """One sentence where more than a tenth of the bytes of weights or of the MACs stay float; else empty.

    Biases, scales of norms and other vectors of one number a channel are no weights here. Shares count floats as
    float32, sizes are those of the model's own types.

    Args:
        table: with what stays float.
    """
    weights = [
        (t.name, t.as_float32, f"{binary_size(t.bytes)}; {t.reason}")
        for t in table.float_tensors or () if not t.small
    ]  # fmt: skip
    parts = _part(weights, sum(s.float32_bytes for s in table.weights), "bytes of its weights")
    quantized_macs = sum(x.macs for x in table.layers) + sum(x.macs for x in table.products)
    macs = [(f.name or f.type, f.macs, f"{f.macs:,}; {f.reason}") for f in table.floats]
    parts += _part(macs, quantized_macs, "multiply-accumulates")
    if not parts:
        return ""
    return f"Much of the network stays float: {'; '.join(parts)}."


def _part(floats: Sequence[tuple[str, int, str]], quantized: int, what: str) -> list[str]:
    rest = sum(count for _, count, _ in floats)
    if rest <= MUCH * (rest + quantized):
        return []
    largest = sorted((f for f in floats if f[1]), key=lambda f: -f[1])
    named = some([f"{name} ({text})" for name, _, text in largest])
    return [f"{percent(rest / (rest + quantized))} of the {what}, in {named}"]
