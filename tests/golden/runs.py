"""Short deterministic runs through all of the package, each of which leaves a flat record of its numbers.

Every run starts from its own seeds, draws its own data and writes to its own folder, so that order, other runs and the
load of the machine do not matter. Settings are given in full: a default that changes later moves nothing here.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from tests.golden import api, facts, nets
from tests.golden.facts import Record

ROOT = Path(__file__).resolve().parents[2]
SHARED = next((p / "shared" / "data" for p in ROOT.parents if (p / "shared" / "data").is_dir()), None)
MEASURED = {
    "rtol": 0.1, "max_probes": 48, "l1": "zero", "draw": "all", "estimator": "ggn", "seed": 3, "precision": "float32",
}  # fmt: skip
CHOSEN = {
    **MEASURED, "weight_bits": (2, 4, 8), "activation_bits": (4, 8), "input_bits": 8, "codes": "auto", "budget": "9x",
    "images": 32, "rtol": 0.4, "max_probes": 16, "stop": "error", "selector": "pareto", "quantizer": "uniform",
    "selection_seed": 3, "l1": "fisher", "progress": False,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: of the function.
        make: fills a record, in a folder of its own.
        fast: part of ``make test``.
        shared: needs the data beside the checkout.
    """

    name: str
    make: Callable[[Record, Path], None]
    fast: bool
    shared: bool


RUNS: dict[str, Run] = {}


def run(fast: bool = True, shared: bool = False) -> Callable[[Callable[[Record, Path], None]], Any]:
    """Register a run."""

    def add(make: Callable[[Record, Path], None]) -> Callable[[Record, Path], None]:
        RUNS[make.__name__] = Run(make.__name__, make, fast, shared)
        return make

    return add


def record_of(name: str) -> Record:
    """Make a run, in one thread, and return what it leaves."""
    threads, kept = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    seed_everything(11, verbose=False)
    record: Record = {}
    try:
        with tempfile.TemporaryDirectory(prefix="hawq_lightning-golden-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            RUNS[name].make(record, Path(folder))
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(kept)
    return record


# --------------------------------------------------------------------------------------------- traces, plain PyTorch


def measured(record: Record, net: nn.Module, loss: Any = nets.cross_entropy, section: str = "sensitivity", **own: Any):
    """Measure on 24 images in batches of 8, and write it down."""
    data = own.pop("data", None) or nets.batches(24, 8)
    found = api.measure(net, data, loss, **{**MEASURED, **own})
    facts.of_sensitivity(record, found, section)
    return found


@run()
def traces_ggn(record: Record, folder: Path) -> None:
    """Gauss-Newton probes of all images, and of images drawn by their curvature."""
    net = nets.build(nets.Residual)
    measured(record, net, section="all", rtol=0.01)
    measured(record, net, section="unrotated", rotate=False, rtol=0.3)
    with torch.no_grad():
        net.fc.weight.mul_(30)  # a network that is sure of some images: a draw pays
    measured(record, net, section="curvature", draw="curvature", rtol=0.2)
    measured(record, net, section="draw_auto", draw="auto", rtol=0.2)


@run()
def traces_auto(record: Record, folder: Path) -> None:
    """The estimator that ``auto`` takes for a piecewise linear and for a curved network."""
    measured(record, nets.build(nets.Residual), section="linear", estimator="auto", rtol=0.2)
    measured(record, nets.build(nets.Smooth), section="curved", estimator="auto", rtol=0.3)


@run()
def traces_hessian(record: Record, folder: Path) -> None:
    """Probes completed by Hutchinson's method on a network with SiLU and squeeze-and-excitation."""
    measured(record, nets.build(nets.Smooth), estimator="hessian", rtol=0.3)
    measured(record, nets.build(nets.Residual), section="linear", estimator="hessian", rtol=0.3)


@run()
def traces_hutchinson(record: Record, folder: Path) -> None:
    """The paper's estimator on the true Hessian, with both kinds of vectors."""
    measured(record, nets.build(nets.Smooth), section="rademacher", estimator="hutchinson", rtol=0.3)
    measured(
        record, nets.build(nets.Smooth), section="gaussian", estimator="hutchinson", distribution="gaussian", rtol=0.5
    )


@run()
def traces_exact(record: Record, folder: Path) -> None:
    """All columns of the output; in float64 too."""
    measured(record, nets.build(nets.Residual), estimator="exact")
    double = [(x.double(), y) for x, y in nets.batches(12, 5)]  # a last batch that is smaller
    measured(record, nets.build(nets.Residual).double(), section="double", estimator="exact", data=double)


@run()
def traces_l1(record: Record, folder: Path) -> None:
    """An L1 loss, which has no curvature, as it is and as the Fisher information of a Laplace distribution."""
    net = nets.build(nets.TwoHeads)
    measured(record, net, nets.two_losses, section="zero", l1="zero", rtol=0.3)
    measured(record, net, nets.two_losses, section="fisher", l1="fisher", rtol=0.3)


@run()
def traces_shapes(record: Record, folder: Path) -> None:
    """Transposed, grouped and three-dimensional convolutions; shared weights; reductions other than a mean."""
    measured(record, nets.build(nets.Transposed), section="transposed", rtol=0.3)
    measured(record, nets.build(nets.Tied), section="tied", rtol=0.3)
    measured(
        record, nets.build(nets.Residual), lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"),
        section="summed", rtol=0.4,
    )  # fmt: skip
    measured(
        record, nets.build(nets.Residual), lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1], nets.CLASSES).float()),
        section="squares", rtol=0.4,
    )  # fmt: skip


