"""What every site costs alone, measured: the check of what Ω, and Q where there is one, predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import LightningModule

from hawq_lightning._candidates import Candidates
from hawq_lightning._csv import csv_text
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import Batch, JsonObject, LossFn
from hawq_lightning.quantization import FloatDistance, QuantizerSpec, loss_per_site

_COLUMNS = ("site", "kind", "bits", "predicted", "measured")
_OF_FORMS = ("q", "kl")


def check_of_sites(
    pl_module: LightningModule,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    table: SiteTable,
    candidates: Candidates,
    quantizer: QuantizerSpec,
    progress: bool,
) -> list[JsonObject]:
    """Rows of :func:`hawq_lightning.quantization.loss_per_site`, a site and width each.

    Where there are quadratic forms, also ``q``, half of it, and ``kl``, the distance to the float network that it
    predicts: the labelled loss has a slope at the float network, which is mostly noise of the images.

    Args:
        pl_module: with quantizers off.
        batches: the mean is over these.
        loss_fn: of a batch.
        table: the sites.
        candidates: what to try at each.
        quantizer: the layers'.
        progress: show bars.
    """
    rows: list[JsonObject] = [
        *loss_per_site(pl_module, batches, loss_fn, table, candidates, quantizer=quantizer, progress=progress)
    ]
    forms = {(name, c.bits): c.q for name, listed in candidates.items() for c in listed if c.q is not None}
    if forms:
        target = FloatDistance(pl_module, batches, loss_fn)
        again = loss_per_site(pl_module, batches, target, table, candidates, quantizer=quantizer, progress=progress)
        for row, other in zip(rows, again):
            if (q := forms.get((row["site"], row["bits"]))) is not None:
                row |= {"q": q / 2, "kl": other["measured"]}
    return rows


def check_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as ``loss_check.csv`` has them."""
    columns = _COLUMNS + (_OF_FORMS if any("q" in row for row in rows) else ())
    return csv_text(columns, ([row.get(c) for c in columns] for row in rows), lineterminator="\r\n")
