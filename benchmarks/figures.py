"""The paper's figures of networks that were trained here: one subcommand a figure, each writes its page.

    python benchmarks/figures.py figure2 --data cifar10 --weights resnet20=resnet20_cifar10.pt
    python benchmarks/figures.py figure7 --weights squeezenext_cifar=sqnxt.pt --detector last.ckpt --bccd bccd

CIFAR-10 as an image folder, and blood cells (BCCD) for the detector. Traces are to 5% standard error (20% or four
probes for the detector); eigenvectors, landscapes and steps are of the first batch. Figures 5 and 8 are two views of
one measurement, kept beside them (``convergence_NETWORK.json``) and made once; so are the parts of Figures 2 and 7.

Results: docs/results/figureN.md, docs/results/figures/figureN_*.{png,csv}.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figure_drawings import draw_set_b, draw_side_by_side, draw_traces, rank_correlation
from figure_subjects import RETINANET, SQUEEZENEXT, TITLES, Subject, subjects
from PIL import Image

import hawq_lightning as hl
from hawq_lightning.quantization import quantizable_layers
from hawq_lightning.report import ReportFigure, chosen_sites, csv_text, draw_images, draw_landscapes, draw_steps
from hawq_lightning.selection import tradeoff
from hawq_lightning.sensitivity import landscape, top_eigenpairs, trace_history

PAGES = Path(__file__).resolve().parents[1] / "docs" / "results"
WIDTH, COLOURS = 900, 160  # of pictures: pixels, and entries of the palette
MOST_ROWS = 1000  # of a table
KNOBS = ("images", "batch", "points", "steps", "budget", "detector_images")
WIDTHS = (2, 3, 4, 6, 8)


def measured(of: Subject) -> hl.Sensitivity:
    """Traces of all its sites."""
    return hl.measure(of.net, of.batches, of.loss_fn, rtol=of.rtol, max_probes=of.probes, progress=False)


def block(site: str) -> str:
    """A site's name without what all sites have."""
    return site.removesuffix(".weight").removeprefix("inner.").removesuffix(".input")


