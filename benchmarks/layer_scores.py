"""Layer scores of MCT and ModelOpt on the network and images of traces.py: sensitivities that are not Hessian traces.

    pip install model-compression-toolkit nvidia-modelopt huggingface_hub

(ModelOpt 0.47 imports huggingface_hub without asking for it.) traces.py calls these, each in a process of its own.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

MCT_IMAGES = 32  # of MCT's pruning, which ranks channels by these scores
MCT_DRAWS = 4  # a run here; its default of 100 is timed on fewer images
MCT_TIMED = 1

HEADING = f"""These are other quantities than the trace, so there is no z; `rank` is Spearman's correlation, over
layers, with the exact traces of the weights.

MCT (Hessian information service, mode weights, one score a layer): of one image at a time, the squared gradient of the
logits' sum under random signs, that is the squared Jacobian of the logits; neither the loss nor the label is in it. Its
recipe is {MCT_IMAGES} images of the batch with 100 draws each, all layers in one request; {MCT_TIMED} of them is timed.
Seconds to 5% of its own score, of all the images with a draw of each at the least, come from runs of {MCT_DRAWS} draws.

ModelOpt (`auto_quantize`, method gradient, int8 weights): the gradient of the mean loss at a layer's output times the
output's change under the format, squared and summed, so it contains the perturbation of the weights; `rank (trace x
dW)` compares it with exact mean trace times squared perturbation. One pass over the batch, calibration and search
included; nothing in it is random, so it has no seconds to 5%.
"""


def mct(net: nn.Module, x: torch.Tensor, y: torch.Tensor, names: list[str], seconds: float) -> dict[str, Any]:
    """MCT's scores of the weights: the recipe's time, the scores and their relative deviation between runs.

    Args:
        net: the trained network in evaluation mode.
        x: images, ``(n, c, h, w)``; the first ones are used.
        y: labels, which the score does not use.
        names: the layers.
        seconds: of runs, at the least three.
    """
    from model_compression_toolkit import get_target_platform_capabilities
    from model_compression_toolkit.core import common
    from model_compression_toolkit.core.common.hessian import (
        HessianInfoService,
        HessianMode,
        HessianScoresGranularity,
        HessianScoresRequest,
    )
    from model_compression_toolkit.core.common.quantization.quantization_config import DEFAULTCONFIG
    from model_compression_toolkit.core.common.quantization.set_node_quantization_config import (
        set_quantization_configuration_to_graph,
    )
    from model_compression_toolkit.core.graph_prep_runner import read_model_to_graph
    from model_compression_toolkit.core.pytorch.default_framework_info import DEFAULT_PYTORCH_INFO
    from model_compression_toolkit.core.pytorch.pytorch_implementation import PytorchImplementation
    from model_compression_toolkit.target_platform_capabilities.targetplatform2framework.attach2pytorch import (
        AttachTpcToPytorch,
    )
    from model_compression_toolkit.target_platform_capabilities.tpc_io_handler import load_target_platform_capabilities

    def feed(images: torch.Tensor) -> Callable[[], Iterator[list[torch.Tensor]]]:
        return lambda: iter([[image[None]] for image in images])

    began = time.perf_counter()
    service = PytorchImplementation()
    capabilities = load_target_platform_capabilities(get_target_platform_capabilities())
    graph: common.Graph = set_quantization_configuration_to_graph(
        read_model_to_graph(
            net, feed(x[:1]), AttachTpcToPytorch().attach(capabilities), DEFAULT_PYTORCH_INFO, service
        ),
        DEFAULTCONFIG, mixed_precision_enable=False,
    )  # fmt: skip
    nodes = {node.name.lstrip("_"): node for node in graph.nodes}
    layers = [nodes[name.replace(".", "_")] for name in names]
    setup = time.perf_counter() - began

    def run(images: torch.Tensor, seed: int, draws: int | None) -> tuple[float, torch.Tensor]:
        """Seconds and the scores, ``(images, layers)``."""
        torch.manual_seed(seed)
        start = time.perf_counter()
        info = HessianInfoService(
            graph, service, **({} if draws is None else {"num_iterations_for_approximation": draws})
        )
        found = info.fetch_hessian(HessianScoresRequest(
            mode=HessianMode.WEIGHTS, granularity=HessianScoresGranularity.PER_TENSOR, target_nodes=layers,
            data_loader=service.convert_data_gen_to_dataloader(feed(images), batch_size=1), n_samples=len(images),
        ))  # fmt: skip
        columns = [torch.as_tensor(found[layer.name]).reshape(-1) for layer in layers]
        return time.perf_counter() - start, torch.stack(columns, dim=1).double()

    images = x[:MCT_IMAGES]
    recipe = run(images[:MCT_TIMED], 0, None)[0] * len(images) / MCT_TIMED
    runs: list[tuple[float, torch.Tensor]] = []
    began = time.perf_counter()
    while len(runs) < 3 or time.perf_counter() - began < seconds:
        runs.append(run(images, 1 + len(runs), MCT_DRAWS))
    values = torch.stack([v for _, v in runs])
    score = values.mean((0, 1))
    # draws are independent between images: their variances, each estimated over the runs, add up
    deviation = values.var(0).sum(0).sqrt() / len(images)
    return {
        "seconds": setup + recipe, "how": f"extrapolated from {MCT_TIMED} of {len(images)} images", "setup": setup,
        "probe_seconds": sorted(t for t, _ in runs)[len(runs) // 2], "probes": len(runs), "score": score.tolist(),
        "deviation": (deviation / score).tolist(), "least": len(x) / len(images) / MCT_DRAWS,
    }  # fmt: skip


def modelopt(net: nn.Module, x: torch.Tensor, y: torch.Tensor, names: list[str], seconds: float) -> dict[str, Any]:
    """ModelOpt's gradient scores of int8 weights, and why its default formats could not be scored where they could not.

    Args:
        net: the trained network in evaluation mode.
        x: images, ``(n, c, h, w)``.
        y: their classes.
        names: the layers.
        seconds: unused, there being nothing random.
    """
    import modelopt.torch.quantization as mtq

    skipped = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and n not in names]

    def run(formats: list[str], images: int, bits: float) -> tuple[float, Any]:
        model = copy.deepcopy(net)
        began = time.perf_counter()
        _, state = mtq.auto_quantize(
            model, constraints={"effective_bits": bits}, quantization_formats=[getattr(mtq, f) for f in formats],
            data_loader=[(x[:images], y[:images])], forward_step=lambda m, b: m(b[0]),
            loss_func=lambda out, b: F.cross_entropy(out, b[1]), disabled_layers=skipped, num_calib_steps=1,
            num_score_steps=1,
        )  # fmt: skip
        return time.perf_counter() - began, state

    missing = None
    run(["INT8_WEIGHT_ONLY_CFG"], 2, 8.5)  # builds what it builds at first use
    try:
        run(["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"], 2, 4.8)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        missing = f"{type(error).__name__}: {error}".splitlines()[0][:150]
    elapsed, state = run(["INT8_WEIGHT_ONLY_CFG"], len(x), 8.5)
    stats = state["candidate_stats"]
    int8 = dict(mtq.quantize(copy.deepcopy(net), mtq.INT8_WEIGHT_ONLY_CFG).named_modules())
    with torch.no_grad():
        moved = [int8[n].weight - int8[n].weight_quantizer(int8[n].weight) for n in names]
    return {
        "seconds": elapsed, "how": "measured", "probes": 1, "missing": missing,
        "score": [float(stats[f"{n}.quant_recipe"]["scores"][0]) for n in names],
        "perturbation": [float(d.double().square().mean()) for d in moved],
    }  # fmt: skip


SCORES = {"mct": mct, "modelopt": modelopt}


def summary(result: dict[str, Any], exact: list[float], target: float) -> dict[str, Any]:
    """Rank correlation with the exact traces and, where draws are random, the seconds to the target of the own score.

    Args:
        result: what a function above returned.
        exact: exact traces, in the order of the layers.
        target: relative standard error.
    """
    from scipy.stats import spearmanr

    out: dict[str, Any] = {"rank": float(spearmanr(result["score"], exact)[0])}
    if "perturbation" in result:
        omega = [t * p for t, p in zip(exact, result["perturbation"])]
        out["rank_omega"] = float(spearmanr(result["score"], omega)[0])
    if "deviation" in result:
        spread = result["deviation"]
        for key, s in (("median", statistics.median(spread)), ("worst", max(spread))):
            out[key] = max((s / target) ** 2, result["least"]) * result["probe_seconds"]
    return out


def rows(methods: dict[str, Any], titles: dict[str, str]) -> list[str]:
    """The table's lines, none where no score was asked for."""
    found = {m: r for m, r in methods.items() if m in SCORES}
    if not found:
        return []
    lines = [
        "", "Layer scores of other packages:", "",
        "| score | own recipe, s | how | x ours | 5% of own score: median layer, s | worst layer, s | memory, MiB "
        "| rank | rank (trace x dW) |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    notes = []
    for method, r in found.items():
        if "error" in r:
            lines.append(f"| {titles[method]} | - | cannot run here: {r['error']} | - | - | - | - | - | - |")
            continue
        cells = [f"{r[k]:.3g}" if k in r else "-" for k in ("median", "worst")]
        ranks = [f"{r[k]:.2f}" if k in r else "-" for k in ("rank", "rank_omega")]
        lines.append(
            f"| {titles[method]} | {r['seconds']:.3g} | {r['how']} | {r['recipe_ratio']:.3g} | {cells[0]} | {cells[1]} "
            f"| {r['memory_mib']:.0f} | {ranks[0]} | {ranks[1]} |"
        )
        if r.get("missing"):
            notes.append(f"ModelOpt's default formats, NVFP4 and FP8, cannot be scored here: {r['missing']}")
    return [*lines, "", *notes]
