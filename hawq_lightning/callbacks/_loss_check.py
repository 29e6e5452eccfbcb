"""What every site costs alone, measured: the check of what Ω, and Q where there is one, predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_info

from hawq_lightning._csv import csv_text
from hawq_lightning._errors import HawqError
from hawq_lightning._types import JsonObject
from hawq_lightning.callbacks._choose import Choice
from hawq_lightning.quantization import loss_per_site, quantizer_of

_COLUMNS = ("site", "kind", "bits", "predicted", "measured", "q", "kl")


def check_of_sites(choice: Choice) -> list[JsonObject]:
    """Rows of :func:`hawq_lightning.quantization.loss_per_site`, a site and width each, on held-out data.

    With ``kl``, the distance to the float network that half of Ω predicts: the labelled loss has a slope at the float
    network, which is mostly noise of the images. Where there are quadratic forms, also ``q``, half of it.

    Args:
        choice: of the plan, with its data.
    """
    model, loss_fn, table, candidates = choice.pl_module, choice.loss_fn, choice.table, choice.candidates
    quantizer = quantizer_of(choice.quantizer)
    try:
        rows: list[JsonObject] = [*choice.held_out.loss_per_site(table, candidates, quantizer, choice.progress)]
    except HawqError as error:
        rank_zero_info(f"HAWQ: sites are checked by the labelled loss alone: {error}")
        rows = [
            *loss_per_site(
                model, choice.batches, loss_fn, table, candidates, quantizer=quantizer, progress=choice.progress
            )
        ]
    forms = {(name, c.bits): c.q for name, listed in candidates.items() for c in listed if c.q is not None}
    for row in rows:
        if (q := forms.get((row["site"], row["bits"]))) is not None:
            row["q"] = q / 2
    return rows


def check_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as ``loss_check.csv`` has them."""
    columns = [c for c in _COLUMNS if any(c in row for row in rows)]
    return csv_text(columns, ([row.get(c) for c in columns] for row in rows), lineterminator="\r\n")
