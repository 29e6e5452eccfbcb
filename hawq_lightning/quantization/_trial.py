"""What quantization does to the loss, measured on a model that is left as it was: by site, by plan, to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hawq_lightning._attention_calls import results_named
from hawq_lightning._batches import batch_images
from hawq_lightning._candidates import Candidates
from hawq_lightning._plan import Candidate, Plan, PlanSite
from hawq_lightning._progress import progress_bar
from hawq_lightning._site_table import Site, SiteTable
from hawq_lightning._sites import quantizable_layers
from hawq_lightning._types import Batch, BatchSizeFn, LossFn
from hawq_lightning.layers import holder_of, put_holder, renew_weight
from hawq_lightning.quantization._apply import disable, enable_site, prepare
from hawq_lightning.quantization._attention import QuantizedOperand, drop_attention, quantized_operands
from hawq_lightning.quantization._check_plan import check_plan
from hawq_lightning.quantization._enabled import quantized_layers, quantizers
from hawq_lightning.quantization._float_distance import FloatDistance
from hawq_lightning.quantization._fold import norms_to_fold
from hawq_lightning.quantization._modules import QuantizedWeight, quantizers_in, to_float
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named
from hawq_lightning.quantization._results import drop_results, put_aside, put_back, put_results, quantized_results
from hawq_lightning.sensitivity import EffectiveWeights, isolated_eval, on_device, repeatable


@contextmanager
def temporarily_quantized(
    model: nn.Module,
    quantizer: str | QuantizerSpec | None = None,
    attention: bool = False,
    results: Iterable[str] = (),
) -> Iterator[dict[str, QuantizedWeight | QuantizedOperand]]:
    """Inside, every quantizable layer is a fake-quant layer with its quantizers off; afterwards all is as it was.

    Args:
        model: float, or with quantizers in any state.
        quantizer: registered name; ``None``: the layers' own, ``uniform`` for a float layer.
        attention: modules whose forward makes attention have quantizers for what that reads, too.
        results: names of those that have quantizers, too, among layers' names.
    """
    of_results, biases = put_aside(model)
    holders = {m: h for m in model.modules() if (h := holder_of(m)) is not None}
    modules = {id(x.module): x.module for x in quantized_layers(model).values()}
    before = {key: (quantizers_in(m), m.quantizer_options) for key, m in modules.items()}
    states = [(q, [(t, t.detach().clone()) for t in q._tensors()], _plain(q)) for q in quantizers(model)]
    layers = prepare(model, quantizer=quantizer, attention=attention)
    put_results(model, results_named(model, results).values(), quantizer_named(quantizer or "uniform"))
    disable(model)
    for q in quantizers(model):
        q.fake_quant_disabled = False
    try:
        yield {**layers, **quantized_operands(model), **quantized_results(model)}
    finally:
        drop_attention(model)
        drop_results(model)
        put_back(model, of_results, biases)
        for layer in layers.values():
            if id(layer.module) not in before:
                to_float(layer.module)
        for module, holder in holders.items():
            put_holder(module, holder)
        for key, (held, options) in before.items():
            modules[key]._modules.update(held)
            modules[key].quantizer_options = options
        with torch.no_grad():
            for q, tensors, plain in states:
                for tensor, value in tensors:
                    tensor.copy_(value)
                q.__dict__.update(plain)


def loss_per_site(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    sites: SiteTable,
    candidates: Mapping[str, Sequence[Candidate]],
    *,
    quantizer: str | QuantizerSpec | None = None,
    batch_size_fn: BatchSizeFn = batch_images,
    progress: bool = False,
    target: FloatDistance | None = None,
) -> list[dict[str, str | float]]:
    """Quantize one site at a time and measure the loss: the cheapest test of the paper's claim.

    Args:
        model: float, or with quantizers in any state; left as it was.
        batches: the mean loss is over these.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        sites: table of the model.
        candidates: what to try at each.
        quantizer: registered name; ``None``: the layers' own; for a float model that of the candidates, or ``uniform``
            where they tell none.
        batch_size_fn: number of samples in a batch.
        progress: show a bar.
        target: of the same model, batches and ``loss_fn``: measures the distance to the float network in the same
            passes, which needs no labels and has no slope at it.

    Returns:
        rows ``site, kind, bits, predicted`` (half of Omega), ``measured`` (loss change) and, with a target, ``kl``.
    """
    if quantizer is None and isinstance(candidates, Candidates) and not quantized_layers(model):
        quantizer = quantizer_named(candidates.quantizer, candidates.quantizer_options)
    mean_loss = _MeanLoss(model, batches, loss_fn, batch_size_fn, target)
    norms = norms_to_fold(model, sites.layers)
    trials = [(s, c) for s in sites for c in candidates.get(s.name, ())]
    rows: list[dict[str, str | float]] = []
    with (
        temporarily_quantized(model, quantizer, bool(sites.products), [n for s in sites for n in s.layers]) as layers,
        isolated_eval(model),
        progress_bar("Loss change, site by site", len(trials), progress) as advance,
    ):
        base = mean_loss()
        for done, (site, candidate) in enumerate(trials):
            for name in site.layers:
                enable_site(layers[name], _plan_site(site, candidate), norms.get(name))
            measured = mean_loss() - base
            for name in site.layers:
                layers[name].quantizer_of(site.kind).disable()
            row: dict[str, str | float] = {
                "site": site.name, "kind": site.kind, "bits": candidate.bits,
                "predicted": candidate.omega / 2, "measured": measured,
            }  # fmt: skip
            rows.append(row if target is None else row | {"kl": mean_loss.distance})
            advance(done + 1)
    return rows


@contextmanager
def loss_of_plan(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    batch_size_fn: BatchSizeFn = batch_images,
    quantizer: str | QuantizerSpec | None = None,
    attention: bool = False,
    results: Iterable[str] = (),
) -> Iterator[Callable[[Plan], float]]:
    """Inside, a function from a plan to the mean loss of the network quantized by it, without fine-tuning.

    Only sites whose bits differ from the last plan's are enabled again.

    Args:
        model: float, or with quantizers in any state; left as it was.
        batches: the mean loss is over these.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batch_size_fn: number of samples in a batch.
        quantizer: registered name; ``None``: the layers' own; for a float model that of the first plan.
        attention: plans have sites of attention.
        results: those of the plans' sites, among layers' names.
    """
    mean_loss = _MeanLoss(model, batches, loss_fn, batch_size_fn)
    with plans_in_place(model, quantizer, attention, results) as put:

        def loss_of(plan: Plan) -> float:
            put(plan)
            return mean_loss()

        yield loss_of


@contextmanager
def plans_in_place(
    model: nn.Module,
    quantizer: str | QuantizerSpec | None = None,
    attention: bool = False,
    results: Iterable[str] = (),
    anew: bool = False,
) -> Iterator[Callable[[Plan], None]]:
    """Inside, a function that quantizes the model, in evaluation mode, by a plan; afterwards all is as it was.

    Only sites whose bits differ from the last plan's are enabled again.

    Args:
        model: float, or with quantizers in any state.
        quantizer: registered name; ``None``: the layers' own; for a float model that of the first plan.
        attention: plans have sites of attention.
        results: those of the plans' sites, among layers' names.
        anew: all sites are enabled again, since what their ranges depend on is changed between two plans.
    """
    enabled: dict[str, PlanSite] = {}
    layers: dict[str, QuantizedWeight | QuantizedOperand] = {}
    inside = ExitStack()

    def enter(spec: str | QuantizerSpec | None) -> None:
        layers.update(inside.enter_context(temporarily_quantized(model, spec, attention, results)))
        inside.enter_context(isolated_eval(model))

    def put(plan: Plan) -> None:
        if not layers:
            enter(quantizer_named(plan.quantizer, plan.quantizer_options))
        if not enabled:
            check_plan(model, plan)
        norms = norms_to_fold(model, plan.layers)
        for site in plan.sites:
            last = enabled.get(site.name)
            if last is None or anew or (last.bits, last.code) != (site.bits, site.code):
                for name in site.layers:
                    enable_site(layers[name], site, norms.get(name))
                enabled[site.name] = site

    with inside:
        if quantizer is not None or quantized_layers(model):
            enter(quantizer)
        yield put


def first_order_term(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    plan: Plan,
    batch_size_fn: BatchSizeFn = batch_images,
) -> float:
    """The term that the paper's Assumption 1 sets to zero: g · ΔW, small only where training has converged.

    ``sum_l <g_l, Q(W_l) - W_l>`` over the weights of a plan, g the gradient of the mean loss over the batches.

    Args:
        model: left as it was, but for ``requires_grad`` of its weights.
        batches: the mean loss is over these.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        plan: whose quantizer rounds the weights.
        batch_size_fn: number of samples in a batch.
    """
    layers, _ = quantizable_layers(model)
    weights = {s.name: layers[s.layers[0]] for s in plan.weights}
    if not weights:
        return 0.0
    norms = norms_to_fold(model, plan.layers)
    spec = quantizer_named(plan.quantizer, plan.quantizer_options)
    loss_fn = repeatable(model, loss_fn)
    total, count = 0.0, 0
    device = _device(model)
    with isolated_eval(model), torch.enable_grad():
        errors = {}
        for s in plan.weights:
            layer = weights[s.name]
            renew_weight(layer.module)
            w = layer.weight.detach()
            axis = layer.channel_axis
            quantizer = spec.weight_quantizer(w.shape[axis], axis).to(w.device)
            quantizer.fold(norms.get(s.layers[0]))
            quantizer.fit(w, s.bits, s.code)
            errors[s.name] = (quantizer(w.float()) - w).detach()
        for layer in weights.values():
            layer.weight.requires_grad_(True)
        moved = on_device(batches, device)
        for n, batch in zip(moved.samples(batch_size_fn), moved):
            with EffectiveWeights(weights) as effective:
                loss = loss_fn(model, batch)
                grads = torch.autograd.grad(loss, [effective[k] for k in weights], allow_unused=True)
            total += n * sum(float((g * errors[k]).sum()) for k, g in zip(weights, grads) if g is not None)
            count += n
    return total / max(count, 1)


class _MeanLoss:
    """The mean loss over batches on the model's device, by samples; ``distance``: a target's, in the last pass."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        loss_fn: LossFn,
        batch_size_fn: BatchSizeFn,
        target: FloatDistance | None = None,
    ) -> None:
        self._model, self._loss_fn = model, repeatable(model, loss_fn)
        self._target, self.distance = target, 0.0
        self._batches = on_device(batches, _device(model))
        self._samples = self._batches.samples(batch_size_fn)

    def __call__(self) -> float:
        with torch.enable_grad():  # no parameter needs gradients, but a step may want those of its inputs
            if self._target is not None:
                return self._with_distance(self._target)
            losses = [float(self._loss_fn(self._model, b)) * n for b, n in zip(self._batches, self._samples)]
        return sum(losses) / sum(self._samples)

    def _with_distance(self, target: FloatDistance) -> float:
        both = [target.with_loss(self._model, b) for b in self._batches]
        total = sum(self._samples)
        self.distance = sum(x.kl * n for (_, x), n in zip(both, self._samples)) / total
        return sum(float(loss) * n for (loss, _), n in zip(both, self._samples)) / total


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _plan_site(site: Site, candidate: Candidate) -> PlanSite:
    return PlanSite(
        site.name, site.kind, site.layers, site.shape, site.numel, candidate.bits, candidate.code,
        candidate.scale, candidate.zero_point,
    )  # fmt: skip


def _plain(quantizer: nn.Module) -> dict[str, object]:
    """Attributes beside parameters and buffers."""
    return {k: v for k, v in quantizer.__dict__.items() if k not in _MODULES}


_MODULES = set(nn.Module().__dict__) - {"training"}
