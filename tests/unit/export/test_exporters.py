"""The registry of exporters: one verb, needs and limits checked before anything is written, a user's own format."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, Plan, PlanSite, load_packed, sites
from hawq_lightning.export import EXPORTERS, export, register_exporter
from hawq_lightning.quantization import quantize, quantizer_named, with_quantizer
from tests.unit.export.test_packed import random_plan


def network(quantizer: str = "uniform") -> tuple[nn.Module, Plan, torch.Tensor]:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval(), torch.rand(4, 6)
    table = sites(net, x)
    low = [PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 4, "affine", 0.1, 0) for s in table.activations]
    plan = Plan((*random_plan(table, 1).weights, *low), table.layers)
    plan = with_quantizer(plan, quantizer_named(quantizer))
    return quantize(net, plan), plan, x


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.9 reading its own file
def test_what_comes_with_the_package_writes_the_same_network(tmp_path: Path) -> None:
    net, plan, x = network()
    assert {"packed", "onnx", "program"} <= set(EXPORTERS)
    size = export(net, plan, tmp_path / "m.safetensors", "packed")
    assert size == (tmp_path / "m.safetensors").stat().st_size
    fresh = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    assert torch.equal(load_packed(tmp_path / "m.safetensors", fresh)(x), net(x))
    export(net, None, tmp_path / "m.pt2", "program", example_input=x)
    assert torch.allclose(torch.export.load(tmp_path / "m.pt2").module()(x), net(x), atol=1e-6)
    pytest.importorskip("onnxruntime")
    export(net, plan, tmp_path / "m.onnx", example_input=x, exact=True)
    verify = EXPORTERS["onnx"].verify
    assert verify is not None and verify(net, tmp_path / "m.onnx", [x], None).to_dict()["same_top1"] == len(x)


def test_what_a_format_lacks_is_told_before_anything_is_written(tmp_path: Path) -> None:
    net, plan, x = network("lq_nets")
    path = tmp_path / "folder" / "m"
    for name in ("onnx", "program"):
        with pytest.raises(HawqError, match=f"'codebook', which '{name}' cannot express; it has affine, midrise"):
            export(net, plan, path, name, example_input=x)
    export(net, plan, tmp_path / "m.safetensors", "packed")  # it has every code format
    even, even_plan, _ = network()
    for make, message in (
        (lambda: export(even, even_plan, path, "onx", example_input=x), "no exporter 'onx'.*Did you mean 'onnx'"),
        (lambda: export(even, even_plan, path, "program"), "follows a forward pass: pass example_input"),
        (lambda: export(nn.Linear(2, 2), None, path, "packed"), "no enabled quantizer"),
    ):
        with pytest.raises(HawqError, match=message):
            make()
    assert not path.parent.exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, plan, x = network()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(HawqError, match=r"onnxscript.*hawq-lightning\[export\]"):
        export(net, plan, tmp_path / "m.onnx", example_input=x)


def test_a_users_own_exporter(tmp_path: Path) -> None:
    @register_exporter("test_table", suffix=".table", code_formats=("affine",), needs_example=False)
    def write_table(model, plan, path, example_input, /, **options):
        path.write_text(json.dumps(plan.bits | options))
        return len(plan.sites)

    try:
        net, plan, _ = network("int_only")
        with pytest.raises(HawqError, match="'midrise', which 'test_table' cannot express"):
            one_bit = tuple(PlanSite(**{**vars(s), "bits": 1, "code": "midrise"}) for s in plan.weights)
            export(quantize(net, plan.replace(sites=one_bit)), None, tmp_path / "t", "test_table")
        net, plan, _ = network("int_only")
        affine = tuple(PlanSite(**{**vars(s), "bits": 4, "code": "affine"}) for s in plan.weights)
        plan = plan.replace(sites=affine)
        assert export(quantize(net, plan), plan, tmp_path / "t", "test_table", extra=True) == 2
        assert json.loads((tmp_path / "t").read_text()) == {**plan.bits, "extra": True}
        with pytest.raises(HawqError, match="suffix '.table' of exporter 'other' is that of 'test_table'"):
            register_exporter("other", suffix=".table")
        with pytest.raises(HawqError, match="it starts with a dot"):
            register_exporter("other", suffix="table")
    finally:
        EXPORTERS._entries.pop("test_table")
