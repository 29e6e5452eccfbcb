"""What a measurement says: sentences for the user, numbers for the Trainer's loggers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from hawq_lightning._plan import Plan
from hawq_lightning._shares import compression_text
from hawq_lightning._site_table import SiteTable
from hawq_lightning._stays_float import stays_float
from hawq_lightning.sensitivity import Sensitivity, guarded_mean_traces, kinds_in_noise


def announce(trainer: Trainer, sensitivity: Sensitivity | None, plan: Plan) -> None:
    """Say what was measured and chosen, and log it.

    Args:
        trainer: whose loggers get the numbers.
        sensitivity: the traces; ``None``: none were measured.
        plan: chosen by them.
    """
    if sensitivity is not None:
        _announce_traces(sensitivity)
    rank_zero_info(describe(plan))
    values: dict[str, float] = {}
    for s in plan.sites:
        values[f"hawq/bits/{s.name}"] = s.bits
        for what, number in (("mean_trace", s.mean_trace), ("stderr", s.stderr), ("omega", s.omega)):
            if number is not None and math.isfinite(number):
                values[f"hawq/{what}/{s.name}"] = number
    values |= {f"hawq/{k}": v for k, v in plan.costs.items()}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def _announce_traces(sensitivity: Sensitivity) -> None:
    _, floored = guarded_mean_traces(sensitivity)
    loud = len(kinds_in_noise(sensitivity))  # the first of the sentences
    for note in floored[:loud]:
        rank_zero_warn(
            f"HAWQ: {note} Traces mean something near a minimum: load trained weights, or give "
            "start_epoch=<epochs>; if the network is trained, measure more probes or images."
        )
    for note in (*sensitivity.notes, *floored[loud:]):
        rank_zero_info(f"HAWQ: {note}")


def warn_of_float(table: SiteTable) -> None:
    """Warn where more than a tenth of the bytes of weights, or of the MACs, stay float."""
    if sentence := stays_float(table):
        rank_zero_warn(f"HAWQ: {sentence}")


def warn_of_no_codes(table: SiteTable) -> None:
    """Warn where ``deploy="integer"`` changes nothing, since integer kernels keep nothing of the network as codes."""
    if not table.biases and not any(s.fixed_bits for s in table.activations):
        rank_zero_warn(
            'HAWQ: deploy="integer" changes nothing here: no layer of this network gives codes to another by an '
            "integer kernel."
        )


def describe(plan: Plan) -> str:
    """One line about a plan."""
    counts: dict[int, int] = {}
    for s in plan.weights:
        counts[s.bits] = counts.get(s.bits, 0) + 1
    spread = ", ".join(f"{n} at {b} bit" for b, n in sorted(counts.items()))
    size = plan.costs.get("weight_bytes", 0.0)
    of_what = compression_text(plan.costs)
    known = any(s.omega is not None for s in plan.sites)
    predicted = f"Omega {plan.omega:.3g}" if known else "Omega not known"
    return f"HAWQ plan: {spread}; weights {size / 1024:.1f} KiB, {of_what}; {predicted}.{_of_loss(plan)}"


def _of_loss(plan: Plan) -> str:
    """What a budget by loss led to, as a sentence; nothing where there was none."""
    by_loss = plan.settings.get("by_loss")
    if not isinstance(by_loss, Mapping):
        return ""
    again = ", BatchNorm measured again" if by_loss.get("after") != "quantizing" else ""
    kl, agreement = by_loss["kl"], by_loss.get("agreement")
    parts = [f"KL {kl['measured']:.3g}" + (f" (at most {kl['limit']:g})" if "limit" in kl else "")]
    if agreement is not None:
        least = f" (at least {100 * agreement['limit']:g}%)" if "limit" in agreement else ""
        parts.append(f"{100 * agreement['measured']:.4g}% of the predictions unchanged{least}")
    return f" Measured on {by_loss.get('measured_on', 'held-out data')}{again}: {', '.join(parts)}."
