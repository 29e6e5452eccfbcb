"""One forward pass that remembers, and backward passes that give every site's squared gradient in one sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from hawq_lightning._batches import plain_tensor
from hawq_lightning._loss_graph import edge_of, graph_behind
from hawq_lightning._site_table import SiteTable
from hawq_lightning.layers import OperandReader, WeightReader, as_reader
from hawq_lightning.sensitivity._graph_start import start_of_graph
from hawq_lightning.sensitivity._input_hooks import InputHooks
from hawq_lightning.sensitivity._rounding import RoundingErrors
from hawq_lightning.sensitivity._site_products import CallRecord, Overwritten, read_products, weight_products
from hawq_lightning.sensitivity._views import without_base

Result = TypeVar("Result")


def with_copies(overwritten: set[str], run: Callable[[], Result]) -> Result:
    """The result of ``run``, again for every layer that turns out to read what is overwritten later.

    Args:
        overwritten: gets the layer.
        run: probes with hooks that keep copies for these layers.
    """
    while True:
        try:
            return run()
        except Overwritten as layer:
            overwritten.add(str(layer))


_GONE = torch.empty(0)


class GradCapture:
    """Hooks on the layers of ``table``; active inside ``with``.

    Args:
        layers: layer name -> reader of a weight, or the module if it reads a single one.
        table: their sites.
        keep_copies: layers whose input is overwritten later, and activation sites that are to be differentiated twice.
        operands: of attention, that are sites of ``table``.
        rounding: errors whose products with the gradients are gathered in :attr:`forms`.

    Attributes:
        forms: site -> (rows, candidates), summed over passes until :meth:`take_forms`.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module | WeightReader],
        table: SiteTable,
        keep_copies: set[str],
        operands: Mapping[str, OperandReader] | None = None,
        rounding: RoundingErrors | None = None,
    ) -> None:
        self._layers = {name: as_reader(layer) for name, layer in layers.items()}
        self._table, self._keep = table, keep_copies
        self._reads_of = table.reads
        self._weight_of = {x.name: x.weight for x in table.layers}
        self._calls: dict[str, list[CallRecord]] = {}
        self._reads: dict[str, list[CallRecord]] = {}
        self._slot, self._last, self._coefficient = 0, 0, 1.0
        self._waiting: dict[str, int] = {}
        self._rows: dict[str, torch.Tensor] = {}
        self._rounding = rounding or RoundingErrors({})
        self.forms: dict[str, torch.Tensor] = {}
        self.recording = True
        self.last_pass = False  # what layers read is let go of as soon as it has served
        self.per_sample: Mapping[str, bool] = {}
        self.leaks: dict[str, bool] | None = None
        self.samples = 1
        self.outside = torch.zeros(0, dtype=torch.bool)  # samples that nothing may reach, while leaks are looked for
        self._handles: list[Any] = []
        self._reader = InputHooks({**layers, **(operands or {})}, self._reads_of, self._alias)

    def __enter__(self) -> GradCapture:
        self._reader.__enter__()
        for name, layer in self._layers.items():
            self._handles.append(layer.on_call(self._called(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        # tensors and their hooks refer to each other: without this the graph lives until the collector comes by
        self._calls.clear()
        self._reads.clear()

    def aliases(self) -> dict[str, list[torch.Tensor]]:
        """Activation site -> the tensors that its layers read, in the graph."""
        return {site: [c.value for c in calls] for site, calls in self._reads.items()}

    def check_reads(self) -> None:
        """Make sure that what layers read is still there, and in the graph under its name.

        Raises:
            Overwritten: a tensor was changed in place after it was read; it names the activation site.
        """
        for site, calls in self._reads.items():
            if any(c.value._version != c.version for c in calls):
                raise Overwritten(site)

    def keep_reached(self, loss: torch.Tensor) -> None:
        """Forget reads that the loss's gradient does not come by: of teachers, targets and pseudo-labels."""
        nodes = graph_behind(loss)
        for site, calls in [*self._reads.items()]:
            calls[:] = [c for c in calls if c.node in nodes]
            if not calls:
                del self._reads[site]

    def output_nodes(self) -> dict[str, list[Any]]:
        """Weight site -> the autograd nodes of its layers' outputs, a call each."""
        return {site: [c.node for c in calls if c.node is not None] for site, calls in self._calls.items()}

    def sizes(self, site: str, samples: int) -> torch.Tensor:
        """Elements of one image's activation, a row each."""
        calls = self._reads[site]
        rows = samples if self.per_sample[site] else 1
        return torch.full((rows,), sum(c.value.numel() for c in calls) / samples, dtype=torch.float64)

    def squares(self, backward: Callable[[], None], coefficient: float, rows: dict[str, torch.Tensor]) -> None:
        """Add ``coefficient`` times every row's squared gradient norm to ``rows`` in one backward pass."""
        self._begin(0, 0, coefficient, rows)
        backward()
        self._finish()

    def products(self, first: Callable[[], None], second: Callable[[], None], rows: dict[str, torch.Tensor]) -> None:
        """Add every row's inner product of the gradients of two backward passes to ``rows``."""
        self._begin(0, 1, 1.0, rows)
        first()
        self._slot = 1
        self._count()
        second()
        self._finish()

    def _begin(self, slot: int, last: int, coefficient: float, rows: dict[str, torch.Tensor]) -> None:
        self.recording = False
        self._slot, self._last, self._coefficient, self._rows = slot, last, coefficient, rows
        self._count()

    def _count(self) -> None:
        self._waiting = {s: len(c) for s, c in (self._calls | self._reads).items()}

    def _alias(self, site: str, x: torch.Tensor) -> torch.Tensor:
        if not self.recording or not torch.is_grad_enabled():
            return x  # activation checkpointing runs the forward pass again; a target network has no gradients
        source = x.clone() if site in self._keep else x
        alias = source.view_as(source) if x.requires_grad else source.detach().requires_grad_(True)
        call = CallRecord(site, site, None, alias, alias._version, node=edge_of(alias).node)
        self._reads.setdefault(site, []).append(call)
        self._handles.append(alias.register_hook(self._arrived(call)))
        return alias

    def _called(self, name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]:
        def record(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
            if not torch.is_grad_enabled():
                return None
            if not self.recording:  # what a checkpoint runs again must build the graph that it built before
                return None if output.requires_grad else start_of_graph(output)
            read, product = plain_tensor(x.detach()), without_base(output)
            if not output.requires_grad:  # a look-up by indices, or a first state of zeros: they have no gradient
                product = start_of_graph(output)
            if name in self._keep:
                read = read.clone()
            call = CallRecord(
                self._weight_of[name], name, self._layers[name], read, read._version, node=product.grad_fn
            )
            self._calls.setdefault(call.site, []).append(call)
            self._handles.append(product.register_hook(self._arrived(call)))
            return None if product is output else product

        return record

    def _arrived(self, call: CallRecord) -> Callable[[torch.Tensor], None]:
        def hook(grad: torch.Tensor) -> None:
            if not self.recording:  # else it is the user's own gradient, not a probe
                with torch._C.DisableTorchFunction():  # whoever watches the loss has no say here, and takes time
                    self._take(call, grad)

        return hook

    def _take(self, call: CallRecord, grad: torch.Tensor) -> None:
        if self.leaks is not None:
            self._note_leak(call, grad)
            return
        if call.site not in self._waiting:
            return
        call.grads[self._slot] = grad
        self._waiting[call.site] -= 1
        if self._slot == self._last and self._waiting[call.site] == 0:
            self._reduce(call.site)

    def _note_leak(self, call: CallRecord, grad: torch.Tensor) -> None:
        assert self.leaks is not None
        apart = grad.ndim > 1 and grad.shape[0] == self.samples == call.value.shape[0]
        apart = apart and not bool(grad[self.outside.to(grad.device)].any())
        self.leaks[call.site] = self.leaks.get(call.site, False) or not apart

    def _finish(self) -> None:
        for site, missing in self._waiting.items():
            if missing:  # some calls do not reach the loss
                self._reduce(site)
        self._waiting = {}  # what arrives until the next probe is none of it

    def _reduce(self, site: str) -> None:
        per_sample, cross_pair = self.per_sample.get(site, False), self._last == 1
        calls = self._calls.get(site)
        if calls is not None:
            directions, offsets = self._rounding.weights.get(site), self._rounding.offsets.get(site)
            products = weight_products(calls, per_sample, cross_pair, directions, offsets)
        else:
            calls = self._reads[site]
            products = read_products(calls, per_sample, cross_pair, self._rounding.activations.get(site))
        for c in calls:
            c.grads[:] = [None, None]
            if self.last_pass:
                c.value = _GONE
        if products is not None:
            self._add(self._rows, site, products.inner)
            if products.forms is not None:
                self._add(self.forms, site, products.forms)
        self._waiting[site] = 0

    def _add(self, rows: dict[str, torch.Tensor], site: str, value: torch.Tensor) -> None:
        value = self._coefficient * value
        rows[site] = rows[site] + value if site in rows else value

    def take_forms(self) -> dict[str, torch.Tensor]:
        """What the passes since the last call gave along the rounding errors; the next one begins anew."""
        forms, self.forms = self.forms, {}
        return forms


@contextmanager
def not_recording(network: GradCapture | None) -> Iterator[None]:
    """Inside, calls of its layers are not those of its forward pass."""
    before = network is not None and network.recording
    try:
        if network is not None:
            network.recording = False
        yield
    finally:
        if network is not None:
            network.recording = before
