"""The model card: README.md in the run folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_text
from hawq_lightning.report import _export_section as export_section
from hawq_lightning.report import _summary as summary
from hawq_lightning.report._run import read_run
from hawq_lightning.report._text import plain


def model_card(folder: str | Path, *, title: str | None = None) -> Path:
    """Write ``README.md`` from what a run folder holds: plan, sizes, accuracy, the command that made it.

    Args:
        folder: as for :func:`write_report`.
        title: heading; the folder's name otherwise.

    Returns:
        Path of the card.

    Raises:
        HawqError: no such folder, nothing in it to tell, or it cannot be written to.
    """
    run = read_run(folder)
    metric, _ = run.metric
    lines = [f"# {markdown_text(title or run.folder.resolve().name)}", ""]
    if sentence := summary.summary(run):
        lines += [sentence, ""]
    if rows := summary.accuracy_rows(run):
        lines += ["## Accuracy" if metric == "accuracy" else f"## {metric}", ""]
        lines += [*markdown_table(["network", metric, "from float"], rows), ""]
    if rows := summary.size_rows(run):
        lines += ["## Size and work", "", *markdown_table(["quantity", "value", "compared"], rows), ""]
    if run.plan:
        lines += ["## Plan", ""]
        if run.plan.budget is not None:
            lines += [
                f"Budget {markdown_text(plain(run.plan.budget))}, selector {markdown_text(run.plan.selector)}.",
                "",
            ]
        reads = {layer: s.bits for s in run.plan.activations for layer in s.layers}
        plan = [
            [s.name, "x".join(map(str, s.shape)), s.bits, s.code, reads.get(s.layers[0], "float") if s.layers else ""]
            for s in run.plan.weights
        ]
        lines += [*markdown_table(["weight", "shape", "bits", "code", "bits of its input"], plan), ""]
    if onnx_lines := export_section.sentences(run):
        lines += ["## ONNX", "", *(f"- {markdown_text(s)}" for s in onnx_lines), ""]
        if speeds := export_section.speed_rows(run):
            lines += [*markdown_table(export_section.SPEED_COLUMNS, speeds), "", export_section.speed_note(run), ""]
    if doubts := summary.doubts(run):
        lines += ["## What was uncertain", "", *(f"- {markdown_text(d)}" for d in doubts), ""]
    if run.command:
        fence = "`" * max(3, 1 + max((len(m) for m in re.findall("`+", run.command)), default=0))
        lines += ["## How it was made", "", fence, run.command, fence, ""]
    if run.packed_bytes:
        lines += [
            "## Use", "", "```python", "from hawq_lightning import load_packed", "",
            'model = load_packed("model.safetensors", build_the_same_model()).eval()', "```", "",
        ]  # fmt: skip
    rest = {k: v for k, v in summary.settings(run).items() if k not in ("command", "budget", "selector")}
    if rest:
        lines += ["## Settings", "", *markdown_table(["setting", "value"], list(rest.items())), ""]
    path = run.folder / "README.md"
    try:
        write_text(path, "\n".join(lines))
    except OSError as error:
        raise HawqError(f"Cannot write {path}: {error.strerror or error}.") from error
    return path


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table whose cells are text, whatever is in them."""
    body = ["| " + " | ".join(markdown_text(str(c)) for c in row) + " |" for row in rows]
    return ["| " + " | ".join(markdown_text(c) for c in columns) + " |", "|" + " --- |" * len(columns), *body]


def markdown_text(text: str) -> str:
    """One line that no renderer takes for markup."""
    # names come from files: keep them text, whatever renders the card
    text = re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
    return " ".join(text.split())
