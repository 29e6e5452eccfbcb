"""Does the exported file compute what was trained? onnxruntime against the fake-quant model on real images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hawq_lightning._batches import default_forward, image_tensors, pieces
from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.export.onnx._proto import has_data
from hawq_lightning.export.onnx._session import integer_kernels, open_session, session
from hawq_lightning.layers import WeightReader, kinds
from hawq_lightning.quantization import QuantizedWeight, quantizable_layers, quantized_layers


@dataclass(frozen=True)
class Disagreement:
    """An image with another top-1 class: the margin between the model's first two, and how far the logits moved."""

    image: int
    margin: float
    difference: float


@dataclass(frozen=True)
class Agreement:
    """Outputs of a file against those of the fake-quant model.

    Attributes:
        images: compared.
        same: images with the same top-1 class.
        difference: the greatest absolute difference of an output.
        disagreements: the other images; ``difference`` there is the greatest change of the gap between two logits.
        flipped: layer input -> activation codes that differ.
        codes: layer input -> activation codes compared.
        classes: whether the output is class logits; otherwise ``same`` says nothing.
        outputs: output -> greatest and mean absolute difference.
        runtime: that ran the file.
    """

    images: int
    same: int
    difference: float
    disagreements: tuple[Disagreement, ...]
    flipped: Mapping[str, int]
    codes: Mapping[str, int]
    classes: bool = True
    outputs: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    runtime: str = "onnxruntime"

    @property
    def share(self) -> float:
        """Share of images with the same top-1 class."""
        return self.same / max(1, self.images)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        flipped, codes = sum(self.flipped.values()), sum(self.codes.values())
        return {
            "images": self.images,
            "same_top1": self.same if self.classes else None,
            "largest_difference": self.difference,
            "outputs": {
                k: {"largest_difference": most, "mean_difference": mean} for k, (most, mean) in self.outputs.items()
            },
            "disagreements": [vars(d) for d in self.disagreements],
            "flipped_codes": flipped,
            "codes": codes,
            "flipped_by_layer_input": {k: v for k, v in self.flipped.items() if v},
        }

    def __str__(self) -> str:
        flipped, codes = sum(self.flipped.values()), sum(self.codes.values())
        images = f"{self.runtime} on {self.images} images"
        if self.classes:
            images = f"{self.runtime} agrees on {self.same} of {self.images} images ({self.share:.2%})"
        moved = f"outputs differ by at most {self.difference:.2g}"
        if len(self.outputs) > 1:
            each = (f"{k} by {mean:.2g} on average, {most:.2g} at most" for k, (most, mean) in self.outputs.items())
            moved = f"outputs differ: {', '.join(each)}"
        counted = f", {flipped:,} of {codes:,} activation codes flipped" if self.codes else ""
        return f"{images}, {moved}{counted}"


@torch.no_grad()
def compare(
    model: nn.Module,
    path: str | Path,
    batches: Iterable[Any],
    *,
    images: int | None = None,
    codes: bool = True,
    runtime: str = "onnxruntime",
) -> Agreement:
    """Run the file with onnxruntime or OpenVINO (CPU) and the quantized model on the same images.

    Optimizations are onnxruntime's default ones; an exact file runs without integer kernels (see :func:`session`).

    Args:
        model: the fake-quant model that was exported; class logits, or raw outputs whose last axis holds the classes.
        path: written by :func:`to_onnx`.
        batches: tensors, or batches with the images first.
        images: stop after so many.
        codes: also count the activation codes that differ; of onnxruntime, and files below 2 GiB, only.
        runtime: ``"onnxruntime"`` or ``"openvino"``.

    Raises:
        HawqError: no batches, images of another size than the file's, a file of another network, the extra is missing,
            or onnxruntime cannot run the file.
    """
    integers = integer_kernels(path)
    whole = open_session(runtime, path, integers=integers)
    codes = codes and runtime == "onnxruntime" and not has_data(Path(path))
    layers = quantized_layers(model)
    inside, reads, stored = _with_codes(path, quantizable_layers(model)[0], integers) if codes else (None, {}, set())
    alike = _alike(layers, stored) if codes else {}
    flipped: dict[str, int] = defaultdict(int)
    counted: dict[str, int] = defaultdict(int)
    different, count, classes = [], 0, True
    names, size = [o.name for o in whole.get_outputs()], whole.get_inputs()[0].shape[0]
    most, total, values = np.zeros(len(names)), np.zeros(len(names)), np.zeros(len(names))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    mode = model.training
    model.eval()
    try:
        for x in pieces(image_tensors(batches, images), size):
            x = x.to(device)
            feed = _feed(whole, x)
            with _Seen(layers, alike) as seen:
                expected = _leaves(default_forward(model, x))
            actual = whole.run(None, feed)
            if [e.shape for e in expected] != [a.shape for a in actual]:
                raise HawqError(f"{path} is another network's file: its outputs have other shapes than the model's.")
            for i, (e, a) in enumerate(zip(expected, actual)):
                apart = np.abs(e - a)
                most[i] = max(most[i], apart.max(initial=0.0))
                total[i] += apart.sum(dtype=np.float64)
                values[i] += apart.size
            classes = len(expected) == 1 and expected[0].ndim == 2
            different += _differences(expected[0], actual[0], count) if classes else []
            if inside is not None:
                for tensor, codes_of_file in zip(reads, inside.run(list(reads), feed)):
                    name, call = reads[tensor]
                    made = seen.codes[name]
                    if call >= len(made) or made[call].shape != codes_of_file.shape:
                        raise HawqError(
                            f"The model quantizes the input of {name!r} otherwise than {path} or not at all."
                        )
                    flipped[f"{name}.input"] += int((made[call] != codes_of_file.astype(np.int32)).sum())
                    counted[f"{name}.input"] += codes_of_file.size
            count += len(x)
    finally:
        model.train(mode)
    if not count:
        raise HawqError(f"There are no images to compare on{_at_once(size)}.")
    same = count - len({d.image for d in different})
    apart = {n: (float(m), float(t / max(1, v))) for n, m, t, v in zip(names, most, total, values)}
    return Agreement(
        count, same, float(most.max()), tuple(different), dict(flipped), dict(counted), classes, apart, runtime
    )


