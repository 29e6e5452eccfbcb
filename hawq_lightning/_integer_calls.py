"""Which results of a network integer kernels keep as codes, told by a real forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from hawq_lightning._integer_form import IntegerForm, Kind, Operation, Value
from hawq_lightning._patterns import named_modules
from hawq_lightning._reads import version_of
from hawq_lightning._types import Options
from hawq_lightning.layers import OUTPUT, Following, ReadTensor, WeightReader, operand_name

_Key = tuple[int, int]  # id and version of a tensor, which is kept meanwhile
_SUMS = ("add", "mul", "cat")
_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
          "adaptive_avg_pool3d", "sigmoid", "leaky_relu")  # fmt: skip
_CLAMPS = ("relu", "relu6", "hardtanh", "clamp", "clip")
_MOVES = (
    "max_pool1d", "max_pool2d", "max_pool3d", "flatten", "unflatten", "reshape", "view", "view_as", "permute",
    "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze", "expand", "expand_as",
    "contiguous", "clone", "detach", "dropout", "dropout2d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "get", "select", "narrow",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A result by its name, or an operand of a function, that a quantizer may read.

    Attributes:
        name: as of :class:`hawq_lightning.layers.ResultReader`.
        module: whose forward makes it.
        label: its name there.
    """

    name: str
    module: nn.Module
    label: str


@dataclass
class Place:
    """Results that lie on one grid, since one quantizer reads them, or since they are one value.

    Attributes:
        results: by name.
        layers: that read the values, in order.
        shape: of the first value.
        numel: elements of one image, all values together.
    """

    results: dict[str, Result] = field(default_factory=dict)
    layers: dict[str, None] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    numel: int = 0


@dataclass(frozen=True)
class _About:
    """What is known of an operation beside its tensors."""

    result: Result
    layer: str = ""
    norm: str = ""