@run()
def traces_bf16(record: Record, folder: Path) -> None:
    """Probes in bfloat16."""
    measured(record, nets.build(nets.Residual), precision="bf16", rtol=0.4)
    assert record["sensitivity.setting[precision]"] == "bf16"


@run()
def eigenvalues(record: Record, folder: Path) -> None:
    """The largest eigenvalue of every site, of Gauss-Newton and true Hessian."""
    data = nets.batches(16, 8)
    for kind in ("ggn", "hessian"):
        found = api.top_eigenvalues(
            nets.build(nets.Smooth), data, nets.cross_entropy, kind=kind, rtol=0.05, seed=3, max_steps=60
        )
        facts.put(record, f"{kind}.eigenvalue", found)


# ----------------------------------------------------------------------------------------------------- selection


@run()
def selectors(record: Record, folder: Path) -> None:
    """What every selector makes of the same measured problem, and what that problem's options are."""
    net, data = nets.build(nets.Residual), nets.batches(24, 8)
    table = api.sites(net, data[0][0])
    found = api.measure(net, data, nets.cross_entropy, sites=table, **{**MEASURED, "estimator": "exact"})
    weighed = api.options(
        net, data, found, table, nets.cross_entropy,
        weight_bits=(2, 3, 4, 8), activation_bits=(3, 4, 8), input_bits=8, codes="auto", quantizer="uniform",
    )  # fmt: skip
    for name, options in api.options_by_site(weighed).items():
        facts.of_options(record, name, options, "options.option")
    eigen = {n: max(0.0, v) for n, v in api.top_eigenvalues(
        net, data, nets.cross_entropy, sites=table, rtol=0.05, seed=3, max_steps=60).items()}  # fmt: skip

    def loss_of(plan: Any) -> float:
        enabled = api.quantize(copy.deepcopy(net), plan)
        with torch.no_grad():
            return float(sum(nets.cross_entropy(enabled, b) for b in data))

    def pick(section: str, budget: Any, selector: str = "pareto", constraints: Any = None, **own: Any) -> None:
        problem = api.problem(table, weighed, found, file_overhead=100, **(constraints or {}))
        plan = api.find("select")(problem, budget, selector, **({"seed": 3} | own))
        facts.of_plan(record, plan, section, weighed=False)
        if selector == "pareto" and not constraints:
            facts.of_frontier(record, api.frontier(problem), f"{section}_frontier")

    two = {"weights": "10x", "bops": "40%"}
    pick("pareto", "10x")
    pick("pareto_two_budgets", two)
    pick("pareto_activations", {"weights": "3.5bit", "act": "5x"})
    pick("pareto_tied", "7x", constraints={"ties": [["stem", "narrow"]], "fixed": {"last": 8}, "min_bits": 3})
    pick("pareto_pairs", "9x", constraints={"pairs": [(4, 4), (8, 8), (4, 8), (2, 4), (3, 4)]})
    pick("monotone", "10x", "monotone")
    pick("monotone_two_budgets", two, "monotone")
    pick("uniform", "8x", "uniform")
    pick("direct", "6x", "direct")
    pick("l2", "10x", "l2")
    pick("top_eigenvalue", "10x", "top_eigenvalue", eigenvalues=eigen)
    pick("hawq", "10x", "hawq", eigenvalues=eigen)
    pick("hawq_two_budgets", two, "hawq", eigenvalues=eigen)
    pick("max_perturbation", "10x", "max_perturbation")
    for seed in (0, 1, 2):
        pick(f"random{seed}", two, "random", seed=seed)
    pick("manual", None, "manual", bits={"*.weight": 4, "stem.weight": 8, "*.input": 8})
    pick("accuracy", "10x", "accuracy", measure_loss=loss_of)


