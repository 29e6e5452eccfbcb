"""Batches are told apart by what they hold, of whatever kind, and distances are to the same batch's float outputs."""

from __future__ import annotations

import array
import collections
import copy
import dataclasses
import datetime
import decimal
import fractions
import itertools
import pathlib
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning.quantization import FloatDistance
from hawq_lightning.sensitivity import batch_digest

LAYOUTS = {
    "coo": {"layout": torch.sparse_coo},
    "csr": {"layout": torch.sparse_csr},
    "csc": {"layout": torch.sparse_csc},
    "bsr": {"layout": torch.sparse_bsr, "blocksize": (2, 3)},
    "bsc": {"layout": torch.sparse_bsc, "blocksize": (4, 2)},
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool)


class Plain:
    def __init__(self, value):
        self.value = value


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class More(Slots):
    """Attributes and slots."""

    def __init__(self, value):
        super().__init__(0)
        self.attribute = value


class Reduced:
    """Written by a way of its own."""

    __slots__ = ("hidden",)

    def __init__(self, value):
        self.hidden = {"deep": [value]}

    def __reduce__(self):
        return Reduced, (self.hidden["deep"][0],)


@dataclasses.dataclass(slots=True, frozen=True)
class Data:
    value: object


@dataclasses.dataclass
class Computed:
    """What matters is no field."""

    number: int

    def __post_init__(self):
        self.values = np.arange(3) + self.number
        self.number = 0


class Listed(list):
    """A list with an attribute."""


def listed(value):
    made = Listed([1, 2])
    made.more = value
    return made


def objects(value):
    made = np.empty(2, dtype=object)
    made[:] = [value, "text"]
    return made


HOLDERS = {
    "plain": Plain, "slots": Slots, "slots below": More, "reduced": Reduced, "data class": Data, "list": lambda v: [v],
    "list with an attribute": listed, "named": lambda v: types.SimpleNamespace(value=v), "ordered":
    lambda v: collections.OrderedDict(a=v), "deque": lambda v: collections.deque([v]), "array of objects": objects,
    "key": lambda v: {("key", v): 1} if isinstance(v, int) else {"key": v},
    "user dict": lambda v: collections.UserDict(a=v),
}  # fmt: skip
LEAVES = {
    "tensor": lambda k: torch.arange(3) + k, "array": lambda k: np.arange(3) + k, "scalar": lambda k: np.float32(k),
    "half": lambda k: np.float16(k), "bytes": lambda k: bytes([k]), "bytearray": lambda k: bytearray([k]),
    "view": lambda k: memoryview(bytes([k])), "set": lambda k: {k, 7}, "frozen set": lambda k: frozenset({str(k)}),
    "complex": lambda k: complex(0, k), "number": lambda k: k, "text": str, "true or false": lambda k: k > 1,
    "date": lambda k: datetime.datetime(2000, 1, 1 + k), "decimal": decimal.Decimal, "fraction":
    lambda k: fractions.Fraction(k, 7), "path": lambda k: pathlib.Path(str(k)), "python array":
    lambda k: array.array("d", [k]), "range": range, "slice": slice, "computed": Computed, "class":
    lambda k: (int, float, str)[k], "type": lambda k: DTYPES[k], "structured": lambda k: np.array([(k, 1.0)], "i4,f8"),
    "long array": lambda k: np.r_[np.zeros(5000), k, np.zeros(5000)], "image": lambda k: Image.new("L", (2, 2), k),
    "day": lambda k: np.datetime64("2000-01-01") + k, "parts of an array": lambda k: (np.arange(12) * k)[::2],
}  # fmt: skip


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("holder", HOLDERS)
def test_other_contents_have_another_hash_and_equal_ones_the_same(holder, leaf):
    def made(k):
        return torch.ones(2), HOLDERS[holder](LEAVES[leaf](k))

    assert len({batch_digest(made(k)) for k in (1, 2)}) == 2
    assert batch_digest(made(1)) == batch_digest(made(1))


