"""Bits of weights that another tool's mixed-precision search chooses; run by the Python of that tool's environment.

    python benchmarks/peer_plans.py mct --network resnet20 --weights resnet20_cifar10.pt --data cifar10 --bits 3

Every tool scores on the same training images, activations float or at 8 bits as it wants them, and may give a weight
the widths that it has of 2, 3, 4, 6 and 8. Written to ``--out``/NETWORK_TOOL.json: bits by site, seconds, CPU seconds,
the tool's version, and what it was asked; or the sentence of the error that it ended with. For benchmarks/peers.py.

    pip install model-compression-toolkit    # mct: interest points' distances, integer programme
    pip install nvidia-modelopt huggingface_hub scipy    # modelopt: auto_quantize, gradient scores, linear programme
    pip install aimet-onnx    # aimet: choose_mixed_precision (AMP), replayed until the size is met
    pip install nncf openvino    # nncf: compress_weights, its Hessian criterion, 4 bits or 8
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from hawq_lightning import models, sites
from hawq_lightning.data import ImageFolderDataModule

WIDTHS = (2, 3, 4, 6, 8)
Found = dict[str, Any]


def mct(net: nn.Module, x: torch.Tensor, y: torch.Tensor, size: float, numel: dict[str, int]) -> Found:
    """Sony's toolkit: its IMX500 description with our widths beside it, a budget of weights' memory."""
    import model_compression_toolkit as toolkit
    from model_compression_toolkit.target_platform_capabilities.constants import KERNEL_ATTR, WEIGHTS_N_BITS
    from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc

    base, _, default = tpc.get_op_quantization_configs()
    offered = [base.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: b}}) for b in reversed(WIDTHS)]
    capabilities = tpc.generate_tpc(default, offered[0], offered, "imx500 with more widths")
    config = toolkit.core.CoreConfig(
        mixed_precision_config=toolkit.core.MixedPrecisionQuantizationConfig(num_of_images=min(32, len(x)))
    )
    quantized, _ = toolkit.ptq.pytorch_post_training_quantization(
        net, lambda: iter([[b] for b in x.split(32)]), toolkit.core.ResourceUtilization(weights_memory=size), config,
        capabilities,
    )  # fmt: skip
    bits = {}
    for name, module in quantized.named_modules():
        for attribute, quantizer in getattr(module, "weights_quantizers", {}).items():
            if attribute == "weight":
                bits[name] = int(quantizer.num_bits)
    return {"bits": _by_name(bits, numel), "asked": f"weights_memory={size:.0f}, widths {WIDTHS}, 32 images"}


def modelopt(net: nn.Module, x: torch.Tensor, y: torch.Tensor, size: float, numel: dict[str, int]) -> Found:
    """NVIDIA's ``auto_quantize`` over integer weights of our widths, one scale a channel."""
    import modelopt.torch.quantization as mtq

    def config(bits: int) -> dict[str, Any]:
        return {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}, "enable": True},
            ],
            "algorithm": "max",
        }  # fmt: skip

    mean = 8 * size / sum(numel.values())
    mtq.auto_quantize(
        net, constraints={"effective_bits": mean}, quantization_formats=[config(b) for b in WIDTHS],
        data_loader=list(zip(x.split(32), y.split(32))), forward_step=lambda m, b: m(b[0]),
        loss_func=lambda out, b: F.cross_entropy(out, b[1]), num_calib_steps=1, num_score_steps=len(x) // 32,
    )  # fmt: skip
    bits = {}
    for name in numel:
        quantizer = net.get_submodule(name.removesuffix(".weight")).weight_quantizer
        bits[name] = int(quantizer.num_bits) if quantizer.is_enabled else 16
    return {"bits": bits, "asked": f"effective_bits={mean:.3g}, integer formats of {WIDTHS} bits"}


def nncf(net: nn.Module, x: torch.Tensor, y: torch.Tensor, size: float, numel: dict[str, int]) -> Found:
    """OpenVINO's weight compression: 4 bits for the share of weights that its criterion calls robust, else 8."""
    import nncf as framework

    mean = 8 * size / sum(numel.values())
    ratio = min(1.0, max(0.0, (8 - max(mean, 5.0)) / 4))
    compressed = framework.compress_weights(
        net, mode=framework.CompressWeightsMode.INT4_SYM, ratio=ratio, group_size=-1, all_layers=True,
        dataset=framework.Dataset([x[i : i + 1] for i in range(len(x))]),
        sensitivity_metric=framework.SensitivityMetric.HESSIAN_INPUT_ACTIVATION, subset_size=len(x),
    )  # fmt: skip
    hooks = {n: type(m).__name__ for n, m in compressed.named_modules() if "Decompressor" in type(m).__name__}
    bits = {}
    for name in numel:
        kind = next((k for n, k in hooks.items() if f".{name.replace('.', ':')}__" in n), "")
        bits[name] = 4 if kind.startswith("INT4") else 8 if kind.startswith("INT8") else 32
    if set(bits.values()) == {8}:
        raise RuntimeError(
            f"compress_weights({ratio=:.2f}) leaves all {len(bits)} weights at 8 bits: it takes 4 bits for matrix "
            "products alone, and here the layer of one is the last, which it keeps"
        )
    return {"bits": bits, "asked": f"INT4_SYM, ratio={ratio:.2f}, group_size=-1, hessian_input_activation"}