@run()
def selection_of_arrays(record: Record, folder: Path) -> None:
    """Larger problems out of plain numbers: frontier, exact choice, choice with ties."""
    rng = np.random.default_rng(5)
    for count in (12, 60):
        names = [f"l{i}" for i in range(count)]
        numel = (rng.integers(1, 60, count) * 16).tolist()
        trace = np.exp(rng.normal(0, 2, count))
        omega = [[float(t * n * 4.0**-b) for b in (2, 3, 4, 8)] for t, n in zip(trace, numel)]
        problem = api.find("Problem").from_arrays(names, (2, 3, 4, 8), omega, numel)
        for budget in ("8x", "11x"):
            facts.of_plan(record, api.find("select")(problem, budget, "pareto"), f"arrays{count}_{budget}", False)
        facts.of_frontier(record, api.frontier(problem), f"arrays{count}_frontier")


@run()
def stopping_by_the_plan(record: Record, folder: Path) -> None:
    """Up to which noise of the traces measuring may stop with the plan: the share of Ω that it may lose decides."""
    rng, rows = np.random.default_rng(9), 32
    names = [f"l{i}.weight" for i in range(10)]
    numel = (rng.integers(1, 60, 10) * 16).tolist()
    trace = np.exp(rng.normal(0, 1, 10))
    omega = [[float(t * n * 4.0**-b) for b in (2, 3, 4, 8)] for t, n in zip(trace, numel)]
    problem = api.find("Problem").from_arrays(names, (2, 3, 4, 8), omega, numel)
    noise = rng.standard_normal((10, rows))
    noise -= noise.mean(1, keepdims=True)
    record |= {f"stable.default[{name}]": getattr(api.find("StablePlan"), name) for name in ("regret", "bootstraps")}
    for level in np.geomspace(0.5, 1.2, 6):
        drawn = {n: (t * k * (1 + level * z)).tolist() for n, t, k, z in zip(names, trace, numel, noise)}
        errors = [float(np.std(x) / rows**0.5) for x in drawn.values()]
        records = tuple(
            api.find("SiteTrace")(n, "weight", float(np.mean(x)), e, e, k, float(np.mean(x)) / k)
            for (n, x), e, k in zip(drawn.items(), errors, numel)
        )
        traces = api.find("Sensitivity")(records, drawn, row_unit=dict.fromkeys(names, "image"))
        stable = api.find("StablePlan")(problem.table, lambda _: problem.candidates, "8x")
        record[f"stable.enough[{level:.4f}]"] = stable(traces)


# ------------------------------------------------------------------------------------------------- in the Trainer


