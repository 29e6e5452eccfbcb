"""Exporters: the file formats that a quantized network can be written in, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._plan import Plan
from hawq_lightning._registry import Registry
from hawq_lightning._types import Batch, JsonObject
from hawq_lightning.export._deployed import Inputs
from hawq_lightning.export._enabled import quantized_reads_by_name, quantizers_of
from hawq_lightning.export._files import check_writable
from hawq_lightning.quantization import QuantizedWeight, plan_of

EVEN_STEPS = ("affine", "midrise")


class Verification(Protocol):
    """How well a file agrees with the network; printed, and kept in ``export.json``."""

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""
        ...


Write = Callable[..., object]
"""``write(model, plan, path, example_input, **options)``: writes a quantized network to a file, atomically."""

Verify = Callable[[nn.Module, Path, Iterable[Batch], int | None], Verification]
Written = TypeVar("Written", bound=Write)


@dataclass(frozen=True)
class Exporter:
    """A file format.

    Attributes:
        name: as registered.
        suffix: of its files, such as ``".onnx"``; a run folder holds ``model<suffix>``.
        write: ``write(model, plan, path, example_input, **options)``; it may return what its caller could want to know.
        packages: that must be importable.
        code_formats: those of weights that the format can express; ``None``: any.
        even_steps: whether activations have to lie on an even grid as well.
        needs_example: whether ``write`` follows a forward pass and needs an example input.
        verify: ``verify(model, path, batches, images) -> Verification``: runs the file on images; ``None``: none.
        verify_packages: that ``verify`` needs besides.
        beside: suffixes of files that are written beside the first: ``.encodings`` for ``model.encodings``.
    """

    name: str
    suffix: str
    write: Write
    packages: tuple[str, ...] = ()
    code_formats: tuple[str, ...] | None = EVEN_STEPS
    even_steps: bool = True
    needs_example: bool = True
    verify: Verify | None = None
    verify_packages: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def files(self, stem: str) -> tuple[str, ...]:
        """Names of all files that it writes for ``stem``, such as ``model``; the first is the one to read."""
        first = f"{stem}{self.suffix}"
        return first, *(str(Path(first).with_suffix(suffix)) for suffix in self.beside)

    def check(self, model: nn.Module, *, verify: bool = False) -> None:
        """Refuse, before anything is written, what the format lacks.

        Args:
            model: to be written.
            verify: whether the file will be run as well.

        Raises:
            HawqError: a package is missing, the model is float, or a layer has levels that the format cannot express.
        """
        for package in (*self.packages, *(self.verify_packages if verify else ())):
            require(package)
        layers = quantized_reads_by_name(model)
        if not any(q.bits for x in layers.values() for q in quantizers_of(x)):
            raise HawqError("The model has no enabled quantizer; call quantize(model, plan) before the export.")
        for name, layer in layers.items():
            reads, formats = layer.input_quantizer, self.code_formats
            weight = layer.weight_quantizer if isinstance(layer, QuantizedWeight) else None
            if weight is not None and weight.bits and formats is not None and weight.code not in formats:
                raise HawqError(
                    f"Layer {name!r} has codes of format {weight.code!r}, which {self.name!r} cannot express; it has "
                    f"{', '.join(formats)}."
                )
            if reads.bits and self.even_steps and not reads.even_steps:
                raise HawqError(
                    f"Layer {name!r} reads an activation whose levels are not evenly spaced, which {self.name!r} "
                    "cannot express; choose a quantizer with even steps, such as lsq."
                )


EXPORTERS: Registry[Exporter] = Registry("exporter")


def register_exporter(
    name: str,
    *,
    suffix: str,
    packages: Iterable[str] = (),
    code_formats: Iterable[str] | None = EVEN_STEPS,
    even_steps: bool = True,
    needs_example: bool = True,
    verify: Verify | None = None,
    verify_packages: Iterable[str] = (),
    beside: Iterable[str] = (),
) -> Callable[[Written], Written]:
    """Function decorator: make a writer of files known by name.

    Args:
        name: lower-case letters, digits and underscores.
        suffix: of its files, such as ``".onnx"``; a run folder holds ``model<suffix>``.
        packages: that must be importable.
        code_formats: those of weights that the format can express; ``None``: any.
        even_steps: whether activations have to lie on an even grid as well.
        needs_example: whether the writer follows a forward pass and needs an example input.
        verify: ``verify(model, path, batches, images)`` runs the file on so many images and says how well it agrees.
        verify_packages: that ``verify`` needs besides.
        beside: suffixes of files that the writer puts beside the first: ``.encodings`` for ``model.encodings``.

    Raises:
        HawqError: a malformed name or suffix, or another exporter has one of them.
    """
    if not suffix.startswith(".") or len(suffix) < 2 or set(suffix) & set("/\\\0"):
        raise HawqError(f"The suffix of exporter {name!r} is {suffix!r}; it starts with a dot, such as '.onnx'.")
    if taken := [e for e in map(EXPORTERS.__getitem__, EXPORTERS) if e.suffix == suffix and e.name != name]:
        raise HawqError(f"The suffix {suffix!r} of exporter {name!r} is that of {taken[0].name!r} already.")

    def add(write: Written) -> Written:
        formats = None if code_formats is None else tuple(code_formats)
        entry = Exporter(
            name, suffix, write, tuple(packages), formats, even_steps, needs_example, verify,
            tuple(verify_packages), tuple(beside),
        )  # fmt: skip
        EXPORTERS.add(name, entry)
        return write

    return add


def export(
    model: nn.Module,
    plan: Plan | None,
    path: str | Path,
    format: str = "onnx",
    *,
    example_input: Inputs | None = None,
    **options: object,
) -> object:
    """Write a quantized network to a file of a registered format; the model stays as it is.

    Args:
        model: with fake-quant layers, enabled.
        plan: the plan that it carries; ``None`` reads it from the quantizers.
        path: of the file; missing folders are made, an old file is replaced atomically.
        format: registered name: ``packed``, ``onnx``, ``program``, ``qonnx``, ``aimet``, or a user's own.
        example_input: float images ``[N, ...]``, or a tuple of the model's positional inputs, where the format follows
            a forward pass.
        options: of the exporter, such as ``fold``.

    Returns:
        what the exporter's writer returns: for ``onnx`` and ``program`` see :func:`to_onnx` and :func:`to_program`, for
        ``packed`` the file's size in bytes.

    Raises:
        HawqError: no such format, a missing package, something that the format cannot express, no example input, or a
            path that cannot be written.
    """
    exporter = EXPORTERS[format]
    exporter.check(model)
    if exporter.needs_example and not isinstance(example_input, (torch.Tensor, tuple)):
        raise HawqError(f"Exporter {format!r} follows a forward pass: pass example_input, two images for instance.")
    check_writable(Path(path))
    return exporter.write(model, plan_of(model) if plan is None else plan, Path(path), example_input, **options)
