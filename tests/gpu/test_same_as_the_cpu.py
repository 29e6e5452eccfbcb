"""Traces, plans, codes and exported files of a device are those of the CPU."""

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors import safe_open

import hawq_lightning as hl
from hawq_lightning.quantization import quantizer_named, with_quantizer
from tests.gpu.networks import Task, accelerator, batches, hawq, images, loader, loss_fn, measured, trained


@pytest.fixture(scope="module")
def reference():
    return measured(trained(), batches())


def test_traces_and_plan(device, reference):
    traces, plan = measured(trained().to(device), batches(device))
    expected, wanted = reference
    for mine, theirs in zip(traces, expected):
        assert mine.name == theirs.name and mine.trace == pytest.approx(theirs.trace, rel=1e-3, abs=1e-9)
    same = [s.bits for s in plan.sites] == [s.bits for s in wanted.sites]
    omega = [sum(s.omega or 0.0 for s in p.sites) for p in (plan, wanted)]
    assert same or omega[0] == pytest.approx(omega[1], rel=1e-3)


@pytest.mark.parametrize("estimator", ["ggn", "hessian", "hutchinson"])
def test_every_estimator(device, estimator):
    first, second = (
        hl.measure(trained().to(d), batches(d), loss_fn, estimator=estimator, rtol=0.5, max_probes=20, progress=False)
        for d in ("cpu", device)
    )
    for mine, theirs in zip(second, first):
        assert mine.trace == pytest.approx(theirs.trace, rel=1e-3, abs=1e-6), mine.name


@pytest.mark.parametrize("quantizer", ["uniform", "lsq", "pact", "dorefa", "int_only", "lq_nets"])
def test_codes_of_equal_weights_and_plan(device, reference, tmp_path, quantizer):
    plan = with_quantizer(reference[1], quantizer_named(quantizer))
    files = []
    for place in ("cpu", device):
        net = trained().to(place)
        hl.quantize(net, plan)
        files.append(tmp_path / f"{len(files)}.safetensors")
        hl.save_packed(net, plan, files[-1])
    first, second = (contents(f) for f in files)
    assert first.keys() == second.keys() and len(first) > 10
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    again = hl.load_packed(files[1], trained().to(device)).eval()
    x = images()[0].to(device)
    assert torch.equal(again(x), net.eval()(x))


def contents(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict


def test_the_whole_way_in_a_trainer_and_an_onnx_file(device, tmp_path):
    pytest.importorskip("onnxruntime")
    callback, task = hawq(), Task()
    Trainer(max_epochs=2, callbacks=[callback], **accelerator(device)).fit(task, loader())
    assert len({s.bits for s in callback.plan.weights}) > 1
    task = task.to(device).eval()
    hl.save_packed(task, callback.plan, tmp_path / "model.safetensors")
    loaded = hl.load_packed(tmp_path / "model.safetensors", Task().to(device)).eval()
    x = images()[0]
    with torch.no_grad():
        assert torch.equal(loaded(x.to(device)), task(x.to(device)))
    files = hl.export.to_onnx(task, callback.plan, x[:2].to(device), tmp_path / "model.onnx")
    assert next(task.parameters()).device.type == device and (tmp_path / "model.onnx").is_file(), files
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        classes = task(x.to(device)).argmax(1).cpu()
    assert (torch.from_numpy(out).argmax(1) == classes).float().mean() > 0.9