class Losses(Callback):
    """The loss of every step: where a training begins to differ."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))


def trainer(folder: Path, callbacks: list[Any], **own: Any) -> Trainer:
    """A quiet Trainer on the CPU."""
    settings = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(callbacks=callbacks, **(settings | own))


def fitted(
    record: Record, folder: Path, kind: type[nn.Module] = nets.Residual, epochs: int = 2, pack: bool = True, **flat: Any
) -> tuple[Any, nets.Learner]:
    """Fit with HAWQ, validate; write down traces, plan, losses, weights, metrics, and what a packed file gives back."""
    seed_everything(7, verbose=False)
    model, losses = nets.Learner(nets.build(kind)), Losses()
    callback, callbacks = api.hawq(**{**CHOSEN, "dirpath": folder, **flat})
    fitting = trainer(folder, [*callbacks, losses], max_epochs=epochs)
    fitting.fit(model, nets.loader(), nets.loader(32, seed=2, shuffle=False))
    described(record, callback)
    trained(record, model, losses, fitting)
    if pack:
        round_trip(record, folder, model, callback.plan, nets.Learner(nets.build(kind, seed=1)))
    return callback, model


def described(record: Record, callback: Any) -> None:
    """What HAWQ measured and chose."""
    if (sensitivity := api.result(callback, "sensitivity")) is not None:
        facts.of_sensitivity(record, sensitivity)
        for name, options in api.options_of(callback).items():
            facts.of_options(record, name, options, "options.option")
    if (frontier := api.result(callback, "frontier")) is not None:
        facts.of_frontier(record, frontier)
    facts.of_plan(record, callback.plan)


def trained(record: Record, model: nn.Module, losses: Losses, fitting: Trainer) -> None:
    """What training made of it."""
    record["training.losses"] = facts.array(np.asarray(losses.seen))
    facts.of_state(record, model)
    facts.of_metrics(record, fitting.callback_metrics)


def round_trip(record: Record, folder: Path, model: nn.Module, plan: Any, fresh: nn.Module) -> None:
    """Through a packed file into another network of the same architecture."""
    x, _ = nets.images(8, seed=4)
    loaded = api.packed(model, plan, folder / "model.safetensors", fresh)
    facts.of_packed(record, loaded, x)
    record["packed.same_as_trained"] = bool(torch.equal(facts.outputs(model, x), facts.outputs(loaded, x)))


@run()
def fit_uniform(record: Record, folder: Path) -> None:
    """All of it with the default quantizer, after a float epoch, with the loss change of every option."""
    callback, _ = fitted(record, folder, epochs=3, start=1, check_loss=True)
    for row in api.attribute(callback, "loss_check"):
        key = f"{row['site']} {row['bits']}"
        record[f"loss_check.predicted[{key}]"] = float(row["predicted"])
        record[f"loss_check.measured[{key}]"] = float(row["measured"])


LOW = {"weight_bits": (3, 4), "activation_bits": 4, "budget": "9.2x"}


@run()
def fit_lsq(record: Record, folder: Path) -> None:
    """Learned steps."""
    fitted(record, folder, quantizer="lsq", freeze_ranges=0.75, **LOW)


@run()
def fit_pact(record: Record, folder: Path) -> None:
    """Learned clipping of activations, weights as in DoReFa."""
    fitted(record, folder, quantizer="pact", **LOW)


@run()
def fit_dorefa(record: Record, folder: Path) -> None:
    """Weights squashed before they are rounded."""
    fitted(record, folder, quantizer="dorefa", **LOW)


@run()
def fit_lq_nets(record: Record, folder: Path) -> None:
    """Learned codebooks."""
    fitted(record, folder, quantizer="lq_nets", **LOW)


@run()
def fit_int_only(record: Record, folder: Path) -> None:
    """Affine ranges that follow, with BatchNorm folded while training."""
    fitted(record, folder, quantizer="int_only", **LOW)


@run()
def fit_fqn(record: Record, folder: Path) -> None:
    """Fixed ranges and frozen BatchNorm."""
    fitted(record, folder, quantizer="fqn", **LOW)


@run()
def fit_ranges(record: Record, folder: Path) -> None:
    """Ranges by percentile, fitted again while training; midrise codes only."""
    options = {"ranges": "percentile", "reestimate": 2}
    fitted(record, folder, quantizer_options=options, codes="midrise", **{**LOW, "budget": {"weights": "9.2x"}})


@run()
def fit_transposed(record: Record, folder: Path) -> None:
    """Transposed, grouped, one- and three-dimensional convolutions."""
    fitted(record, folder, nets.Transposed)


@run()
def fit_shared_weights(record: Record, folder: Path) -> None:
    """A weight in two layers, a layer called three times, and an activation that two layers read."""
    fitted(record, folder, nets.Tied, activation_bits=(3, 4, 8), budget={"weights": "9x", "act": "5x"})


@run()
def fit_curved(record: Record, folder: Path) -> None:
    """SiLU and squeeze-and-excitation by the true Hessian; one bit among the widths."""
    fitted(record, folder, nets.Smooth, estimator="hessian", weight_bits=(1, 2, 4, 8), budget="8x", rtol=0.5)


@run()
def selector_hawq(record: Record, folder: Path) -> None:
    """HAWQ's first version, by the eigenvalues that the callback computes."""
    fitted(record, folder, epochs=1, pack=False, selector="hawq")


