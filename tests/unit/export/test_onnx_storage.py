"""Codes of every width lie packed in the file and give the same outputs however they lie."""

import numpy as np
import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, quantize
from hawq_lightning.export import compare, to_onnx
from hawq_lightning.export.onnx import session
from tests.unit.export.test_onnx import Widths, initializers, planned

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def widths(channels: int, count: int) -> Widths:
    torch.manual_seed(0)
    net = Widths()
    net.layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(count))
    return net.eval()


@pytest.mark.stress
@pytest.mark.parametrize("code", ["affine", "midrise"])
def test_every_width_is_packed_and_gives_the_same_outputs(tmp_path, code):
    first = 2 if code == "affine" else 1
    net, x = widths(43, 9 - first), torch.randn(2, 43, 4, 4)  # 43 * 43 * 9 codes fill no byte at the end
    plan = planned(net, x, code, lambda i: i + first)
    quantize(net, plan)
    found, sizes = {}, {}
    for storage in ("lookup", "int8", "native"):
        path = tmp_path / f"{storage}.onnx"
        to_onnx(net, plan, x, path, storage=storage)
        sizes[storage] = path.stat().st_size
        found[storage] = session(path).run(None, {"input": x.numpy()})[0]
    assert all(np.array_equal(y, found["int8"]) for y in found.values())
    assert max(sizes["lookup"], sizes["native"]) < sizes["int8"]
    assert compare(net, tmp_path / "lookup.onnx", [x]).difference < 1e-5
    proto = onnx.load(str(tmp_path / "lookup.onnx"))
    onnx.checker.check_model(proto, full_check=True)
    held = initializers(tmp_path / "lookup.onnx")
    kinds = {onnx.TensorProto.DataType.Name(t.data_type) for t in held.values()}
    assert kinds <= {"UINT8", "INT8", "INT32", "INT64", "FLOAT"}
    numel = 43 * 43 * 9
    for i in range(9 - first):
        name, bits = f"layers.{i}.weight_quantizer.codes", i + first
        taken = sum(len(held[n].raw_data) for n in (name, f"{name}.packed", f"{name}.high") if n in held)
        # few layers: tables of six bits do not pay here
        assert taken <= -(-numel * {7: 8, 6: 8}.get(bits, bits) // 8) + 8, (bits, taken)


def test_three_bits_take_three_bits_and_give_the_networks_outputs(tmp_path):
    net, x = widths(43, 2), torch.randn(2, 43, 4, 4)  # 43 * 43 * 9 codes fill no byte at the end
    plan = planned(net, x, "affine", lambda i: 3)
    to_onnx(quantize(net, plan), plan, x, tmp_path / "a.onnx")
    held = initializers(tmp_path / "a.onnx")
    taken = [len(held[f"layers.1.weight_quantizer.codes.{n}"].raw_data) for n in ("packed", "high")]
    assert sum(taken) <= 43 * 43 * 9 * 3 / 8 + 8
    assert compare(net, tmp_path / "a.onnx", [x]).difference < 1e-5


def test_a_table_that_takes_more_than_it_saves_is_left_out(tmp_path):
    net, x = widths(3, 2), torch.randn(2, 3, 4, 4)
    plan = planned(net, x, "affine", lambda i: 3)
    to_onnx(quantize(net, plan), plan, x, tmp_path / "a.onnx")
    assert not any(n.endswith(".packed") for n in initializers(tmp_path / "a.onnx"))


def test_another_storage_is_named(tmp_path):
    net, x = widths(3, 2), torch.randn(2, 3, 4, 4)
    plan = planned(net, x, "affine", lambda i: 3)
    with pytest.raises(HawqError, match="storage='int2' is none of lookup, int8, native"):
        to_onnx(quantize(net, plan), plan, x, tmp_path / "a.onnx", storage="int2")
