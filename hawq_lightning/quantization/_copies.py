"""Copies of a network that follow its weights (EMA, targets of BYOL and MoCo): quantized as the network is.

A copy has the types, names and shapes of a part of the network, no plan is for it, and its weights move without
gradients. A frozen teacher of the same make does not move, and stays float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.utils.hooks import RemovableHandle

from hawq_lightning._plan import Plan
from hawq_lightning._sites import quantizable_layers
from hawq_lightning.layers import FakeQuantLayer, OperandReader, WeightReader, holder_of, layer_type
from hawq_lightning.quantization._attention import put_attention, quantized_operands, spec_of_attention
from hawq_lightning.quantization._enabled import enabled_bits, plan_of
from hawq_lightning.quantization._modules import quantizers_in, spec_of, to_fake_quantized
from hawq_lightning.quantization._quantizer import Quantizer
from hawq_lightning.quantization._results import biases_of, put_alike, quantized_results

_CHECKS = 16  # batches after which weights are looked at no longer at every one
_VALUES = 64  # of a weight, to see whether it moves
_COSINE = 0.5  # cosine between an average of a network's weights and the weights; two trained layers of one form have 0
_Form = tuple[type[nn.Module], tuple[tuple[str, type[nn.Module], tuple[int, ...]], ...]]


@dataclass
class _Pair:
    """A module that looks like a part of the network, layer by layer."""

    copy: nn.Module
    parts: list[nn.Module]
    values: torch.Tensor
    follows: bool = False
    learns: bool = False
    hooks: dict[int, RemovableHandle] = field(default_factory=dict)

    def watch(self) -> bool:
        """Notice gradients when they come, since a validation clears them; whether all were noticed so far."""

        def comes(_: torch.Tensor) -> None:
            self.learns = True

        unwatched = [p for p in self.copy.parameters() if p.requires_grad and id(p) not in self.hooks]
        self.learns = self.learns or any(p.grad is not None for p in unwatched)
        self.hooks |= {id(p): p.register_post_accumulate_grad_hook(comes) for p in unwatched}
        return not unwatched


@dataclass
class NetworkCopies:
    """Finds copies, and keeps their quantizers those of the network.

    Attributes:
        pairs: modules that may be copies.
        tell: told of each copy outside that moves, in the place of quantizing any.
    """

    pairs: list[_Pair] = field(default_factory=list)
    tell: Callable[[nn.Module], None] | None = None
    _checks: int = 0

    def find(self, model: nn.Module, plan: Plan, outside: Iterable[nn.Module]) -> None:
        """Look for copies anew, once the network has a plan.

        Args:
            model: the quantized network, and whatever else its module holds.
            plan: of the network.
            outside: modules that somebody holds beside it.
        """
        for pair in self.pairs:
            for handle in pair.hooks.values():
                handle.remove()
        before, self.pairs, self._checks = {id(p.copy): p for p in self.pairs}, [], 0
        roots = [*([model] if self.tell is None else []), *outside]
        for module, sources in _alike(model, plan, roots):
            known = before.get(id(module))
            self.pairs.append(_Pair(module, sources, _some_values(module)))
            if known is not None:
                self.pairs[-1].follows, self.pairs[-1].learns = known.follows, known.learns
            self.pairs[-1].watch()

    def follow(self, thorough: bool = False) -> None:
        """Give copies whose weights have moved the network's quantizers, and all of them whole widths.

        Args:
            thorough: whatever it costs; else only the first few batches are looked at.
        """
        self._checks += 1
        if not thorough and self._checks > _CHECKS:
            return
        for pair in self.pairs:
            if not pair.follows and (_averaged_widths(pair.copy) or _moved(pair)):
                pair.follows = True
                if self.tell is not None:
                    self.tell(pair.copy)
                else:
                    _take(pair, everything=True)
            elif pair.follows and thorough and self.tell is None:
                _take(pair, everything=False)


def plan_with_copies(model: nn.Module, plan: Plan) -> Plan:
    """A plan with the sites of copies inside of the model that were given its quantizers: what a file has to hold.

    Args:
        model: with quantizers enabled.
        plan: of the network.

    Returns:
        ``plan``, with further sites where every enabled quantizer that it has not is one of a copy's.
    """
    planned = {n for s in plan.sites for n in s.layers}
    layers: dict[str, WeightReader | OperandReader] = {
        **quantizable_layers(model)[0],
        **quantized_operands(model),
        **quantized_results(model),
    }
    if planned - layers.keys() or not enabled_bits(model):
        return plan
    on = {s.name: s for s in plan_of(model).sites if planned.isdisjoint(s.layers)}
    copied = set() if not on else {id(m) for module, _ in _alike(model, plan, [model]) for m in module.modules()}
    if any(id(layers[n].module) not in copied for s in on.values() for n in s.layers):
        return plan
    biases = {n: norm for n, norm in biases_of(model).items() if id(layers[n].module) in copied}
    return plan.replace(sites=(*plan.sites, *on.values()), biases={**plan.biases, **biases})


def prepare_alike(model: nn.Module, outside: Iterable[nn.Module]) -> None:
    """Turn layers of modules that look like parts of a model into fake-quant layers, quantizers off: states line up.

    Args:
        model: with fake-quant layers.
        outside: modules that somebody holds beside it.
    """
    roots = [*outside]
    if not roots:
        return
    parts = {form_of(m): m for m in model.modules() if any(isinstance(x, FakeQuantLayer) for x in m.modules())}
    for module in [m for root in roots for m in root.modules()]:
        source = parts.get(form_of(module))
        if source is None or not quantizable_layers(module)[0]:
            continue
        if next(module.children(), None) is None and not torch.equal(_some_values(module), _some_values(source)):
            continue  # a layer alone looks like many another
        for layer, alike in _layers_of(module, source):
            if not isinstance(layer, FakeQuantLayer) and isinstance(alike, FakeQuantLayer):
                learns = any(p.requires_grad for p in layer.parameters(recurse=False))
                for quantizer in quantizers_in(to_fake_quantized(layer, spec_of(alike))).values():
                    quantizer.requires_grad_(learns)
        for inner, alike in _attention_of(module, source):
            if holder_of(inner) is None:
                put_attention(inner, spec_of_attention(alike)).requires_grad_(False)
        put_alike(module, source)


def _alike(model: nn.Module, plan: Plan, roots: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules of the form of parts of the network, no plan is for them -> the parts; the outermost ones.

    Args:
        model: the network.
        plan: of it.
        roots: where to look.
    """
    layers, roots = quantizable_layers(model)[0], [*roots]
    names = {n for s in plan.sites for n in s.layers}
    planned = {layers[n].module for n in names & layers.keys()}
    if roots in ([], [model]) and all(x.module in planned for x in layers.values()):
        return
    parts: dict[_Form, list[nn.Module]] = {}
    for module in model.modules():
        if not planned.isdisjoint(module.modules()):
            parts.setdefault(form_of(module), []).append(module)
    taken: set[int] = set()
    for module in [m for root in roots for m in root.modules()]:
        if id(module) in taken or not planned.isdisjoint(module.modules()) or not quantizable_layers(module)[0]:
            continue
        if sources := parts.get(form_of(module), []):
            taken |= {id(m) for m in module.modules()}
            yield module, sources