@run()
def stop_by_plan(record: Record, folder: Path) -> None:
    """A measurement that ends once the plan no longer changes, with set B and images drawn by curvature."""
    fitted(record, folder, epochs=1, pack=False, stop="plan", rtol=0.002, max_probes=64, selector="monotone")
    assert record["sensitivity.setting[stopped]"] == "enough"


@run()
def schedules(record: Record, folder: Path) -> None:
    """Distillation, freezing by shares of the training, block-wise order, after a float epoch."""
    fitted(
        record, folder, nets.Dropped, epochs=3, start=1, distill=0.7, distill_temperature=3.0, freeze_batchnorm=0.8,
        freeze_ranges=2, order="omega", order_until=0.7, quantizer="lsq",
    )  # fmt: skip


@run()
def post_training(record: Record, folder: Path) -> None:
    """Rounding and statistics improved without training, in ``trainer.validate`` alone."""
    seed_everything(7, verbose=False)
    model = nets.Learner(nets.build(nets.Residual))
    callback, callbacks = api.hawq(**{**CHOSEN, "dirpath": folder, "post_training": True})
    validating = trainer(folder, callbacks)
    validating.validate(model, nets.loader(32, shuffle=False), verbose=False)
    described(record, callback)
    facts.of_state(record, model)
    facts.of_metrics(record, validating.callback_metrics)
    improved = getattr(callback, "improved", None)
    if improved is None:  # a callback of its own
        improved = next(c.improved for c in callbacks if hasattr(c, "improved"))
    for method, layers in improved.items():
        for layer, value in layers.items():
            numbers = {f"{layer} {k}": v for k, v in value.items()} if isinstance(value, dict) else {layer: value}
            facts.put(record, f"improved.{method}", numbers)
    round_trip(record, folder, model, callback.plan, nets.Learner(nets.build(nets.Residual, seed=1)))


@run()
def given_plan(record: Record, folder: Path) -> None:
    """A plan handed on to another network and another quantizer; nothing is measured."""
    first: Record = {}
    callback, _ = fitted(first, folder / "first", epochs=1, pack=False)
    fitted(record, folder / "second", plan=callback.plan, quantizer="lsq")


SHARE = 0.6  # of all passes, after which a measurement is stopped


class StopError(Exception):
    """The end of a process, for the purposes of a run."""


class Counting(nets.Learner):
    """Counts its steps in a file, since a measurement puts a module's attributes back, and stops after some."""

    def __init__(self, net: nn.Module, steps: Path, most: int) -> None:
        super().__init__(net)
        self.steps, self.most = steps, most

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with self.steps.open("a") as file:
            file.write(".")
        if self.steps.stat().st_size > self.most:
            raise StopError
        return super().training_step(batch, batch_idx)


