"""The headline numbers, what was uncertain, and the settings: shared by the page and the model card."""

from __future__ import annotations

from collections.abc import Mapping

from hawq_lightning._shares import percent
from hawq_lightning.report import _export_section as export_section
from hawq_lightning.report import _text as text
from hawq_lightning.report._checks import rank_correlations
from hawq_lightning.report._run import Run, finite
from hawq_lightning.report._site_figures import KINDS, uncertain
from hawq_lightning.selection import COSTS

STAGE_NAMES = {"float": "float", "quantized": "after quantizing", "fine_tuned": "after fine-tuning"}
_UNSTABLE = 0.9  # share of bootstrap draws that choose the same bits
_MOST_LIFTED = 6
_LOOSE = 0.6  # rank correlation


def accuracy_rows(run: Run) -> list[tuple[str, str, str]]:
    """Stage, metric, difference from float."""
    metric, stages = run.metric
    start = stages.get("float")
    rows = []
    for stage, value in stages.items():
        gap = "" if start is None or stage == "float" else _gap(value - start, metric)
        rows.append((STAGE_NAMES[stage], text.score(value, metric), gap))
    return rows


_COMPLETED = (
    "weight_bytes",
    "model_bytes",
    "act_bytes",
    "file_bytes",
    "bops",
)  # rows of their own: metrics.json completes them


def size_rows(run: Run) -> list[tuple[str, str, str]]:
    """Quantity, value, and how it compares with float or with 8 bits."""
    cost = _costs(run)
    rows = [("weights, float32", text.size(cost.get("float_weight_bytes")), _share(cost))]
    smaller = f"{text.times(cost.get('w_comp'))} smaller"
    rows.append(("weights, codes (W-Comp)", text.size(cost.get("weight_bytes")), smaller))
    if "model_bytes" in cost:
        rows.append(("whole model, float32", text.size(cost.get("float_model_bytes")), ""))
        whole = f"{text.times(cost.get('model_comp'))} smaller"
        rows.append(("whole model, float parts included", text.size(cost["model_bytes"]), whole))
    if "act_bytes" in cost:
        ratio = f"{text.times(cost.get('a_comp'))} smaller" if "a_comp" in cost else ""
        rows.append(("activations, one image (A-Comp)", text.size(cost["act_bytes"]), ratio))
    if "mean_weight_bits" in cost:
        rows.append(("mean bits of a weight", f"{cost['mean_weight_bits']:.2f}", ""))
    if "file_bytes" in cost:
        rows.append(("packed file, all included", text.size(cost["file_bytes"]), f"{cost['file_bytes']:,.0f} bytes"))
    if "float_bytes" in cost and "model_bytes" not in cost:
        rows.append(("model, float32, all included", text.size(cost["float_bytes"]), ""))
    if cost.get("bops"):
        of = cost.get("bops_8bit")
        rows.append(
            (
                "bit operations, one image (BOPs)",
                text.count(cost["bops"]),
                f"{cost['bops'] / of:.1%} of 8 bits" if of else "",
            )
        )
    others = {n: COSTS[n] for n in COSTS if run.plan and n in run.plan.costs and n not in _COMPLETED}
    rows += [(entry.title or name, entry.unit.format(cost[name]), "") for name, entry in others.items()]
    return [r for r in rows if r[1] != "–"]


def headline(run: Run) -> list[tuple[str, str]]:
    """The few numbers in large type: value, what it is."""
    cost, (metric, stages) = _costs(run), run.metric
    cards = []
    if "w_comp" in cost:
        cards.append((text.times(cost["w_comp"]), "smaller weights"))
    if "model_comp" in cost:
        share = percent(cost["quantized_share"])
        cards.append((text.times(cost["model_comp"]), f"smaller model, {share} of which are these weights"))
    cards += _by_loss(run)
    last = stages.get("fine_tuned", stages.get("quantized"))
    if last is not None:
        start = stages.get("float")
        cards.append(
            (text.score(last, metric), metric + (f", float {text.score(start, metric)}" if start is not None else ""))
        )
    if "file_bytes" in cost:
        cards.append((text.size(cost["file_bytes"]), "packed file"))
    if cost.get("bops") and cost.get("bops_8bit"):
        cards.append((f"{cost['bops'] / cost['bops_8bit']:.0%}", "of the bit operations at 8 bits"))
    elif "mean_weight_bits" in cost:
        cards.append((f"{cost['mean_weight_bits']:.2f}", "bits a weight on average"))
    return cards


def _by_loss(run: Run) -> list[tuple[str, str]]:
    """What a budget by loss asked for, and what the plan measured."""
    found = run.plan.settings.get("by_loss") if run.plan else None
    if not isinstance(found, Mapping):
        return []
    cards = []
    for name, share, words in (("kl", False, "KL to the float network"), ("agreement", True, "predictions unchanged")):
        part = found.get(name)
        if isinstance(part, Mapping) and all(finite(part.get(k)) is not None for k in ("limit", "measured")):
            shown = [f"{100 * part[k]:.4g}%" if share else f"{part[k]:.3g}" for k in ("measured", "limit")]
            bound = "at least" if share else "at most"
            cards.append((shown[0], f"{words} before fine-tuning, {bound} {shown[1]} asked"))
    return cards