def save(figure: ReportFigure | None, stem: str) -> str:
    """A small PNG and the table; returns the page's lines that show them."""
    if figure is None:
        return ""
    folder = PAGES / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.open(io.BytesIO(figure.png())).convert("RGB")
    picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(folder / f"{stem}.png", optimize=True)
    step = -(-len(figure.rows) // MOST_ROWS)
    text = csv_text(figure.columns, figure.rows[::step])
    (folder / f"{stem}.csv").write_text(text, encoding="utf-8")
    told = f", one row in {step}" if step > 1 else ""
    return f"![{figure.alt}](figures/{stem}.png)\n\n{figure.caption} [Numbers](figures/{stem}.csv){told}."


def page(number: int, title: str, claim: str, seen: Sequence[str], parts: Sequence[str], command: str) -> None:
    """``docs/results/figureN.md``: the paper's claim, what is seen here, pictures, command."""
    lines = [
        f"# Figure {number}: {title}", "", f"**The paper**: {claim}", "", f"**Here**: {' '.join(seen)}", "",
        *(line for part in parts for line in (part, "")), "```", f"python benchmarks/figures.py {command}", "```", "",
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, one thread of a CPU.",
    ]  # fmt: skip
    (PAGES / f"figure{number}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def surfaces(of: Subject, traces: hl.Sensitivity, points: int) -> tuple[ReportFigure | None, dict[str, float]]:
    """Landscapes of the weights of largest and least mean trace, and by how much the loss rises in each."""
    ends = chosen_sites(traces, "weight", 2)
    few = of.batches[:1]
    pairs = top_eigenpairs(of.net, few, of.loss_fn, only=ends, count=2, rtol=0.1, max_steps=of.steps)
    span = (2 / max(e.values[0] for e in pairs.values())) ** 0.5  # where the sharpest parabola has risen by one
    offsets = np.linspace(-span, span, points).tolist()
    layers, _ = quantizable_layers(of.net)
    grids = {
        block(n): landscape(
            of.net, few, of.loss_fn, layers[n.removesuffix(".weight")].weight, (e.vectors[0], e.vectors[1]), offsets
        )
        for n, e in pairs.items()
    }
    rises = {n: float(np.max(g) - np.min(g)) for n, g in grids.items()}
    return draw_landscapes(grids, offsets, {block(n): e.values for n, e in pairs.items()}), rises


def traces_and_landscapes(args: argparse.Namespace, number: int, title: str, claim: str, wanted: Sequence[str]) -> None:
    """Figures 2 and 7."""
    seen, parts = [], []
    found = subjects(args, wanted)
    for of in found:
        asked = {"images": of.images, "few": of.few, "points": args.points}
        kept = PAGES / "figures" / f"figure{number}_{of.name}.json"
        if kept.is_file() and (known := json.loads(kept.read_text("utf-8")))["asked"] == asked:
            seen.append(known["seen"])
            parts += known["parts"]
            continue
        traces = measured(of)
        figure, rises = surfaces(of, traces, args.points)
        mean = {block(r.name): r.mean_trace for r in traces if r.kind == "weight" and r.trace > 0}
        high, low = max(mean, key=mean.__getitem__), min(mean, key=mean.__getitem__)
        steep = " against ".join(f"{rise:.3g} at `{n}`" for n, rise in rises.items())
        told = (
            f"{TITLES[of.name]}: over {len(mean)} weights the average trace spans a factor of "
            f"{mean[high] / mean[low]:,.0f}, from `{low}` ({mean[low]:.2g}) to `{high}` ({mean[high]:.2g}); "
            f"over the same offsets the loss rises by {steep}."
        )
        shown = [
            f"## {TITLES[of.name]}\n\n{of.images} training images; landscapes on {of.few} of them. Steps have the same "
            "length in both landscapes, which a block of many elements shares among them: their order is that of the "
            "top eigenvalues and need not be that of the average traces.",
            save(draw_traces(mean, f"figure{number}"), f"figure{number}_{of.name}_traces"),
            save(figure, f"figure{number}_{of.name}_landscapes"),
        ]
        kept.write_text(json.dumps({"asked": asked, "seen": told, "parts": shown}, indent=1) + "\n", encoding="utf-8")
        seen.append(told)
        parts += shown
    seen += [f"{TITLES[n]}: not measured." for n in wanted if n not in {of.name for of in found}]
    page(number, title, claim, seen, parts, args.line)


def figure2(args: argparse.Namespace) -> None:
    """Average trace by block, and landscapes of two blocks."""
    traces_and_landscapes(
        args, 2, "average Hessian trace by block",
        "the average trace is significantly different for different blocks of InceptionV3 and ResNet50, and so is the "
        "sharpness of the loss around them.", ("resnet20", "mobilenet_cifar"),
    )  # fmt: skip


def figure7(args: argparse.Namespace) -> None:
    """The same of SqueezeNext and RetinaNet."""
    traces_and_landscapes(
        args, 7, "traces and landscapes of SqueezeNext and RetinaNet",
        "as Figure 2, for SqueezeNext on ImageNet and RetinaNet on COCO: traces and sharpness differ by block.",
        (SQUEEZENEXT, RETINANET),
    )  # fmt: skip


def figure4(args: argparse.Namespace) -> None:
    """Size against the sum of Ω: set B, the frontier, Direct and HAWQ."""
    seen, parts = [], []
    for of in subjects(args, ("resnet20", "mobilenet_cifar", SQUEEZENEXT)):
        table = hl.sites(of.net, of.batches[0][0])
        traces = hl.measure(of.net, of.batches, of.loss_fn, sites=table, rtol=of.rtol, progress=False)
        weighed = hl.candidates(
            of.net, of.batches, traces, table, of.loss_fn, weight_bits=WIDTHS, activation_bits=None
        )  # fmt: skip
        problem = hl.Problem(table, weighed, traces)
        pairs = top_eigenpairs(
            of.net, of.batches[:1], of.loss_fn, sites=table, only=[s.name for s in table.weights], rtol=0.1
        )
        tops = {n: e.values[0] for n, e in pairs.items()}
        plans = {
            "HAWQ": hl.select(problem, args.budget, "hawq", eigenvalues=tops),
            "Direct": hl.select(problem, args.budget, "direct"),
        }
        size = plans["HAWQ"].costs["weight_bytes"]
        plans["HAWQ-V2"] = hl.select(problem, {"weight_bytes": size})
        rows = tradeoff(problem, plans=plans, samples=600, points=300)
        omega = {str(r["label"]): float(r["omega"]) for r in rows if r["series"] == "plan"}
        seen.append(
            f"{TITLES[of.name]}: at HAWQ's size ({size / 1024:.0f} KiB) the frontier's plan has Ω "
            f"{omega['HAWQ-V2']:.3g}, HAWQ's {omega['HAWQ']:.3g} ({omega['HAWQ'] / omega['HAWQ-V2']:.1f} times as "
            f"much); Direct, {plans['Direct'].costs['weight_bytes'] / 1024:.0f} KiB, {omega['Direct']:.3g}."
        )
        if len({plans["HAWQ"].bits[w.name] for w in table.weights}) == 1:
            seen.append("HAWQ's rule, filling that budget, gives every weight the same bits here.")
        parts += [
            f"## {TITLES[of.name]}\n\nWidths {', '.join(map(str, WIDTHS))}, {of.images} training images, "
            f"HAWQ and Direct under {args.budget}.",
            save(draw_set_b(rows), f"figure4_{of.name}"),
        ]
    page(
        4, "the frontier of model size and Ω",
        "every point is a setting of bits; for each size HAWQ-V2 takes the one of least Ω, which lies below HAWQ's "
        "choice by hand and Direct quantization of the same size.", seen, parts, args.line,
    )  # fmt: skip


def figure6(args: argparse.Namespace) -> None:
    """Average trace beside top eigenvalue."""
    seen, parts = [], []
    for of in subjects(args, ("resnet20", "mobilenet_cifar", SQUEEZENEXT)):
        traces = {r.name: r.mean_trace for r in measured(of) if r.kind == "weight" and r.trace > 0}
        pairs = top_eigenpairs(of.net, of.batches[:1], of.loss_fn, only=list(traces), rtol=0.05)
        both = {block(n): (m, pairs[n].values[0]) for n, m in traces.items() if pairs[n].values[0] > 0}
        rank = rank_correlation(both)
        spans = [max(x) / min(x) for x in zip(*both.values())]
        seen.append(
            f"{TITLES[of.name]}: the two orders of {len(both)} weights have a rank correlation of {rank:.2f}; the "
            f"average trace spans a factor of {spans[0]:,.0f}, the top eigenvalue one of {spans[1]:,.0f}."
        )
        parts += [
            f"## {TITLES[of.name]}\n\nTraces on {of.images} training images, eigenvalues on {of.few} of them.",
            save(draw_side_by_side(both), f"figure6_{of.name}"),
        ]
    page(
        6, "average trace against top eigenvalue",
        "in practice trace and top eigenvalue of a block can be significantly different.", seen, parts, args.line,
    )  # fmt: skip


def convergence(of: Subject, steps: int) -> dict[str, Any]:
    """Traces with one row an image, and one estimate of Hutchinson's a step on the first batch; kept in a file."""
    file = PAGES / "figures" / f"convergence_{of.name}.json"
    asked: dict[str, Any] = {"images": of.images, "few": of.few, "steps": steps}
    kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if {k: kept.get(k) for k in asked} != asked:
        traces = hl.measure(of.net, of.batches, of.loss_fn, rtol=of.rtol, sampling="all", progress=False)
        series = trace_history(of.net, of.batches[:1], of.loss_fn, steps=steps)
        for kind in ("weight", "activation"):
            names = chosen_sites(traces, kind)
            asked[kind] = {
                "rows": {n: [float(f"{v:.5g}") for v in traces.rows[n]] for n in names},
                "steps": {n: [float(f"{v:.5g}") for v in series[n]] for n in names},
            }  # fmt: skip
        kept = asked
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    return kept


def spread(values: Sequence[float], count: int) -> float:
    """Standard error of the mean of ``count`` such values, as a share of their mean."""
    return float(np.std(values, ddof=1) / abs(np.mean(values)) / count**0.5)


def converging(args: argparse.Namespace, number: int, kind: str, title: str, claim: str) -> None:
    """Figures 5 and 8."""
    seen, parts = [], []
    for of in subjects(args, ("resnet20",)):
        kept = convergence(of, args.steps)
        rows, steps = kept[kind]["rows"], kept[kind]["steps"]
        images = {n: 100 * spread(v, min(512, len(v))) for n, v in rows.items()}
        vectors = {n: 100 * spread(v, 50) for n, v in steps.items()}
        seen.append(
            f"{TITLES[of.name]}: over {min(512, of.images)} images the standard error of the choice of images is "
            f"{min(images.values()):.1f}% to {max(images.values()):.1f}% of the trace, over 50 random vectors (of "
            f"{of.few} images) that of the vectors is {min(vectors.values()):.1f}% to {max(vectors.values()):.1f}%, "
            f"at {len(rows)} {kind}s from the largest average trace to the smallest."
        )
        held = hl.Sensitivity((), rows=rows, row_unit=dict.fromkeys(rows, "image"))
        parts += [
            save(draw_images(held, list(rows)), f"figure{number}_{of.name}_images"),
            save(draw_steps(steps, kind=kind), f"figure{number}_{of.name}_steps"),
        ]
    page(number, title, claim, seen, parts, args.line)


def figure5(args: argparse.Namespace) -> None:
    """Convergence of weights' traces."""
    converging(
        args, 5, "weight", "convergence of the traces of weights",
        "the trace converges rapidly as the number of data points grows over 512, and 50 Hutchinson steps are "
        "sufficient for an accurate approximation with low variance (block 21 of ResNet50).",
    )  # fmt: skip


def figure8(args: argparse.Namespace) -> None:
    """Convergence of activations' traces."""
    converging(
        args, 8, "activation", "convergence of the traces of activations",
        "the trace of activations usually converges very fast; not all of the data need be averaged over.",
    )  # fmt: skip


FIGURES = {f.__name__: f for f in (figure2, figure4, figure5, figure6, figure7, figure8)}


def main() -> None:
    """Make one figure's page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=list(FIGURES))
    parser.add_argument("--data", type=Path, default=Path("cifar10"), help="folder with train/ and val/")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NETWORK=FILE")
    parser.add_argument("--detector", type=Path, help="float checkpoint of recipes/bccd_retinanet")
    parser.add_argument("--bccd", type=Path, help="folder in COCO's layout")
    parser.add_argument("--images", type=int, default=256, help="of CIFAR-10")
    parser.add_argument("--detector-images", type=int, default=4, help="of BCCD")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--points", type=int, default=11, help="of a landscape, each way")
    parser.add_argument("--steps", type=int, default=60, help="random vectors")
    parser.add_argument("--budget", default="8x", help="of HAWQ's and Direct's plans")
    args = parser.parse_args()
    given = [f"{n}={n}.pt" for n in (w.split("=")[0] for w in args.weights)]
    changed = [f"--{n.replace('_', '-')} {getattr(args, n)}" for n in KNOBS
               if getattr(args, n) != parser.get_default(n)]  # fmt: skip
    words = [args.figure, *(["--data cifar10 --weights", *given] if given else []), *changed]
    words += ["--detector last.ckpt --bccd bccd"] if args.detector else []
    args.line = " ".join(words)
    torch.set_num_threads(1)
    FIGURES[args.figure](args)
    print((PAGES / f"{args.figure}.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