@run()
def interrupted_measurement(record: Record, folder: Path) -> None:
    """Stopped in mid measurement and started again: the traces of an undisturbed one, with fewer passes."""
    flat = {**CHOSEN, "estimator": "hutchinson", "images": 64, "rtol": 0.02, "max_probes": 24}

    def measure(where: str, most: int) -> tuple[Any, nets.Learner, int]:
        seed_everything(7, verbose=False)
        steps = folder / f"steps_{where}_{most}"
        model = Counting(nets.build(nets.Residual), steps, most)
        callback, callbacks = api.hawq(**flat, dirpath=folder / where)
        try:
            trainer(folder / where, callbacks, max_epochs=1, limit_train_batches=1).fit(model, nets.loader())
        except StopError:
            callback = None
        return callback, model, steps.stat().st_size

    whole, _, all_steps = measure("whole", 10**9)
    stopped, _, _ = measure("stopped", int(SHARE * all_steps))
    assert not (folder / "stopped" / "sensitivity.json").exists(), "it was stopped after the measurement"
    again, resumed, steps = measure("stopped", 10**9)
    assert stopped is None and steps < (1 - SHARE / 2) * all_steps, "it did not go on from where it was stopped"
    described(record, again)
    other: Record = {}
    described(other, whole)
    record["resumed.same_as_undisturbed"] = other == record
    facts.of_state(record, resumed)


@run()
def resumed_training(record: Record, folder: Path) -> None:
    """Stopped in the middle of an epoch and resumed from its checkpoint, then tested from a checkpoint."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = torch.utils.data.TensorDataset(*nets.images(64))

    def fit(where: str, stop_after: int, seed: int, ckpt: Any = None, **flat: Any) -> tuple[Any, Any, Any, Any]:
        seed_everything(seed, verbose=False)
        model, losses = nets.Learner(nets.build(nets.Dropped)), Losses()
        callback, callbacks = api.hawq(**{**CHOSEN, **flat, "dirpath": folder / where})
        saver = ModelCheckpoint(folder / where, every_n_train_steps=5, save_top_k=-1, filename="{step}")

        class Stop(Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step == stop_after:
                    raise StopError

        fitting = trainer(folder / where, [*callbacks, saver, losses, Stop()], enable_checkpointing=True)
        try:
            fitting.fit(model, StatefulDataLoader(data, 8, shuffle=True), ckpt_path=ckpt)
        except StopError:
            return None, None, None, None
        return callback, model, losses, fitting

    _, undisturbed, _, _ = fit("whole", -1, 7, quantizer="lsq")
    fit("stopped", 6, 7, quantizer="lsq")
    place = folder / "stopped" / "step=5.ckpt"
    callback, model, losses, fitting = fit("stopped", -1, 8, ckpt=place, quantizer="lsq")
    described(record, callback)
    trained(record, model, losses, fitting)
    pairs = zip(api.state(undisturbed), api.state(model))
    record["resumed.same_as_undisturbed"] = all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    last = max((folder / "stopped").glob("*.ckpt"), key=lambda p: int(p.stem.removeprefix("step=").split("-")[0]))
    fresh = nets.Learner(nets.build(nets.Dropped, seed=1))
    testing = trainer(folder, api.hawq(**{**CHOSEN, "quantizer": "lsq"})[1])
    tested = testing.test(fresh, nets.loader(32, seed=2, shuffle=False), ckpt_path=last, verbose=False)[0]
    facts.of_metrics(record, tested, "tested")


@run(fast=False)
def two_processes(record: Record, folder: Path) -> None:
    """DDP by gloo: rank 0's numbers; both ranks have the same."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden.processes", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    first_losses, _ = first.pop("training.losses"), second.pop("training.losses")  # each has its own images
    record["processes.both_the_same"] = first == second
    record |= first
    record["training.losses"] = first_losses


