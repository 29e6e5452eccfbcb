"""Packed files of versions 1 to 3, written by release 0.1.0, still load to the same network."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hawq_lightning import HawqError
from hawq_lightning.export import load_packed, read_packed, save_packed
from hawq_lightning.quantization import plan_of, quantized_layers
from tests.internals import internal
from tests.unit.export.old_network import Small, images

FILES = Path(__file__).parent / "files"
OLD = ["version_1_uniform", "version_2_int_only", "version_3_lq_nets"]


@pytest.mark.parametrize("name", OLD)
def test_the_same_codes_weights_and_outputs(name: str, tmp_path: Path) -> None:
    expected = load_file(FILES / f"{name}.expected.safetensors")
    net = load_packed(FILES / f"{name}.safetensors", Small()).eval()
    again = tmp_path / "again.safetensors"
    save_packed(net, plan_of(net), again)  # and as a file of this release
    for network in (net, load_packed(again, Small()).eval()):
        for layer_name, layer in quantized_layers(network).items():
            quantizer = layer.weight_quantizer
            assert torch.equal(quantizer.codes(layer.weight), expected[f"{layer_name}.codes"].int())
            assert torch.equal(quantizer.eval_weight(layer.weight), expected[f"{layer_name}.quantized"])
        assert torch.allclose(network(images()), expected["y"], rtol=1e-5, atol=1e-6)


def test_what_each_version_brought() -> None:
    zero_points = [s.storage.tensors["zero_point"] for s in read_packed(FILES / f"{OLD[1]}.safetensors").weights]
    assert any(bool(z) for z in zero_points)
    file = read_packed(FILES / f"{OLD[2]}.safetensors")
    assert file.plan.quantizer == "lq_nets" and {s.site.code for s in file.weights} == {"codebook"}
    learned = [s for s in file.sites if s.site.kind == "activation" and "basis" in s.storage.tensors]
    assert learned and all(bool(s.storage.tensors["basis"].any()) for s in learned)


@pytest.mark.parametrize("name", OLD)
def test_damage_is_always_noticed(name: str, tmp_path: Path) -> None:
    good, generator = (FILES / f"{name}.safetensors").read_bytes(), torch.Generator().manual_seed(0)
    for place in range(0, len(good), 3):
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(HawqError):
            read_packed(tmp_path / "bad")
    for length in (0, 9, len(good) // 2, len(good) - 1):
        (tmp_path / "bad").write_bytes(good[:length])
        with pytest.raises(HawqError, match="corrupt"):
            read_packed(tmp_path / "bad")


@pytest.mark.parametrize("text", ["", "AAAA", "!!"])
def test_a_damaged_index(text: str) -> None:
    with pytest.raises(ValueError):
        internal("export._packed_v3")._inflated(text)


def test_an_inflating_index_is_bounded() -> None:
    import base64
    import zlib

    bomb = base64.b64encode(zlib.compress(b"[" * (1 << 27), 9)).decode()
    with pytest.raises(ValueError, match="too long"):
        internal("export._packed_v3")._inflated(bomb)
