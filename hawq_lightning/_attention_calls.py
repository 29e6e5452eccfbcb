"""Which products of attention real forward passes make, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import Node
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from hawq_lightning._loss_graph import nodes_of
from hawq_lightning._patterns import Patterns, as_list, matches, named_modules, plain_modules
from hawq_lightning._reads import Key, Read, version_of
from hawq_lightning._site_table import ActivationProduct, SiteTable
from hawq_lightning.layers import (
    OperandReader,
    ResultReader,
    holder_of,
    is_result,
    on_product,
    operand_name,
    operand_readers,
)

_NAMES = {"query": "scores", "key": "scores", "probabilities": "values", "value": "values"}


@dataclass(frozen=True)
class _Product:
    module: str
    operands: tuple[str, str]
    read: tuple[tuple[torch.Tensor, int], ...]  # kept, so that their ids stay their own while the pass runs
    nodes: list[Node]
    with_gradients: bool
    macs: int


@dataclass
class AttentionCalls:
    """What passes over one or several batches tell of attention.

    Attributes:
        modules: name -> module that may make attention.
        readers: operand's name -> reader, of those that may be sites.
    """

    modules: Mapping[str, Module] = field(default_factory=dict)
    readers: Mapping[str, OperandReader] = field(default_factory=dict)
    _macs: dict[tuple[str, str], int] = field(default_factory=dict)  # module and product -> of one image
    _operands: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    _reads: dict[str, list[Read]] = field(default_factory=dict)  # by module
    _now: list[_Product] = field(default_factory=list)

    def watch(self) -> list[RemovableHandle]:
        """Look at the pass that comes; what is returned ends that, each by ``remove()``."""
        self._now = []
        handles: list[RemovableHandle] = []
        for name, module in self.modules.items():
            given: dict[str, torch.Tensor] = {}
            for operand in _NAMES:
                reader = OperandReader(operand_name(name, operand), module, operand)
                handles.append(reader.on_read(_note(given, operand)))
            handles.append(on_product(module, self._made(name, given)))
        return handles

    def _made(
        self, module: str, given: dict[str, torch.Tensor]
    ) -> Callable[[tuple[str, str], torch.Tensor, int], None]:
        def made(operands: tuple[str, str], product: torch.Tensor, macs: int) -> None:
            read = tuple((given[n], version_of(given[n])) for n in operands)
            nodes = nodes_of(product)
            self._now.append(_Product(module, operands, read, nodes, torch.is_grad_enabled(), macs))

        return made

    def pass_ended(self, graph: set[Node], number: int, images: int) -> None:
        """Add what belongs to the network: the products on the way to the loss, or all where no graph tells.

        Args:
            graph: behind the loss.
            number: of the pass.
            images: of the pass.
        """
        products, self._now = self._now, []
        products = [p for p in products if not graph or (p.with_gradients and not graph.isdisjoint(p.nodes))]
        seen = {*self._reads}
        for p in products:
            if p.module in seen:
                continue  # one pass tells
            key = p.module, _NAMES[p.operands[0]]
            self._operands.setdefault(key, p.operands)
            self._macs[key] = self._macs.get(key, 0) + p.macs // images
            for operand, (x, version) in zip(p.operands, p.read):
                tensor: Key = (number, id(x), version)
                read = Read(operand_name(p.module, operand), tensor, tuple(x.shape), images)
                self._reads.setdefault(p.module, []).append(read)

    def reads(self, modules: Collection[str]) -> list[Read]:
        """What may be sites, of some modules."""
        return [r for m, reads in self._reads.items() if m in modules for r in reads if r.layer in self.readers]

    @property
    def found(self) -> set[str]:
        """Modules that made products."""
        return {*self._reads}

    def products(self, sites: Mapping[str, str]) -> tuple[ActivationProduct, ...]:
        """The products that read sites.

        Args:
            sites: operand's name -> site.
        """
        out = []
        for (module, name), operands in self._operands.items():
            left, right = (sites.get(operand_name(module, operand)) for operand in operands)
            if left or right:
                product = ActivationProduct(operand_name(module, name), left, right, self._macs[module, name])
                out.append(product)
        return tuple(out)


def _note(given: dict[str, torch.Tensor], operand: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def note(x: torch.Tensor) -> torch.Tensor:
        given[operand] = x
        return x

    return note


def attention_operands(
    model: Module, include: Patterns = None, exclude: Patterns = None, prepared: bool = False
) -> dict[str, OperandReader]:
    """What attention may read through quantizers, by name: modules whose forward has its products.

    Args:
        model: any module.
        include: patterns, on the operand's name (``<module>:query``) or its module's, or the module.
        exclude: the same forms; wins over ``include``.
        prepared: only of modules that have quantizers for it.
    """
    include, exclude = as_list(include, "include"), as_list(exclude, "exclude")
    operands: dict[str, OperandReader] = {}
    for name, module in named_modules(model):
        if prepared and holder_of(module) is None:
            continue
        for operand in operand_readers(name, module):
            either = [any(matches(p, n, module) for p in exclude) for n in (operand.name, name)]
            chosen = [any(matches(p, n, module) for p in include) for n in (operand.name, name)]
            if (any(chosen) or not include) and not any(either):
                operands[operand.name] = operand
    return operands


def operands_of(model: Module, table: SiteTable) -> dict[str, OperandReader]:
    """Those of the attention operands that are sites of a table, and the results of functions that are."""
    reads = table.reads
    results: dict[str, OperandReader] = {**results_named(model, reads)}
    if not table.products:
        return results
    return {n: x for n, x in attention_operands(model).items() if n in reads} | results


def results_named(model: Module, names: Iterable[str]) -> dict[str, ResultReader]:
    """Name -> reader, of those of some names that stand for results of modules that the model has.

    Args:
        model: any module.
        names: what stands where layers have their names.
    """
    wanted = [n for n in names if is_result(n)]
    modules = plain_modules(model) if wanted else {}
    split = {n: n.rpartition(":") for n in wanted}
    return {n: ResultReader(n, modules[m], label, model) for n, (m, _, label) in split.items() if m in modules}
