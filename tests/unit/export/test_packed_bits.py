"""The bit stream against a straightforward big-integer version, and its checks."""

import numpy as np
import pytest
import torch

from hawq_lightning import HawqError
from hawq_lightning.export import pack, unpack
from tests.internals import internal


def as_big_integer(codes: list[int], bits: int) -> bytes:
    total = sum((c + (1 << (bits - 1))) << (i * bits) for i, c in enumerate(codes))
    return total.to_bytes((len(codes) * bits + 7) // 8, "little")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_stream_is_little_endian_and_comes_back(bits: int, count: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (count,), generator=torch.Generator().manual_seed(bits * 1000 + count))
    packed = pack(codes, bits)
    assert packed.tobytes() == as_big_integer(codes.tolist(), bits)
    assert torch.equal(unpack(packed, bits, count), codes.to(torch.int32))


def test_chunks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-4, 4, (3, 7, 11), generator=torch.Generator().manual_seed(0))
    whole = pack(codes, 3)
    monkeypatch.setattr(internal("export._bits"), "_CHUNK", 16)
    assert np.array_equal(pack(codes, 3), whole)
    assert torch.equal(unpack(whole, 3, codes.numel()), codes.reshape(-1).to(torch.int32))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(HawqError, match="1 to 8"):
        pack(torch.zeros(4), bits)


def test_codes_out_of_range() -> None:
    with pytest.raises(HawqError, match="do not fit in 2 bits"):
        pack(torch.tensor([-2, 2]), 2)


def test_unpack_refuses_wrong_sizes() -> None:
    data = pack(torch.tensor([1, -1, 0]), 2)
    with pytest.raises(HawqError, match="take 2 bytes"):
        unpack(data, 2, 5)
    with pytest.raises(HawqError, match="no number of codes"):
        unpack(data, 2, 1 << 50)
    with pytest.raises(HawqError, match="padding"):
        unpack(data | 0x80, 2, 3)