def summary(run: Run) -> str:
    """One sentence for whoever reads no further."""
    cost, (metric, stages) = _costs(run), run.metric
    parts = []
    if run.plan:
        widths = sorted({s.bits for s in run.plan.weights})
        parts.append(
            f"{len(run.plan.weights)} weight tensors were given {_listed(widths)} bits by their Hessian traces"
        )
    if "w_comp" in cost:
        parts.append(f"which makes them {text.times(cost['w_comp'])} smaller than float32")
    if "model_comp" in cost:
        share = percent(cost["quantized_share"])
        parts.append(f"and the whole model, of which they are {share}, {text.times(cost['model_comp'])} smaller")
    start, last = stages.get("float"), stages.get("fine_tuned", stages.get("quantized"))
    if start is not None and last is not None:
        step = "after fine-tuning" if "fine_tuned" in stages else "without fine-tuning"
        parts.append(f"and {step} {metric} is {text.score(last, metric)} against {text.score(start, metric)} in float")
    return ", ".join(parts) + "." if parts else ""


def doubts(run: Run) -> list[str]:
    """What was uncertain, in sentences."""
    lines = []
    if run.plan and isinstance(sentence := run.plan.settings.get("stays_float"), str):
        lines.append(sentence)
    if run.sensitivity:
        lines += list(run.sensitivity.notes)
    lifted = run.plan.settings.get("lifted") if run.plan else None
    if isinstance(lifted, (list, tuple)) and lifted:
        lines += [str(s) for s in lifted[:_MOST_LIFTED]]
        if len(lifted) > _MOST_LIFTED:
            lines.append(f"The same holds for {len(lifted) - _MOST_LIFTED} more sites; plan.json lists them.")
    elif run.sensitivity:
        zero = [r.name for r in run.sensitivity if r.trace <= 0]
        noisy = [r.name for r in run.sensitivity if r.trace > 0 and uncertain(r)]
        if zero:
            lines.append(f"Zero or negative trace, so any width looks free: {text.names(zero)}.")
        if noisy:
            lines.append(f"Trace within two standard errors of zero: {text.names(noisy)}.")
    if run.plan:
        shaky = [
            f"{s.name} ({s.stability:.0%})"
            for s in run.plan.sites
            if s.stability is not None and s.stability < _UNSTABLE
        ]
        if shaky:
            lines.append(f"The choice changes when the images are drawn anew: {text.names(shaky)}.")
    ranks = rank_correlations(run.loss_check)
    if loose := [f"{KINDS[k][0]} ({v:.2f})" for k, v in ranks.items() if k in KINDS and v < _LOOSE]:
        free = sum(c.outcome <= 0 for c in run.loss_check)
        lines.append(
            f"Predicted and measured loss changes rank differently for {' and '.join(loose)}; {free} of "
            f"{len(run.loss_check)} measured changes are zero or negative, too small to rank."
        )
    predicted, real = _costs(run, measured=False).get("file_bytes"), run.packed_bytes
    if predicted and real and predicted != real:
        lines.append(f"The packed file has {real:,} bytes where {predicted:,.0f} were predicted.")
    lines += export_section.doubts(run)
    return lines


def settings(run: Run) -> dict[str, str]:
    """What the numbers depend on."""
    table: dict[str, str] = {}
    if run.command:
        table["command"] = run.command
    if run.plan:
        table |= {"budget": text.plain(run.plan.budget), "selector": run.plan.selector}
        table |= {str(k): text.plain(v) for k, v in run.plan.settings.items() if k not in ("lifted", "stays_float")}
    if run.sensitivity:
        table |= {str(k): text.plain(v) for k, v in run.sensitivity.settings.items()}
    for key in ("seed", "model", "data", "task", "torch", "lightning", "version"):
        if key in run.metrics:
            table[key] = text.plain(run.metrics[key])
    seconds = run.metrics.get("seconds")
    if isinstance(seconds, Mapping):
        table["seconds"] = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if isinstance(v, (int, float)))
    fingerprint = (run.plan and run.plan.fingerprint) or (run.sensitivity and run.sensitivity.fingerprint)
    if fingerprint:
        table["fingerprint"] = str(fingerprint)
    return table


def _costs(run: Run, measured: bool = True) -> dict[str, float]:
    """Costs of the plan, completed from metrics.json; the real file's size where it lies there."""
    cost: dict[str, float] = {}
    for key in (
        "float_bytes",
        "weight_bytes",
        "float_weight_bytes",
        "file_bytes",
        "w_comp",
        "a_comp",
        "mean_weight_bits",
    ):
        if (value := run.number("sizes", key)) is not None:
            cost[key] = value
    for key in ("bops", "bops_8bit"):
        if (value := run.number(key)) is not None:
            cost[key] = value
    if run.plan:
        weights = run.plan.weights
        total = sum(s.numel for s in weights)
        if total:
            bits = sum(s.numel * s.bits for s in weights)
            cost |= {"float_weight_bytes": 4 * total, "weight_bytes": bits / 8, "mean_weight_bits": bits / total}
            cost["w_comp"] = 32 * total / bits
        cost |= {k: v for k, v in run.plan.costs.items() if isinstance(v, (int, float))}
        if "act_bits" in cost and "act_bytes" not in cost:
            cost["act_bytes"] = cost["act_bits"] / 8
        if run.plan.layers and all(x.macs for x in run.plan.layers) and "bops_8bit" not in cost:
            cost["bops_8bit"] = 64 * (sum(x.macs for x in run.plan.layers) + sum(p.macs for p in run.plan.products))
    if measured and run.packed_bytes:
        cost["file_bytes"] = run.packed_bytes
    return cost


def _share(cost: Mapping[str, float]) -> str:
    return f"the quantized {percent(cost['quantized_share'])} of the model" if "quantized_share" in cost else ""


def _gap(change: float, metric: str) -> str:
    said = f"{100 * change:+.2f} points" if metric == "accuracy" else f"{change:+.3f}"
    return said.replace("-", "−")


def _listed(widths: list[int]) -> str:
    if len(widths) == 1:
        return str(widths[0])
    return ", ".join(map(str, widths[:-1])) + f" or {widths[-1]}"
