"""What a kind of layer is to the method, and the table of all kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hawq_lightning._errors import HawqError
from hawq_lightning._registry import Registry
from hawq_lightning.layers._adopted import changes, is_parametrized, qualified_names
from hawq_lightning.layers._directions import Directions, KeptDirections
from hawq_lightning.layers._fake_quant import FakeQuantLayer, layer_type
from hawq_lightning.layers._gradients import Pairs, row_dots
from hawq_lightning.layers._projections import ProjectedProducts, projected_pairs
from hawq_lightning.layers._replaced import replaced

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Record = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class WeightRead:
    """How a layer reads one of its parameters.

    Attributes:
        channel_axis: axis of the parameter that gets one scale an index: the output channels.
        reads_activation: whether what it is multiplied with is an activation, which gets a quantizer too.
    """

    channel_axis: int = 0
    reads_activation: bool = True


@dataclass
class LayerCall:
    """One call of a layer.

    Attributes:
        layer: the module.
        read: the tensor that it read.
        grad: gradient at its output, of one backward pass.
        other: the same of a second backward pass, of ``grad``'s shape; ``None``: there was none.
        parameter: the weight that it used.
    """

    layer: nn.Module
    read: torch.Tensor
    grad: torch.Tensor
    other: torch.Tensor | None = None
    parameter: str = "weight"


class LayerKind:
    """A kind of layer: all that the method knows of it. Subclasses say what is different from a linear layer.

    Attributes:
        float_type: the layer's class; subclasses that compute something else are not of this kind.
        float_name: module and name of a library's class, in the place of ``float_type``: nothing is imported for it.
        by_contents: :meth:`holds` tells the kind, of modules whose class is of none; there is no ``float_type``.
        fake_quant_type: the class that a layer takes on when it is quantized; where there is only a ``float_name``, it
            does not inherit from the layer's class, which comes after it.
        input_name: keyword of the tensor that ``forward`` reads.
        channel_axis: output channels of the weight.
        onnx_op: the ONNX operator of its product, whose third input is the bias; ``None``: not known.
        onnx_ops: every operator that an exporter may make of it.
        foldable: whether a BatchNorm after it can go into its weights and bias.
        known_by_tensor: whether its products are recognised by the tensor that a function gets: one must be there.
        reconstructs: whether :meth:`patches` is there, which AdaRound needs.
    """

    float_type: ClassVar[type[nn.Module]]
    float_name: ClassVar[str | None] = None
    by_contents: ClassVar[bool] = False
    fake_quant_type: ClassVar[type[FakeQuantLayer[Any, Any]]]
    input_name: ClassVar[str] = "input"
    channel_axis: ClassVar[int] = 0
    onnx_op: ClassVar[str | None] = None
    onnx_ops: ClassVar[tuple[str, ...]] = ()
    foldable: ClassVar[bool] = False
    known_by_tensor: ClassVar[bool] = False
    reconstructs: ClassVar[bool] = False

    def weights(self, module: nn.Module) -> Mapping[str, WeightRead]:
        """Name of each parameter that is a weight (dotted where a child holds it) -> how it is read.

        Parameters that are not named stay float, as biases do.
        """
        return {"weight": WeightRead(self.channel_axis)}

    def why_float(self, module: nn.Module) -> str | None:
        """Why this module stays float although it is of the kind, in a few words; ``None``: it need not."""
        return None

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is of this kind by what it holds, where :attr:`by_contents`."""
        return False

    def input(self, args: Args, kwargs: Kwargs) -> torch.Tensor:
        """The tensor that a call reads, positional or by keyword."""
        return args[0] if args else kwargs[self.input_name]  # type: ignore[no-any-return]

    def with_input(self, args: Args, kwargs: Kwargs, x: torch.Tensor) -> tuple[Args, Kwargs]:
        """The same call, reading ``x``."""
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, self.input_name: x})

    def on_read(
        self, module: nn.Module, parameter: str, visit: Callable[[torch.Tensor], torch.Tensor]
    ) -> RemovableHandle:
        """Before each call show the tensor that ``parameter`` will be multiplied with; what ``visit`` returns is read.

        Kinds that read elsewhere than in the call of the module itself override this and :meth:`on_call`.
        """

        def hook(_: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
            return self.with_input(args, kwargs, visit(self.input(args, kwargs)))

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def on_call(self, module: nn.Module, parameter: str, record: Record) -> RemovableHandle:
        """After each call show what was read and the product with ``parameter``.

        A tensor that ``record`` returns takes the product's place.
        """

        def hook(_: nn.Module, args: Args, kwargs: Kwargs, output: torch.Tensor) -> torch.Tensor | None:
            return record(self.input(args, kwargs), output)

        # first of all hooks: the user's may change the product, or keep it for the loss
        return module.register_forward_hook(hook, with_kwargs=True, prepend=True)

    def macs(self, module: nn.Module, parameter: str, x: torch.Tensor, output: torch.Tensor) -> int:
        """Multiply-accumulates of one call: each output element is a sum over a row of the weight."""
        return output.numel() * weight_of(module, parameter)[0].numel()

    def weight_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Pairs:
        """Gradients of one weight from ``grad`` and from ``other``, summed over ``calls``, some rows at a time.

        Args:
            calls: of layers of this kind that share the weight.
            per_sample: a row is a sample, an index of the first axis; otherwise all of the batch is one row.

        Yields:
            two tensors ``[rows, *weight.shape]``; the same one twice where no call has ``other``.
        """
        raise NotImplementedError

    def inner_products(self, calls: Sequence[LayerCall], per_sample: bool) -> torch.Tensor:
        """``<G_n, G'_n>`` of every row; see :func:`inner_products`. Override it where there is a way without G."""
        return torch.cat([row_dots(g, h) for g, h in self.weight_gradients(calls, per_sample)])

    def projected_products(
        self, calls: Sequence[LayerCall], per_sample: bool, directions: Directions
    ) -> ProjectedProducts:
        """The same, and ``<G_n, D>`` of ``directions`` ``[directions, *weight.shape]``. Override it with the other."""
        return projected_pairs(self.weight_gradients(calls, per_sample), directions)

    def product(self, module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the layer would give with another weight, and without a bias; of kinds that are :attr:`foldable`."""
        raise NotImplementedError

    def output_axes(self, module: nn.Module) -> int:
        """Number of axes of the output when axis 1 holds its channels, so that a BatchNorm can be folded."""
        return 2

    def channels_from_end(self, module: nn.Module) -> int:
        """The output's channel axis, counted from the end: there may be no batch axis."""
        return -1

    def why_not_folded(self, module: nn.Module) -> str | None:
        """Why a BatchNorm behind this layer has to stay; ``None``: it need not."""
        of_weight = self.foldable and len(self.weights(module)) == 1
        return None if of_weight else "it is no factor of the layer's weights"

    def onnx_attributes(self, module: nn.Module) -> dict[str, object]:
        """Attributes of the ONNX node, as far as time depends on them."""
        return {}

    def onnx_channels(self, shape: Sequence[int], groups: int) -> int:
        """Output channels of a node with a weight of this ``shape``."""
        return shape[0]

    def onnx_input_shape(self, shape: Sequence[int]) -> list[int]:
        """Shape of the node's input for one sample, whose input to the layer has this ``shape``."""
        return [1, *shape]

    def groups(self, module: nn.Module) -> int:
        """Into how many independent products the layer falls."""
        return 1

    def patches(self, module: nn.Module, x: torch.Tensor, most: int) -> torch.Tensor:
        """What each output position multiplies with the weight.

        Args:
            module: the layer.
            x: its input.
            most: positions to lay out, about; of every so many samples where there are more.

        Returns:
            ``[groups, positions, weights of one output channel]``.
        """
        raise NotImplementedError


Kind = TypeVar("Kind", bound=type[LayerKind])
LAYER_KINDS: Registry[LayerKind] = Registry("layer kind")
_BY_TYPE: dict[type[nn.Module], LayerKind] = {}
_NAMES: dict[type[nn.Module], str] = {}
_BY_CONTENTS: list[LayerKind] = []
_LATE: dict[str, tuple[str, LayerKind]] = {}  # by the name of a class that may never be imported


def register_layer(name: str) -> Callable[[Kind], Kind]:
    """Class decorator: layers of this kind are sites from now on.

    Args:
        name: lower-case letters, digits and underscores.

    Raises:
        HawqError: another kind has the name or the layer type, or the class lacks what every kind has.
    """

    def add(kind: Kind) -> Kind:
        late = kind.float_name is not None
        for attribute in ("fake_quant_type",) if late or kind.by_contents else ("float_type", "fake_quant_type"):
            if not hasattr(kind, attribute):
                raise HawqError(f"The layer kind {name!r} has no {attribute}; it is a class of modules.")
        if kind.by_contents:
            _BY_CONTENTS.append(LAYER_KINDS.add(name, kind()))
            return kind
        if late:
            _LATE[str(kind.float_name)] = name, LAYER_KINDS.add(name, kind())
            return kind
        present = _NAMES.get(kind.float_type, name)
        if present != name:
            raise HawqError(f"{kind.float_type.__name__} is of the layer kind {present!r} already.")
        _BY_TYPE[kind.float_type], _NAMES[kind.float_type] = LAYER_KINDS.add(name, kind()), name
        return kind

    return add


def find_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a layer, float or fake-quant; ``None`` for modules that are no layers, or have to stay float."""
    if isinstance(module, torch.jit.ScriptModule):
        return None  # its weights cannot be read through a quantizer
    kind = _kind_of_type(layer_type(module))
    quantized = isinstance(module, FakeQuantLayer)
    if kind is not None:
        other = not isinstance(module, kind.fake_quant_type) if quantized else replaced(module, kind.float_type)
        kind = None if other else kind
    if kind is None:
        return next((k for k in _BY_CONTENTS if isinstance(module, k.fake_quant_type) or k.holds(module)), None)
    if quantized:
        return kind
    if is_parametrized(type(module)) and set(kind.weights(module)) != {"weight"}:
        return None
    return kind if kind.why_float(module) is None else None


def _kind_of_type(module_type: type[nn.Module]) -> LayerKind | None:
    if (kind := _BY_TYPE.get(module_type)) is not None:
        return kind
    for t, name in qualified_names(module_type):
        if name in _LATE and t not in _BY_TYPE:
            _NAMES[t], _BY_TYPE[t] = _LATE[name]
            type(_BY_TYPE[t]).float_type = t
        if (kind := _BY_TYPE.get(t)) is not None:
            return None if changes(module_type, t) else kind
    return None


def kind_of(module: nn.Module) -> LayerKind:
    """The kind of a layer, float or fake-quant.

    Raises:
        HawqError: the module is of no registered kind.
    """
    kind = find_kind(module)
    if kind is None:
        raise HawqError(f"{layer_type(module).__name__} is no layer kind; there are {', '.join(type_names())}.")
    return kind


def type_names() -> list[str]:
    """Class names of the layers of every kind."""
    return [t.__name__ for t in _BY_TYPE]


def kinds() -> Iterator[LayerKind]:
    """Every kind, in the order of registration."""
    return iter(_BY_TYPE.values())


def weight_of(module: nn.Module, parameter: str = "weight") -> torch.Tensor:
    """A parameter by its dotted name, also where a hook has put a plain tensor in its place.

    Of a parametrization it is what an evaluation computes: spectral norm would iterate at every look at it in training.
    """
    *path, name = parameter.split(".")
    holder: Any = reduce(getattr, path, module)
    with _evaluated(holder._modules.get("parametrizations")):
        return getattr(holder, name)  # type: ignore[no-any-return]


@contextmanager
def _evaluated(module: nn.Module | None) -> Iterator[None]:
    training = [] if module is None else [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def channel_axis_of(type_name: str) -> int:
    """The channel axis of weights of a layer type, by its class name, as plans hold it; 0 where no kind has it."""
    return next((kind.channel_axis for t, kind in _BY_TYPE.items() if t.__name__ == type_name), 0)


def inner_products(calls: Sequence[LayerCall], per_sample: bool) -> torch.Tensor:
    """``<G_n, G'_n>`` of every row n, G the weight gradient from ``grad`` and G' from ``other`` (or ``grad`` again).

    Args:
        calls: all calls that share one weight; their gradients are added before the product.
        per_sample: a row is an index of the first axis; otherwise all of the batch is one row.

    Returns:
        float64, one value a row.
    """
    of_kind = _by_kind(calls)
    if not of_kind:
        return _no_rows(calls, per_sample)
    if len(of_kind) == 1:
        kind, some = next(iter(of_kind.items()))
        return kind.inner_products(some, per_sample)
    return row_dots(*_summed(of_kind, per_sample))


def projected_products(
    calls: Sequence[LayerCall], per_sample: bool, directions: Directions | torch.Tensor
) -> ProjectedProducts:
    """What :func:`inner_products` gives, and ``<G_n, D_w>`` of every row and direction.

    Args:
        calls: all calls that share one weight; their gradients are added before the products.
        per_sample: a row is an index of the first axis; otherwise all of the batch is one row.
        directions: ``[directions, *weight.shape]``.
    """
    if isinstance(directions, torch.Tensor):
        directions = KeptDirections(directions)
    of_kind = _by_kind(calls)
    if not of_kind:
        inner = _no_rows(calls, per_sample)
        nothing = inner.new_zeros(len(inner), len(directions))
        return ProjectedProducts(inner, nothing, nothing)
    if len(of_kind) == 1:
        kind, some = next(iter(of_kind.items()))
        return kind.projected_products(some, per_sample, directions)
    return projected_pairs(iter([_summed(of_kind, per_sample)]), directions)


def _by_kind(calls: Sequence[LayerCall]) -> dict[LayerKind, list[LayerCall]]:
    """The calls of each kind, but for those of no samples: a head for objects may get none."""
    of_kind: dict[LayerKind, list[LayerCall]] = {}
    for call in calls:
        if call.grad.numel():
            of_kind.setdefault(kind_of(call.layer), []).append(call)
    return of_kind


def _no_rows(calls: Sequence[LayerCall], per_sample: bool) -> torch.Tensor:
    return calls[0].grad.new_zeros(len(calls[0].grad) if per_sample else 1, dtype=torch.float64)


def _summed(of_kind: Mapping[LayerKind, Sequence[LayerCall]], per_sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of kinds that share a weight, as an embedding and the projection tied to it do: only whole ones add."""
    sums: list[torch.Tensor] | None = None
    for kind, some in of_kind.items():
        gradients = [torch.cat(sides) for sides in zip(*kind.weight_gradients(some, per_sample))]
        sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients)]
    assert sums is not None
    return sums[0], sums[1]