def aimet(net: nn.Module, x: torch.Tensor, y: torch.Tensor, size: float, numel: dict[str, int]) -> Found:
    """Qualcomm's AMP on ONNX: the greedy list from most bits down, replayed until the weights are small enough."""
    import onnx
    from aimet_common.defs import QuantizationDataType
    from aimet_common.utils import CallbackFunc
    from aimet_onnx.mixed_precision import AMPSearchAlgo, choose_mixed_precision
    from aimet_onnx.quantsim import QuantizationSimModel

    from hawq_lightning.export.onnx import float_onnx

    kind = QuantizationDataType.int
    with torch.no_grad():
        target = F.softmax(net(x), 1)

    def run(session: Any, _: Any = None) -> torch.Tensor:
        name = session.get_inputs()[0].name
        return torch.cat([torch.from_numpy(session.run(None, {name: b.numpy()})[0]) for b in x.split(32)])

    def score(session: Any, _: Any = None) -> float:
        return -float(F.kl_div(F.log_softmax(run(session), 1), target, reduction="batchmean"))

    with tempfile.TemporaryDirectory() as folder:
        float_onnx(net, x[:2], Path(folder) / "float.onnx")
        simulator = QuantizationSimModel(onnx.load(str(Path(folder) / "float.onnx")), default_param_bw=8)
        simulator.compute_encodings(run)
        listed = choose_mixed_precision(
            simulator, [((8, kind), (b, kind)) for b in reversed(WIDTHS)], CallbackFunc(score),
            CallbackFunc(score), None, folder, True,
            CallbackFunc(run), use_all_amp_candidates=True,
            amp_search_algo=AMPSearchAlgo.BruteForce,
        )  # fmt: skip
    bits = dict.fromkeys(numel, 8)
    for _, _, group, candidate in listed:
        if sum(numel[n] * b for n, b in bits.items()) / 8 <= size:
            break
        for weight in group.parameter_quantizers:
            bits[weight] = int(candidate[1][0])
    return {"bits": bits, "asked": f"AMP with 8-bit activations, weights of {WIDTHS} bits, replayed to the size"}


def _by_name(found: dict[str, int], numel: dict[str, int]) -> dict[str, int]:
    """A tool's names of modules, with underscores for dots and folded layers' names behind, to sites."""
    plain = {k.replace(".", "_"): v for k, v in found.items()}
    out = {}
    for name in numel:
        layer = name.removesuffix(".weight").replace(".", "_")
        fitting = [k for k in plain if k == layer or k.startswith(f"{layer}_bn") or k.startswith(f"{layer}_norm")]
        if len(fitting) != 1:
            raise KeyError(f"{name} among {sorted(plain)}")
        out[name] = plain[fitting[0]]
    return out


TOOLS: dict[str, tuple[Callable[..., Found], str]] = {
    "mct": (mct, "model-compression-toolkit"), "modelopt": (modelopt, "nvidia-modelopt"),
    "aimet": (aimet, "aimet-onnx"), "nncf": (nncf, "nncf"),
}  # fmt: skip


def main() -> None:
    """Ask one tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=sorted(TOOLS))
    parser.add_argument("--network", choices=("resnet20", "mobilenet_cifar"), default="resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--bits", type=float, default=3.0, help="mean bits of a weight")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "peer_plans")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = ImageFolderDataModule(args.data, num_classes=10, augment="none", memory=False)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: args.images].tolist()
    x, y = next(iter(DataLoader(Subset(dataset, order), args.images)))
    net = getattr(models, args.network)(weights=args.weights).eval()
    numel = {s.name: s.numel for s in sites(net, x[:2]).weights}
    function, package = TOOLS[args.tool]
    record: dict[str, Any] = {
        "tool": args.tool,
        "version": version(package),
        "mean_bits": args.bits,
        "images": args.images,
    }
    began, used = time.perf_counter(), time.process_time()
    try:
        record |= function(copy.deepcopy(net), x, y, args.bits * sum(numel.values()) / 8, numel)
        record["mean_of_plan"] = sum(numel[n] * b for n, b in record["bits"].items()) / sum(numel.values())
    except Exception as error:
        traceback.print_exc()
        record["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    record |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.network}_{args.tool}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(file.read_text("utf-8"))


if __name__ == "__main__":
    main()
