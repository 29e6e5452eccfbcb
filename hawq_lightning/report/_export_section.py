"""What happens outside PyTorch: the ONNX file's agreement with the network, sizes and speed, from export.json."""

from __future__ import annotations

from collections.abc import Mapping

from hawq_lightning.report import _text as text
from hawq_lightning.report._run import Run, finite

SPEED_COLUMNS = ("network", "file", "gzip", "one image", "images a second", "memory")
_LOOSE = 0.998  # share of images that should keep their class


def sentences(run: Run) -> list[str]:
    """What was exported and how well it agrees, a fact a sentence."""
    record = run.export
    of_onnx = finite(record.get("onnx_bytes"))
    lines = [] if of_onnx is None else [f"model.onnx takes {text.size(of_onnx)} ({of_onnx:,.0f} bytes)."]
    files = record.get("files")
    for name, taken in (files if isinstance(files, Mapping) else {}).items():
        if (size := finite(taken)) is not None:
            lines.append(f"{name} takes {text.size(size)} ({size:,.0f} bytes).")
    folded, not_folded = finite(record.get("folded")), record.get("not_folded")
    if folded is not None and isinstance(not_folded, Mapping):
        rest = (
            f"; {len(not_folded)} stayed ({'; '.join(f'{k}: {v}' for k, v in list(not_folded.items())[:2])})"
            if not_folded
            else ""
        )
        lines.append(f"{folded:.0f} BatchNorms were folded into scales and biases{rest}.")
    agreement = record.get("agreement")
    if isinstance(agreement, Mapping):
        lines += _agreement(agreement)
    lines += _integer(record.get("integer"))
    score = record.get("map")
    if isinstance(score, Mapping) and all(finite(score.get(k)) is not None for k in ("onnx", "network", "images")):
        lines.append(
            f"mAP on {score['images']:,.0f} images: {score['onnx']:.4f} by onnxruntime, {score['network']:.4f} by the "
            "network."
        )
    speed = _speeds(run)
    if "float" in speed and "plan" in speed:
        files = {"integer": "model.integer.onnx", "plan": "model.onnx"}
        times = [f"{files[k]} {speed['float']['ms'] / speed[k]['ms']:.2f} times" for k in files if k in speed]
        lines.append(f"Speed of one image over the float network's, on this CPU: {', '.join(times)}.")
    return lines


def _integer(record: object) -> list[str]:
    """Of the file for integer kernels."""
    if not isinstance(record, Mapping) or (size := finite(record.get("bytes"))) is None:
        return []
    lines = [f"model.integer.onnx, the fast one, takes {text.size(size)} ({size:,.0f} bytes)."]
    agreement = record.get("agreement")
    found = agreement if isinstance(agreement, Mapping) else {}
    images, same = finite(found.get("images")), finite(found.get("same_top1"))
    if images and same is not None:
        lines.append(f"It gives the same class on {same:,.0f} of {images:,.0f} images ({same / images:.2%}).")
    if isinstance(left := record.get("still_float"), Mapping) and left:
        lines.append(f"{len(left)} of its products stay float: {'; '.join(sorted(set(map(str, left.values())))[:2])}.")
    return lines


def speed_rows(run: Run) -> list[tuple[str, ...]]:
    """Cells under :data:`SPEED_COLUMNS` for float, uniform 8 and the plan, as far as they were measured."""
    return [
        (
            name,
            text.size(s["file_bytes"]),
            text.size(s["gzip_bytes"]),
            f"{s['ms']:.3g} ms",
            f"{s['images_per_second']:,.0f}",
            text.size(s["peak_bytes"]),
        )
        for name, s in _speeds(run).items()
    ]


def speed_note(run: Run) -> str:
    """How the speeds were measured."""
    how = run.export.get("speed_settings")
    if not isinstance(how, Mapping) or not _speeds(run):
        return ""
    return (
        f"Measured with onnxruntime {how.get('onnxruntime', '')} on the CPU, threads={how.get('threads')}; "
        f"images a second in batches of {how.get('batch_size')}; memory beyond what Python and onnxruntime take alone."
    )


def doubts(run: Run) -> list[str]:
    """What the comparison leaves open."""
    agreement = run.export.get("agreement")
    if not isinstance(agreement, Mapping):
        return []
    images, same = finite(agreement.get("images")), finite(agreement.get("same_top1"))
    if not images or same is None:
        return []
    lines = []
    if same < _LOOSE * images:
        lines.append(f"model.onnx gives another class on {images - same:.0f} of {images:.0f} images.")
    if odd := [d for d in _disagreements(agreement) if d[0] > d[1]]:
        lines.append(f"{len(odd)} of them had a margin wider than the logits moved: the file is not this network's.")
    return lines


def _agreement(agreement: Mapping[str, object]) -> list[str]:
    images, same = finite(agreement.get("images")), finite(agreement.get("same_top1"))
    lines = []
    if images and same is not None:
        sentence = f"onnxruntime gives the same class on {same:,.0f} of {images:,.0f} images ({same / images:.2%})"
        if margins := _disagreements(agreement):
            close = sum(margin <= moved for margin, moved in margins)
            which = "all" if close == len(margins) else str(close)
            sentence += (
                f"; on {which} of the other {len(margins)} the two best classes lay closer than the logits moved"
            )
        lines.append(f"{sentence}.")
    outputs = agreement.get("outputs")
    if isinstance(outputs, Mapping) and len(outputs) > 1:
        each = [f"{k} by {v['mean_difference']:.2g} on average and {v['largest_difference']:.2g} at most"
                for k, v in outputs.items() if _two(v)]  # fmt: skip
        lines.append(f"On {images or 0:,.0f} images the outputs differ: {', '.join(each)}.")
    elif (worst := finite(agreement.get("largest_difference"))) is not None and images:
        lines.append(f"On {images:,.0f} images the outputs differ by at most {worst:.2g}.")
    flipped, codes = finite(agreement.get("flipped_codes")), finite(agreement.get("codes"))
    if flipped is not None and codes:
        lines.append(
            f"{flipped:,.0f} of {codes:,.0f} activation codes flipped ({flipped / codes:.2%}), by float rounding."
        )
    return lines


def _two(row: object) -> bool:
    keys = ("mean_difference", "largest_difference")
    return isinstance(row, Mapping) and all(finite(row.get(k)) is not None for k in keys)


def _disagreements(agreement: Mapping[str, object]) -> list[tuple[float, float]]:
    """Margin and movement of every image with another class."""
    listed = agreement.get("disagreements")
    pairs = [
        (finite(d.get("margin")), finite(d.get("difference")))
        for d in (listed if isinstance(listed, list) else [])
        if isinstance(d, Mapping)
    ]
    return [(m, d) for m, d in pairs if m is not None and d is not None]


def _speeds(run: Run) -> dict[str, dict[str, float]]:
    keys = ("file_bytes", "gzip_bytes", "ms", "images_per_second", "peak_bytes")
    table = run.export.get("speed")
    speeds = {}
    for name, row in (table if isinstance(table, Mapping) else {}).items():
        values = {k: finite(row.get(k)) for k in keys} if isinstance(row, Mapping) else {}
        if values and all(values.values()):
            speeds[str(name)] = {k: float(v) for k, v in values.items() if v is not None}
    return speeds