def tensors():
    """Pairs of tensors that differ in one value."""
    draw = torch.Generator().manual_seed(0)
    dense = torch.randint(1, 5, (4, 6), generator=draw) * (torch.rand(4, 6, generator=draw) < 0.6)
    other = dense.clone()
    other[tuple(dense.nonzero()[0])] += 1
    for dtype, (name, how) in itertools.product(DTYPES[:5], LAYOUTS.items()):
        yield f"{name} {dtype}", dense.to(dtype).to_sparse(**how), other.to(dtype).to_sparse(**how)
    for dtype in (torch.complex64, torch.complex128):
        values = torch.complex(dense.double(), dense.double() + 1).to(dtype)
        changed = torch.complex(dense.double(), other.double() + 1).to(dtype)
        yield f"conjugate {dtype}", values.conj(), changed.conj()
        yield f"conjugate or not {dtype}", values.conj(), values
        yield f"negative {dtype}", values.conj().imag, changed.conj().imag
        yield f"negative or not {dtype}", values.conj().imag, values.imag
    ragged = [dense[0, :2].float(), dense[1, :3].float()]
    for layout in (torch.strided, torch.jagged):
        changed = [ragged[0], ragged[1] + 1]
        made = [torch.nested.nested_tensor(rows, layout=layout) for rows in (ragged, changed)]
        yield f"nested {layout}", *made
    yield "quantized", *(torch.quantize_per_tensor(x.float(), 0.5, 0, torch.quint8) for x in (dense, other))
    yield "grids", *(torch.quantize_per_tensor(dense.float(), s, 0, torch.qint8) for s in (0.5, 0.25))
    yield "layout", dense.to_sparse(), dense
    yield "needs a gradient", dense.float().requires_grad_(), other.float().requires_grad_()


@pytest.mark.filterwarnings(
    "ignore:Sparse (CSR|CSC|BSR|BSC) tensor", "ignore:The PyTorch API of nested", "ignore:.*quantize"
)
def test_tensors_of_every_layout_have_a_hash_of_their_values():
    for name, one, two in tensors():
        assert batch_digest((one, 1)) != batch_digest((two, 1)), name
        assert batch_digest([one]) == batch_digest([one.detach().clone()]), name


def test_entries_of_a_sparse_tensor_may_be_stored_in_parts():
    twice = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 0]]), torch.tensor([1.0, 2.0, 5.0]), (3,), check_invariants=True
    )
    once = torch.tensor([5.0, 3.0, 0.0]).to_sparse()
    assert batch_digest(twice) == batch_digest(once)


def test_the_order_of_a_set_is_that_of_no_process():
    one, two = {0, 8}, {8, 0}
    assert list(one) != list(two), "as in processes that hash differently"
    assert batch_digest([one]) == batch_digest([two])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Locked:
    """Nobody but its class knows what is in it."""

    __slots__ = ("_get", "lock")

    def __init__(self, value):
        self._get, self.lock = lambda: value, threading.Lock()

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot be pickled")

    @property
    def value(self):
        return self._get()


FORMS = {
    "slots": (Slots, lambda b: b.value), "frozen": (Data, lambda b: b.value), "numpy": (
        lambda x: {"x": x.numpy(), "y": 1}, lambda b: torch.from_numpy(b["x"])),
    "bytes": (lambda x: (x.numpy().tobytes(),), lambda b: torch.tensor(np.frombuffer(b[0], "f4")).reshape(6, 5)),
    "closed": (Locked, lambda b: b.value), "closed, in a list": (lambda x: [1, Locked(x)], lambda b: b[1].value),
    "function": (lambda x: (lambda: x,), lambda b: b[0]()),
    "sparse": (lambda x: [x.to_sparse()], lambda b: b[0].to_dense()),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_distances_are_to_the_same_batchs_outputs(form):
    make, read = FORMS[form]
    draw = torch.Generator().manual_seed(3)
    y = torch.arange(6) % 3
    plain = [torch.randn(6, 5, generator=draw) for _ in range(4)]
    batches = [make(x) for x in plain]
    net = Net().eval()

    def loss(model, batch):
        return F.cross_entropy(model(read(batch)), y)

    target = FloatDistance(net, batches, loss)
    expected = FloatDistance(net, plain, lambda m, x: F.cross_entropy(m(x), y))
    assert [float(target(net, b)) for b in batches] == [0.0] * 4
    moved = copy.deepcopy(net)
    nn.init.normal_(moved.b.weight)
    assert [float(target(moved, b)) for b in batches] == [float(expected(moved, x)) for x in plain]
    with pytest.raises(hl.HawqError, match="none of those") as raised:
        target(net, make(plain[0] + 1))
    assert ("(Locked)" in str(raised.value)) == form.startswith("closed")
    assert ("(function)" in str(raised.value)) == (form == "function")