def _at_once(size: int | str) -> str:
    return "" if isinstance(size, str) or size == 1 else f"; the file takes {size} at a time"


def _feed(run: Any, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Images under the name of a session's input."""
    takes = run.get_inputs()[0]
    if len(takes.shape) != x.ndim or any(isinstance(k, int) and k != n for k, n in zip(takes.shape, x.shape)):
        expected = ", ".join("N" if isinstance(k, str) else str(k) for k in takes.shape)
        raise HawqError(f"The file takes images [{expected}], not {list(x.shape)}.")
    return {takes.name: x.cpu().numpy()}


def _with_codes(
    path: str | Path, layers: Mapping[str, WeightReader], integers: bool
) -> tuple[Any, dict[str, tuple[str, int]], set[str]]:
    """A session that also returns activation codes; output -> (layer, which of its calls); layers of stored weights."""
    layer_of = {f"{x.prefix}{x.quantizer_attribute}.codes": name for name, x in layers.items()}
    onnx = require("onnx")
    proto = onnx.load(str(path))
    made = {out: node for node in proto.graph.node for out in node.output}
    products = {op for kind in kinds() for op in kind.onnx_ops}
    calls: dict[str, int] = defaultdict(int)
    reads: dict[str, tuple[str, int]] = {}
    for node in proto.graph.node:
        if node.op_type not in products:
            continue
        weight = made.get(node.input[1])
        while weight is not None and weight.op_type != "DequantizeLinear":
            weight = made.get(weight.input[0])
        grid = made.get(node.input[0])
        while grid is not None and grid.op_type in ("Transpose", "Reshape", "Pad", "Concat", "Slice"):
            grid = made.get(grid.input[0])
        if weight is None or _is_activation(weight, made):
            continue
        codes_of = weight.input[0].split("//")[0]  # what follows tells codes apart that an integer file had to change
        name = layer_of.get(codes_of, codes_of)
        call, calls[name] = calls[name], calls[name] + 1
        if grid is not None and grid.op_type == "DequantizeLinear":
            reads.setdefault(grid.input[0], (name, call))
    del proto.graph.output[:]
    for tensor in reads:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.UINT8, None))
    return session(proto.SerializeToString(), integers=integers) if reads else None, reads, set(calls)


def _is_activation(dequantize: Any, made: Mapping[str, Any]) -> bool:
    """Whether codes come from a tensor's grid, as those that attention multiplies with."""
    source = made.get(dequantize.input[0])
    return source is not None and source.op_type in ("QuantizeLinear", "Clip")


class _Seen:
    """Collects the activation codes of every call of every layer while the model runs."""

    def __init__(self, layers: Mapping[str, QuantizedWeight], alike: Mapping[str, str]) -> None:
        self.layers, self.alike = layers, alike
        self.codes: dict[str, list[np.ndarray]] = defaultdict(list)
        self._handles: list[Any] = []

    def __enter__(self) -> _Seen:
        for name, layer in self.layers.items():
            if layer.input_quantizer.bits:
                self._handles.append(
                    layer.input_quantizer.register_forward_hook(self._hook(self.alike.get(name, name)))
                )
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(quantizer: Any, args: Any, output: torch.Tensor) -> None:
            codes = torch.round(output / quantizer.scale) + quantizer.zero_point
            self.codes[name].append(codes.to(torch.int32).cpu().numpy())

        return hook


def _alike(layers: Mapping[str, QuantizedWeight], stored: set[str]) -> dict[str, str]:
    """Layer that the file does not name -> one with the same codes that it does: small equal tensors are held once."""
    merged = {n: x for n, x in layers.items() if x.weight_quantizer.bits and n not in stored}
    if not merged:
        return {}
    first: dict[tuple[Any, ...], str] = {}
    for name in sorted(stored & set(layers)):
        first.setdefault(_codes_of(layers[name]), name)
    return {name: first.get(_codes_of(layer), name) for name, layer in merged.items()}


def _codes_of(layer: QuantizedWeight) -> tuple[Any, ...]:
    codes = layer.weight_quantizer.codes(layer.weight).cpu().numpy()
    return codes.shape, codes.tobytes()


def _leaves(result: Any) -> list[np.ndarray]:
    return [t.detach().float().cpu().numpy() for t in torch.utils._pytree.tree_leaves(result)]


def _differences(expected: np.ndarray, actual: np.ndarray, start: int) -> list[Disagreement]:
    out = []
    for i in np.flatnonzero(expected.argmax(1) != actual.argmax(1)):
        second, first = np.sort(expected[i])[-2:]
        moved = actual[i].astype(np.float64) - expected[i]
        out.append(Disagreement(start + int(i), float(first - second), float(moved.max() - moved.min())))
    return out