@dataclass
class IntegerCalls:
    """What passes tell of results that integer kernels keep as codes.

    Attributes:
        model: that runs.
        layers: those that may be sites.
        places: found so far.
        rounded: layers whose results are codes, so that their biases are INT32.
    """

    model: nn.Module
    layers: Mapping[str, WeightReader]
    places: list[Place] = field(default_factory=list)
    rounded: dict[str, None] = field(default_factory=dict)
    _operations: list[Operation] = field(default_factory=list)
    _outputs: list[torch.Tensor] = field(default_factory=list)
    _kept: dict[_Key, torch.Tensor] = field(default_factory=dict)
    _constants: set[_Key] = field(default_factory=set)
    _names: dict[int, str] = field(default_factory=dict)

    def watch(self) -> list[RemovableHandle]:
        """Look at the pass that comes; what is returned ends that by ``remove()``."""
        self._operations, self._outputs, self._kept, self._constants = [], [], {}, set()
        self._names = {id(m): n for n, m in named_modules(self.model)}
        self._readers = {id(r.module): n for n, r in self.layers.items()}
        self._stored = {id(t) for t in (*self.model.parameters(), *self.model.buffers())}
        return [Following(self.model, self)]  # type: ignore[list-item]

    def function(
        self, module: nn.Module, label: str, name: str, read: Sequence[ReadTensor], given: Any, options: Options
    ) -> Any:
        """See :class:`hawq_lightning.layers.Listener`."""
        made = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
        if not made or (name == "get" and not made[0].is_floating_point()):
            return given
        if any(given is r.tensor and version_of(r.tensor) != r.version for r in read):
            given = given.view_as(given)  # changed in place: whether what the function returned is used, its id tells
            made = [given]
        result = self._result(module, label)
        self._note(_kind(name, read, given, options), read, made, (), _About(result))
        return given

    def layer(self, module: nn.Module, read: Sequence[object], output: object) -> None:
        """See :class:`hawq_lightning.layers.Listener`."""
        if not isinstance(output, torch.Tensor):
            return
        x = next((t for t in read if isinstance(t, torch.Tensor)), None)
        name = self._readers.get(id(module), "")
        reads = [] if x is None else [ReadTensor(x, version_of(x))]
        about = _About(self._result(module, OUTPUT), name, "" if name else self._names.get(id(module), ""))
        kind = Kind.OTHER
        if name and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            kind = Kind.CONVOLUTION
        elif name and isinstance(module, nn.Linear) and x is not None and x.ndim == 2:
            kind = Kind.MATRIX
        by_grid = (0,) if name and self.layers[name].read.reads_activation else ()
        self._note(kind, reads, [output], by_grid, about)

    def given(self, output: object) -> None:
        """See :class:`hawq_lightning.layers.Listener`."""
        self._outputs += [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]

    def pass_ended(self, network: Mapping[str, object], norms: Mapping[str, str], images: int) -> None:
        """Decide, of what was seen.

        Args:
            network: layers that belong to it.
            norms: layer -> BatchNorm behind it that it takes in.
            images: of the pass.
        """
        operations, outputs = self._folded(network, norms), [self._key(t) for t in self._outputs]
        made = {m for o in operations for m in o.makes}
        inputs = dict.fromkeys(r for o in operations for r in o.reads if r is not None and r not in made)
        form = IntegerForm(operations, [*inputs], [o for o in outputs if o in made or o in inputs])
        self._decide(form, images)
        for operation in operations:
            about = operation.about
            assert isinstance(about, _About)
            value = form.of(operation.makes[0])
            coded = operation.kind is Kind.MATRIX and value is not None and _is_kept(form, value)
            if about.layer and (operation.kind is Kind.CONVOLUTION or coded):
                self.rounded[about.layer] = None
        self._operations, self._outputs, self._kept = [], [], {}

    def _result(self, module: nn.Module, label: str) -> Result:
        return Result(operand_name(self._names.get(id(module), ""), label), module, label)

    def _key(self, x: torch.Tensor, version: int | None = None) -> _Key:
        key = id(x), version_of(x) if version is None else version
        self._kept.setdefault(key, x)
        return key

    def _note(
        self,
        kind: Kind,
        read: Sequence[ReadTensor],
        made: Sequence[torch.Tensor],
        by_grid: Sequence[int],
        about: _About,
    ) -> None:
        reads = [self._key(r.tensor, r.version) for r in read]
        constant = [id(r.tensor) in self._stored or k in self._constants for r, k in zip(read, reads)]
        makes = [self._key(t) for t in made]
        if all(constant) and not about.layer:
            self._constants |= {*makes}
            return
        floats = tuple(None if c or not r.tensor.is_floating_point() else k for c, r, k in zip(constant, read, reads))
        if kind is Kind.MOVE and (not floats or floats[0] is None or len(makes) > 1 or makes[0] == floats[0]):
            kind = Kind.OTHER
        makes = [m for m in makes if m not in floats]
        if makes:
            self._operations.append(Operation(kind, floats, tuple(makes), by_grid, about))

    def _folded(self, network: Mapping[str, object], norms: Mapping[str, str]) -> list[Operation]:
        """The operations, with each BatchNorm that a layer takes in as a part of it."""
        out: list[Operation] = []
        at: dict[object, int] = {}
        for operation in self._operations:
            about = operation.about
            assert isinstance(about, _About)
            if about.layer and about.layer not in network:
                operation = Operation(Kind.OTHER, operation.reads, operation.makes, (), about)
            source = at.get(operation.reads[0]) if operation.reads else None
            before = None if source is None else out[source]
            if about.norm and before is not None and isinstance(before.about, _About) and (
                before.about.layer and norms.get(before.about.layer) == about.norm
            ):  # fmt: skip
                joined = _About(about.result, before.about.layer, about.norm)
                out[source] = Operation(before.kind, before.reads, operation.makes, before.by_grid, joined)  # type: ignore[index]
                at[operation.makes[0]] = source  # type: ignore[assignment]
                continue
            at |= dict.fromkeys(operation.makes, len(out))
            out.append(operation)
        return out

    def _decide(self, form: IntegerForm, images: int) -> None:
        wanted = {n: r for v in form.values for n, r in _results(form, v, only_needed=True).items()}
        for value in form.values:
            here = _results(form, value, only_needed=False)
            if here := {n: r for n, r in here.items() if n in wanted}:
                self._add(form, value, here, images)

    def _add(self, form: IntegerForm, value: Value, results: Mapping[str, Result], images: int) -> None:
        tensor = self._kept[value.root]  # type: ignore[index]
        place = Place({}, {}, tuple(tensor.shape[1:]), 0)
        for other in [p for p in self.places if not results.keys().isdisjoint(p.results)]:
            self.places.remove(other)
            place = Place({**other.results, **place.results}, {**other.layers, **place.layers}, other.shape,
                          other.numel + place.numel)  # fmt: skip
        place.results |= results
        place.layers |= dict.fromkeys(
            o.about.layer for o, s in value.reads if isinstance(o.about, _About) and s in o.by_grid
        )
        place.numel += max(1, tensor.numel() // images)
        self.places.append(place)


def _is_kept(form: IntegerForm, value: Value) -> bool:
    """Whether a value lies on a grid, its own or that behind the clamp that alone reads it."""
    if len(value.reads) == 1 and value.reads[0][0].kind is Kind.CLAMP and not value.coded:
        behind = form.of(value.reads[0][0].makes[0])
        return behind is not None and behind.coded
    return value.coded


def _results(form: IntegerForm, value: Value, only_needed: bool) -> dict[str, Result]:
    """Where quantizers make a value lie on its grid; nothing where layers read it by one grid already."""
    reads = [(o, s) for o, s in value.reads if o.kind is not Kind.SHAPE]
    joins = [(o, s) for o, s in reads if o in form.joins]
    by_layers = {o.reads[s] for o, s in reads if s in o.by_grid}
    needed = value.shown or len(by_layers) > 1 or any(s not in o.by_grid for o, s in reads)
    made = form.maker(value)
    if value.coded and made is not None and len(made.makes) == 1 and isinstance(made.about, _About):
        return {made.about.result.name: made.about.result} if needed or not only_needed else {}
    found = {}
    for operation, slot in joins:
        assert isinstance(operation.about, _About)
        result = operation.about.result
        found[f"{result.name}[{slot}]"] = Result(f"{result.name}[{slot}]", result.module, f"{result.label}[{slot}]")
    return found


def _kind(name: str, read: Sequence[ReadTensor], given: object, options: Options) -> Kind:
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        return Kind.OTHER
    args, kwargs = options["args"], options["kwargs"]
    if name in ("add", "mul"):
        return Kind.JOIN if len(read) == 2 and len(args) <= 2 and not {*kwargs} - {"other", "input"} else Kind.OTHER
    if name == "cat" or name in _POOLS:
        return Kind.JOIN if _divides(name, read, given) else Kind.OTHER
    if name == "mean":
        return Kind.JOIN if _over_positions(read[0].tensor, given, args, kwargs) else Kind.OTHER
    if name in _CLAMPS:
        return Kind.CLAMP if len(read) == 1 else Kind.OTHER
    if name == "pad":
        mode, fill = kwargs.get("mode", args[2] if len(args) > 2 else "constant"), kwargs.get("value", args[3:] or None)
        return Kind.MOVE if mode == "constant" and fill in (None, 0, 0.0, (0,), (0.0,), (None,)) else Kind.OTHER
    if name == "getitem":
        return Kind.MOVE if len(read) == 1 and not isinstance(args[1], list) else Kind.OTHER
    return Kind.MOVE if name in _MOVES else Kind.OTHER


def _divides(name: str, read: Sequence[ReadTensor], given: torch.Tensor) -> bool:
    """Whether an adaptive pooling is one with windows of one size, as the file's operator has them."""
    if not name.startswith("adaptive"):
        return True
    x, axes = read[0].tensor, int(name[-2])
    return all(a % b == 0 for a, b in zip(x.shape[-axes:], given.shape[-axes:]))


def _over_positions(x: torch.Tensor, given: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a mean is over all axes behind the channels."""
    axes = kwargs.get("dim", args[1] if len(args) > 1 else None)
    axes = [axes] if isinstance(axes, int) else axes
    if axes is None or x.ndim < 3:
        return False
    return sorted(int(a) % x.ndim for a in axes) == list(range(2, x.ndim))