@run()
def onnx_outputs(record: Record, folder: Path) -> None:
    """What onnxruntime computes of the exported network, BatchNorm folded."""
    import onnxruntime

    own: Record = {}
    callback, model = fitted(own, folder, epochs=1, pack=False)
    x, _ = nets.images(8, seed=4)
    api.export_onnx(model, callback.plan, x, folder / "model.onnx")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", settings, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    record["onnx.logits"] = facts.array(found)
    record["trained.logits"] = facts.array(facts.outputs(model, x))


@run(fast=False)
def detection(record: Record, folder: Path) -> None:
    """A tiny RetinaNet on drawn miniatures: shared heads, a dict of losses, boxes, mAP."""
    data = api.tiny_coco(
        folder / "coco", classes=2, images=4, val_images=2, pixels=64, num_classes=2, batch_size=2, hflip=False
    )
    seed_everything(3, verbose=False)
    net = api.retinanet(num_classes=2, channels=16, min_size=64, max_size=96, anchor_size=16)
    task, losses = api.detection_task(net, optimizer="sgd", lr=0.002, freeze_batchnorm=True), Losses()
    task.train()  # statistics that follow tiny batches make of every rounding another network
    flat = {**CHOSEN, "images": 4, "max_probes": 4, "estimator": "auto", "draw": "auto", "dirpath": folder}
    flat |= {"weight_bits": (3, 4, 8), "activation_bits": 8, "budget": "6x"}
    callback, callbacks = api.hawq(**flat)
    fitting = trainer(folder, [*callbacks, losses], max_epochs=2)
    fitting.fit(task, data)
    described(record, callback)
    trained(record, task, losses, fitting)
    fresh = api.detection_task(api.retinanet(num_classes=2, channels=16, min_size=64, max_size=96, anchor_size=16))
    loaded = api.packed(task, callback.plan, folder / "model.safetensors", fresh)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    levels = [facts.outputs(m.net.backbone, x)["0"] for m in (task, loaded)]
    record["packed.same_as_trained"] = bool(torch.equal(*levels))
    record["packed.features"] = facts.array(levels[1])


@run(fast=False, shared=True)
def resnet20(record: Record, folder: Path) -> None:
    """The trained ResNet20 on real images: traces by default settings of the estimator, plan, packed accuracy."""
    from PIL import Image

    assert SHARED is not None
    with tarfile.open(SHARED / "cifar10.tar.xz") as archive:  # its first images, without unpacking all
        kept: dict[str, list[torch.Tensor]] = {}
        for member in archive:
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg", ".png")):
                label = member.name.split("/")[-2]
                if len(kept.setdefault(label, [])) < 5:
                    pixels = np.asarray(Image.open(archive.extractfile(member)).convert("RGB"))
                    kept[label].append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)
            if len(kept) == 10 and all(len(v) == 5 for v in kept.values()):
                break
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = torch.stack([(p - mean) / std for label in sorted(kept) for p in kept[label]])
    y = torch.arange(10).repeat_interleave(5)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    net = api.resnet20()
    net.load_state_dict(torch.load(SHARED / "resnet20_cifar10.pt", weights_only=True))
    net.eval()
    data = list(zip(x.split(10), y.split(10)))
    table = api.sites(net, x[:2])
    found = api.measure(
        net, data, nets.cross_entropy, sites=table,
        **{**MEASURED, "estimator": "auto", "draw": "auto", "rtol": 0.2, "max_probes": 16},
    )  # fmt: skip
    facts.of_sensitivity(record, found)
    weighed = api.options(
        net, data, found, table, nets.cross_entropy,
        weight_bits=(2, 3, 4, 8), activation_bits=(4, 8), input_bits=8, codes="auto", quantizer="uniform",
    )  # fmt: skip
    problem = api.problem(table, weighed, found)
    plan = api.find("select")(problem, {"weights": "9x", "bops": "30%"}, "pareto")
    facts.of_plan(record, plan)
    facts.of_frontier(record, api.frontier(problem))
    api.quantize(net, plan)
    record["metrics.right"] = int((facts.outputs(net, x).argmax(1) == y).sum())
    fresh = api.packed(net, plan, folder / "model.safetensors", api.resnet20())
    facts.of_packed(record, fresh, x)
