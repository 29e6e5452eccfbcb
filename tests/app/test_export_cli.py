"""``hawq-lightning-export`` on a real run folder, its table in the selector, and its errors."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning import HawqError, Plan, Problem, candidates, measure, select, sites
from hawq_lightning.cli import CalibrationBatches, Images, explain, export_run, uniform, write_onnx
from hawq_lightning.export import network_of
from hawq_lightning.export.onnx import layer_latencies, measure_file, write_table
from hawq_lightning.models import resnet20
from hawq_lightning.selection import LatencyTable
from tests.console import shell
from tests.unit.export.test_folding import enabled
from tests.unit.export.test_packed import enable, random_plan

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
BIN = Path(sys.executable).parent
FAST = ["debug=fast", "model.depth=8", "model.channels=4", "trainer=cpu", "logger=none", "report=false",
        "measure.forecast=null"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("export")
    done = shell("hawq-lightning", *FAST, "onnx=true", f"hydra.run.dir={base / 'run'}", cwd=base)
    assert done.returncode == 0, done.stderr
    assert "model.onnx: " in done.stdout and "images (" in done.stdout
    assert json.loads((base / "run" / "export.json").read_text())["agreement"]["images"] > 0
    return base / "run"


@pytest.mark.stress
def test_a_run_is_exported_compared_and_measured(folder, tmp_path):
    command = [
        BIN / "hawq-lightning-export", f"run_folder={folder}", "images=100", "seconds=0.05", "batch_size=4",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "only the run folder is written to"
    for words in ("float", "uniform 8", "plan", "activation codes flipped", "threads=1"):
        assert words in done.stdout
    record = json.loads((folder / "export.json").read_text())
    assert record["agreement"]["images"] == 100 and record["agreement"]["same_top1"] >= 99
    assert record["folded"] == 7 and record["not_folded"] == {}
    speed = record["speed"]
    assert speed["plan"]["file_bytes"] == (folder / "model.onnx").stat().st_size
    assert speed["plan"]["file_bytes"] < speed["float"]["file_bytes"]
    for s in speed.values():
        assert 0 < s["ms"] < 1000 and s["images_per_second"] > 0 and 0 < s["peak_bytes"] < 1e9
        assert 0 < s["gzip_bytes"] < s["file_bytes"] * 1.01
    run = torch.export.load(folder / "model.pt2")
    assert run.module()(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    plan = Plan.load(folder / "plan.json")
    with (folder / "latency.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {f"{r['layer']}.weight" for r in rows} == {s.name for s in plan.weights}, "the run's own names"


@pytest.mark.stress
def test_deep_compression_is_a_run_and_a_huffman_file(tmp_path):
    asked = ["quantizer=kmeans", "quantizer.weight_bits=3", "quantizer.activation_bits=null", "select=uniform"]
    done = shell("hawq-lightning", *FAST, *asked, "select.budget=10x", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0 and "at 3 bit" in done.stdout + done.stderr, done.stderr
    done = shell("hawq-lightning-export", "run_folder=run", "onnx=false", "formats=[huffman]", cwd=tmp_path)
    assert done.returncode == 0 and "the same state, bit for bit" in done.stdout, done.stderr
    record = json.loads((tmp_path / "run" / "export.json").read_text())
    verified = record["verified"]["model.huffman.safetensors"]
    assert verified["same_state"] and verified["mean_bits"] < 3.2
    assert record["files"]["model.huffman.safetensors"] == verified["file_bytes"]


@pytest.mark.stress
def test_a_quantizer_of_ones_own_is_imported_again(tmp_path):
    (tmp_path / "halving.py").write_text(
        "from hawq_lightning.quantization import WeightQuantizer, register_quantizer\n\n\n"
        "@register_quantizer('halving_steps')\nclass Halving(WeightQuantizer):\n"
        "    def fit(self, weight, bits, code):\n"
        "        super().fit(weight, bits, code)\n"
        "        self.enable(bits, self.scale.log2().ceil().exp2(), float(self.zero_point))\n"
        "        return float((self(weight) - weight).square().sum())\n"
    )
    own = ["imports=[halving.py]", "quantizer.name=halving_steps"]
    done = shell("hawq-lightning", *FAST, *own, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = ["run_folder=run", "images=32", "speed=false", "table=false"]
    done = shell("hawq-lightning-export", *asked, cwd=tmp_path)
    assert done.returncode == 1 and "if you trust it, name it, imports=[halving.py]" in done.stderr
    done = shell("hawq-lightning-export", *asked, "imports=[halving.py]", cwd=tmp_path)
    assert done.returncode == 0 and "images (" in done.stdout, done.stderr


@pytest.mark.stress
def test_what_failed_to_export_is_exported_by_the_same_command(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    for name in ("model.onnx", "export.json"):
        (tmp_path / "run" / name).unlink()
    done = shell("hawq-lightning", *FAST, "onnx=true", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0 and "finished already" in done.stdout, done.stderr
    assert (tmp_path / "run" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


def test_a_run_reads_the_latency_table_that_an_export_wrote(folder, tmp_path):
    path = tmp_path / "latency.csv"
    plan = Plan.load(folder / "plan.json")
    layers = [x.name for x in plan.layers]
    rows = [{"layer": n, "weight_bits": b, "activation_bits": 8, "ms": b} for n in layers for b in (2, 4, 8)]
    write_table(rows, path)
    limit = 3 * len(layers)
    done = shell(
        "hawq-lightning-analyze", *FAST, f"select.latency={path}", f"select.budget={{latency: {limit}ms}}",
        f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    chosen = Plan.load(tmp_path / "run" / "plan.json")
    assert chosen.costs["latency_ms"] == sum(s.bits for s in chosen.weights) <= limit
    assert len({s.bits for s in chosen.weights}) > 1


def test_a_latency_budget_needs_its_table():
    from hawq_lightning import HAWQ, SelectConfig

    with pytest.raises(HawqError, match="latency=latency.csv"):
        HAWQ(budget={"latency": "3ms"})
    with pytest.raises(HawqError, match="nowhere.csv cannot be read"):
        HAWQ(select=SelectConfig({"latency": "3ms"}, latency="nowhere.csv"))


def test_layers_that_read_float_have_one_latency_for_all_activations():
    net, x, plan = enabled(0)
    alone = plan.replace(sites=plan.weights)
    rows = layer_latencies(net, alone, (x,))
    assert {r["activation_bits"] for r in rows} == {None} and all(r["ms"] > 0 for r in rows)
    layer = next(n for n in plan.layers if n.name == rows[0]["layer"])
    table = LatencyTable(rows)
    assert table.ms(layer, plan.weights[0].shape, rows[0]["weight_bits"], 32) == rows[0]["ms"]


def test_the_table_is_what_the_selector_reads(tmp_path):
    torch.manual_seed(0)
    net, x = resnet20(channels=4, depth=8).eval(), torch.randn(4, 3, 16, 16)
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    table = sites(net, x)
    traces = measure(net, [x], loss, sites=table, rtol=9, progress=False)
    found = candidates(net, [x], traces, table, loss)
    plan = select(Problem(table, found, traces), "8x")
    rows = layer_latencies(net, plan, (x[:1],))
    assert {r["weight_bits"] for r in rows} == {2, 4, 8} and all(r["ms"] > 0 for r in rows)
    write_table(rows, tmp_path / "latency.csv")
    latency = LatencyTable.load(tmp_path / "latency.csv")
    for layer in table.layers:
        shape = table[layer.weight].shape
        expected = next(r["ms"] for r in rows if r["layer"] == layer.name and r["weight_bits"] == 4)
        assert latency.ms(layer, shape, 4, 8) == pytest.approx(expected)
    problem = Problem(table, found, traces, latency=latency)
    slowest = sum(max(r["ms"] for r in rows if r["layer"] == n.name) for n in table.layers)
    chosen = select(problem, {"latency": f"{slowest}ms"})
    assert chosen.costs["latency_ms"] <= slowest


def test_every_kind_of_layer_has_a_latency():
    net, x, plan = enabled(0)
    rows = layer_latencies(net, plan, (x,), weight_bits=(1, 3))
    assert {r["layer"] for r in rows} == {n for s in plan.weights for n in s.layers}
    assert all(r["ms"] > 0 for r in rows)


def test_uniform_keeps_sites_and_ranges():
    net = resnet20(channels=4, depth=8).eval()
    plan = random_plan(sites(net, torch.randn(1, 3, 8, 8)), 0)
    even = uniform(plan, 8)
    assert {s.bits for s in even.sites} == {8} and [s.name for s in even.sites] == [s.name for s in plan.sites]
    for before, after in zip(plan.activations, even.activations):
        assert after.scale * 255 == pytest.approx(before.scale * (2**before.bits - 1))
        assert 0 <= after.zero_point <= 255
    enable(net, even)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run_folder=/nowhere"], "There is no run at /nowhere"),
        ([], "run_folder is not set"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, words):
    done = shell("hawq-lightning-export", *arguments, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert words in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"), [("images", -1), ("images", "many"), ("threads", 0), ("batch_size", 0), ("seconds", -1.0),
                       ("free_batch", 2)]
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_before_anything_is_read(tmp_path, key, value):
    good = {"images": 9, "threads": 1, "batch_size": 2, "seconds": 0.1, "run_folder": str(tmp_path)}
    with pytest.raises(HawqError, match=f"{key}={value!r} must be"):
        export_run(OmegaConf.create(good | {key: value}))


def test_what_is_in_the_way_is_found_before_anything_is_written(folder, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    (copied / "export.json").unlink(missing_ok=True)
    (copied / "export.json").mkdir()
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    settings = {"images": 0, "threads": 1, "batch_size": 2, "seconds": 0.1, "run_folder": str(copied)}
    with pytest.raises(HawqError, match="export.json: it is a folder"):
        export_run(OmegaConf.create(settings | {"data_root": None}))
    with pytest.raises(HawqError, match="not read from a folder"):
        export_run(OmegaConf.create(settings | {"data_root": "/nowhere"}))
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == before


def test_an_error_of_the_disk_is_one_line(tmp_path):
    from hawq_lightning.report import write_text

    (tmp_path / "a.json").mkdir()
    with pytest.raises(HawqError, match=r"Cannot write .*a\.json: Is a directory\."):
        write_text(tmp_path / "a.json", "{}")
    with pytest.raises(OSError) as caught:
        (tmp_path / "a.json").read_text()
    assert explain(caught.value) == f"{tmp_path / 'a.json'}: Is a directory."
    assert explain(OSError("no file")) is None


def test_damaged_runs_are_one_line(folder, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    (copied / "model.safetensors").write_bytes((copied / "model.safetensors").read_bytes()[:-9])
    before = {p.name for p in copied.iterdir()}
    done = shell("hawq-lightning-export", f"run_folder={copied}", cwd=tmp_path)
    assert done.returncode == 1 and "corrupt" in done.stderr and "Traceback" not in done.stderr
    assert {p.name for p in copied.iterdir()} == before


def test_a_run_folder_of_0_1_0_names_modules_that_are_private_now(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    settings = OmegaConf.load(tmp_path / "run" / ".hydra" / "config.yaml")
    settings.model._target_ = "hawq_lightning.models.resnet20.resnet20"
    settings.data._target_ = "hawq_lightning.data.digits.DigitsDataModule"
    OmegaConf.save(settings, tmp_path / "run" / ".hydra" / "config.yaml")
    for name in ("model.onnx", "export.json"):
        (tmp_path / "run" / name).unlink()
    with initialize_config_module("hawq_lightning.conf", version_base="1.3"):
        few = ["images=8", "speed=false", "table=false", "formats=[]"]
        export_run(compose("export", [f"run_folder={tmp_path / 'run'}", *few]))
    assert (tmp_path / "run" / "model.onnx").is_file()


def test_a_package_that_is_not_there_is_one_line():
    assert explain(ModuleNotFoundError("No module named 'jinja2'", name="jinja2")) == (
        "No module named 'jinja2': pip install it, or hawq-lightning with its extra."
    )


def without_onnxruntime():
    sys.modules["onnxruntime"] = None


def test_a_missing_extra_is_known_before_the_training(tmp_path):
    arguments = [*FAST, "onnx=true", f"hydra.run.dir={tmp_path / 'run'}"]
    done = shell("hawq-lightning", *arguments, cwd=tmp_path, before=without_onnxruntime)
    assert done.returncode == 1 and "hawq-lightning[export]" in done.stderr
    assert not (tmp_path / "run" / "plan.json").exists()


def test_files_that_are_no_network_cannot_be_measured(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no")
    with pytest.raises(HawqError, match="onnxruntime cannot run"):
        measure_file(tmp_path / "a.onnx", (3, 8, 8))


def test_grids_are_made_on_training_images_each_time_the_same(capsys):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.arange(40.0)[:, None]), 16, shuffle=True)

    state = torch.get_rng_state()
    batches = CalibrationBatches(Data(), [])
    first, again = ([b[0] for b in batches] for _ in range(2))
    assert len(first) == 3 and all(map(torch.equal, first, again)) and torch.equal(state, torch.get_rng_state())
    assert not capsys.readouterr().out
    own = [(torch.zeros(2, 1),)]
    assert list(CalibrationBatches(LightningDataModule(), own)) == own
    assert "made on validation images" in capsys.readouterr().out


@pytest.mark.stress
def test_a_detector_is_exported_without_its_surroundings(tmp_path):
    pytest.importorskip("torchvision")
    from hawq_lightning.models import retinanet_resnet18

    torch.manual_seed(0)
    net = retinanet_resnet18(3, channels=16, min_size=64, max_size=96).eval()
    batch = ([torch.rand(3, 60, 80), torch.rand(3, 64, 64)], [{}, {}])
    images = Images(net, [batch]).first()
    plan = random_plan(sites(network_of(net), images), 1)
    enable(net, plan)
    task = nn.Module()
    task.net = net
    record = write_onnx(tmp_path, task, plan, [batch])
    assert record["agreement"]["same_top1"] is None and record["agreement"]["codes"] > 0
    names = [o.name for o in onnx.load(str(tmp_path / "model.onnx")).graph.output]
    assert names == ["scores", "boxes"]
    with pytest.raises(HawqError, match="validation data is empty"):
        write_onnx(tmp_path, task, plan, [])