def form_of(module: nn.Module) -> _Form:
    """What tells a copy: the module's type, and names, types and shapes of the layers in it."""
    layers: Mapping[str, WeightReader] = quantizable_layers(module)[0]
    return layer_type(module), tuple((n, layer_type(x.module), tuple(x.weight.shape)) for n, x in layers.items())


def _layers_of(module: nn.Module, source: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    mine, theirs = quantizable_layers(module)[0], quantizable_layers(source)[0]
    return [*dict.fromkeys((mine[n].module, theirs[n].module) for n in mine)]


def _attention_of(module: nn.Module, source: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Modules whose counterparts in ``source`` have quantizers of attention, with these."""
    theirs = {n: m for n, m in source.named_modules() if holder_of(m) is not None}
    return [(module.get_submodule(n), m) for n, m in theirs.items()]


def _is_on(layer: nn.Module) -> bool:
    return any(q.bits for q in quantizers_in(layer).values())


def _averaged_widths(module: nn.Module) -> bool:
    """Whether an average over buffers has made widths that are no whole numbers."""
    widths = [float(q.num_bits) for m in module.modules() for q in quantizers_in(m).values()]
    return any(abs(w - round(w)) > 1e-3 for w in widths) or (any(widths) and not any(map(_is_on, module.modules())))


def _some_values(module: nn.Module) -> torch.Tensor:
    values = []
    for reader in quantizable_layers(module)[0].values():
        flat = reader.weight.detach().flatten()
        values.append(flat[:: max(1, flat.numel() // _VALUES)].float().cpu())
    return torch.cat(values)


def _moved(pair: _Pair) -> bool:
    """Whether weights have moved that no gradient moves, and to where the network's are."""
    values = _some_values(pair.copy)
    if not pair.watch():
        pair.values = values  # how it came here is not known
    if pair.learns or torch.equal(pair.values, values):
        return False
    return any(cosine_similarity(values, _some_values(part), dim=0) > _COSINE for part in pair.parts)


@torch.no_grad()
def _take(pair: _Pair, everything: bool) -> None:
    """Give a copy the state of the network's quantizers.

    Args:
        pair: the copy, and the parts that it may be a copy of.
        everything: steps, too; else widths and zero points alone, since steps may be averages.
    """
    values = _some_values(pair.copy)
    source = min(pair.parts, key=lambda part: float((values - _some_values(part)).square().sum()))
    pair.parts = [source]
    for layer, alike in _layers_of(pair.copy, source):
        if not isinstance(alike, FakeQuantLayer):
            continue
        if everything:
            to_fake_quantized(layer, spec_of(alike))
        _take_state(quantizers_in(layer), quantizers_in(alike), everything)
    for module, alike in _attention_of(pair.copy, source):
        put_attention(module, spec_of_attention(alike))
        _take_state(_of_attention(module), _of_attention(alike), everything)
    if everything:
        put_alike(pair.copy, source)
    theirs = quantized_results(source)
    mine = {n: x.input_quantizer for n, x in quantized_results(pair.copy).items() if n in theirs}
    _take_state(mine, {n: theirs[n].input_quantizer for n in mine}, everything)


def _take_state(mine: Mapping[str, Quantizer], theirs: Mapping[str, Quantizer], everything: bool) -> None:
    for name, quantizer in mine.items():
        if everything:
            quantizer.load_state_dict(theirs[name].state_dict())
        else:
            quantizer.num_bits.copy_(theirs[name].num_bits)
            quantizer.zero_point.copy_(theirs[name].zero_point)
            quantizer.refresh()


def _of_attention(module: nn.Module) -> dict[str, Quantizer]:
    return quantizers_in(cast(nn.Module, holder_of(module)))
