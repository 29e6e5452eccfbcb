"""Data of every kind through the Trainer: other batch axes, graphs, own classes, tensor subclasses, ragged, masked."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hawq_lightning import HAWQ, HawqError, MeasureConfig
from hawq_lightning.sensitivity import batch_images
from tests.cases import dense_weight_traces
from tests.trainers import trainer

SAMPLES, BATCH, TIME, WIDTH, CLASSES = 8, 4, 3, 3, 2


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def classes(*shape: int, count: int = CLASSES) -> torch.Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(7 + sum(shape)))


class Net(LightningModule):
    """Two layers; the step and the data are what each kind is about."""

    def __init__(self, step, layers=None) -> None:
        super().__init__()
        self.net = layers or nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, CLASSES))
        self.step = step

    def training_step(self, batch, batch_idx=0):
        return self.step(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def loader(collate) -> DataLoader:
    return DataLoader(range(SAMPLES), BATCH, collate_fn=collate)


# a batch axis that is not the first
X, Y, Y_OF_STEPS = numbers(SAMPLES, TIME, WIDTH), classes(SAMPLES), classes(SAMPLES, TIME)
TIME_FIRST = {
    "mean over time": (
        lambda net, b: F.cross_entropy(net(b[0]).mean(0), b[1]), lambda ids: (X[ids].transpose(0, 1), Y[ids]),
    ),
    "every step": (
        lambda net, b: F.cross_entropy(net(b["x"]).flatten(0, 1), b["y"].flatten()),
        lambda ids: {"x": X[ids].transpose(0, 1), "y": Y_OF_STEPS[ids].t()},
    ),
    "as many steps as sentences": (
        lambda net, b: F.cross_entropy(net(b[0]).amax(0), b[1]),
        lambda ids: (torch.cat([X[ids], X[ids][:, :1]], 1).transpose(0, 1), Y[ids]),
    ),
}  # fmt: skip


# graphs
class Graphs:
    """Several graphs in one, as torch_geometric has them."""

    def __init__(self, x, edges, of, y, count) -> None:
        self.x, self.edges, self.of, self.y, self.num_graphs = x, edges, of, y, count

    def _all(self, f):
        return type(self)(f(self.x), f(self.edges), f(self.of), f(self.y), self._count())

    def _count(self):
        return self.num_graphs

    def to(self, device, **_):
        return self._all(lambda t: t.to(device))

    def clone(self):
        return self._all(torch.clone)


class DglGraphs(Graphs):
    """The number is called otherwise."""

    def __init__(self, x, edges, of, y, count) -> None:
        self.x, self.edges, self.of, self.y, self.batch_size = x, edges, of, y, count

    def _count(self):
        return self.batch_size


def joined(kind, ids, of_nodes=False):
    sizes = [2 + i % 3 for i in ids]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    x = torch.cat([numbers(n, WIDTH) * (1 + i) for i, n in zip(ids, sizes)])
    edges = torch.cat([torch.stack([torch.arange(n), torch.arange(n).roll(1)]) + o for n, o in zip(sizes, offsets)], 1)
    of = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor(sizes))
    return kind(x, edges, of, classes(len(x)) if of_nodes else Y[ids], len(ids))


def neighbours(net, g):
    hidden = torch.relu(net[0](g.x))
    return net[2](hidden.index_add(0, g.edges[1], hidden[g.edges[0]]))


def pooled(net, g, count):
    return torch.zeros(count, CLASSES).index_add(0, g.of, neighbours(net, g))


GRAPHS = {
    "of graphs": (
        lambda net, g: F.cross_entropy(pooled(net, g, g.num_graphs), g.y), lambda ids: joined(Graphs, ids),
    ),
    "of nodes": (
        lambda net, g: F.cross_entropy(neighbours(net, g), g.y), lambda ids: joined(DglGraphs, ids, of_nodes=True),
    ),
    "beside targets": (
        lambda net, b: F.cross_entropy(pooled(net, b[1], len(b[2])), b[2]),
        lambda ids: ("name", joined(DglGraphs, ids), Y[ids]),
    ),
}  # fmt: skip


# classes of the user's own
class Rows:
    def __init__(self, x, y) -> None:
        self.x, self.y = x, y


class Slots:
    __slots__ = ("pair",)

    def __init__(self, x, y) -> None:
        self.pair = (x, y)


FLAT = X[:, 0]
OWN = {
    "attributes": (
        lambda net, b: F.cross_entropy(net(b.x), b.y), lambda ids: Rows(FLAT[ids], Y[ids]), lambda b: len(b.y),
    ),
    "slots": (
        lambda net, b: F.cross_entropy(net(b.pair[0]), b.pair[1]), lambda ids: Slots(FLAT[ids], Y[ids]),
        lambda b: len(b.pair[1]),
    ),
    "in a tuple": (
        lambda net, b: F.cross_entropy(net(b[1].x), b[1].y), lambda ids: ("text", Rows(FLAT[ids], Y[ids])),
        lambda b: len(b[1].y),
    ),
}  # fmt: skip


# tensor subclasses
class Meta(torch.Tensor):
    """Keeps metadata, and refuses slices with a step, as MONAI's refuses those of batches without metadata."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__ and isinstance(args[1], slice) and args[1].step not in (None, 1):
            raise ValueError("inconsistent metadata")
        out = super().__torch_function__(func, types, args, kwargs or {})
        if type(out) is torch.Tensor:
            out = out.as_subclass(cls)
        if isinstance(out, cls):
            out.meta = next((a.meta for a in args if hasattr(a, "meta")), None)
        return out


def meta(x: torch.Tensor) -> Meta:
    out = x.as_subclass(Meta)
    out.meta = {"spacing": 1.0}
    return out


IMAGES, MASKS = numbers(SAMPLES, 1, 4, 4), classes(SAMPLES, 4, 4)


def convolutions():
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, CLASSES, 1))


def with_meta(net, x):
    assert x.meta is not None  # the module's own code may ask for it
    return net(x)


SUBCLASSES = {
    "images": (
        lambda net, b: F.cross_entropy(with_meta(net, b["image"]), b["label"].long()),
        lambda ids: {"image": meta(IMAGES[ids]), "label": meta(MASKS[ids].float())},
    ),
    "inputs alone": (lambda net, b: F.cross_entropy(net(b[0]), b[1]), lambda ids: (meta(IMAGES[ids]), MASKS[ids])),
    "targets alone": (
        lambda net, b: F.cross_entropy(net(b[0]), b[1].long()), lambda ids: (IMAGES[ids], meta(MASKS[ids].float())),
    ),
}  # fmt: skip


# sequences of several lengths
RAGGED_ROWS = [X[i, : 1 + i % TIME] for i in range(SAMPLES)]


def mean_of_packed(net, packed):
    padded, lengths = nn.utils.rnn.pad_packed_sequence(packed._replace(data=net(packed.data)), batch_first=True)
    return padded.sum(1) / lengths[:, None]


RAGGED = {
    "lists": (
        lambda net, b: F.cross_entropy(torch.stack([net(x).mean(0) for x in b[0]]), b[1]),
        lambda ids: ([RAGGED_ROWS[i] for i in ids], Y[ids]),
    ),
    "dicts in a list": (
        lambda net, b: torch.stack([F.cross_entropy(net(r["x"]).mean(0), r["y"]) for r in b]).mean(),
        lambda ids: [{"x": RAGGED_ROWS[i], "y": Y[i]} for i in ids],
    ),
    "packed": (
        lambda net, b: F.cross_entropy(mean_of_packed(net, b[0]), b[1]),
        lambda ids: (nn.utils.rnn.pack_sequence([RAGGED_ROWS[i] for i in ids], enforce_sorted=False), Y[ids]),
    ),
}  # fmt: skip

# losses of tokens and pixels, some of which do not count
HIDDEN = Y_OF_STEPS.masked_fill(numbers(SAMPLES, TIME) > 0.3, -100)
LENGTHS = torch.arange(SAMPLES) % TIME + 1


def by_padding(net, b):
    x, y, lengths = b
    counts = (torch.arange(TIME) < lengths[:, None]).float()
    losses = F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="none").view_as(counts)
    return (losses * counts).sum() / counts.sum()


MASKED = {
    "tokens": (
        lambda net, b: F.cross_entropy(net(b[0]).flatten(0, 1), b[1].flatten()), lambda ids: (X[ids], HIDDEN[ids]),
    ),
    "padding": (by_padding, lambda ids: (X[ids], Y_OF_STEPS[ids], LENGTHS[ids])),
    "pixels": (
        lambda net, b: F.cross_entropy(net(b[0]), b[1], ignore_index=255),
        lambda ids: (IMAGES[ids], MASKS[ids].masked_fill(numbers(len(ids), 4, 4) > 0.5, 255)),
    ),
}  # fmt: skip


def check(step, collate, folder, layers=None, **config):
    """Traces of the callback are those of the dense Hessian; it trains, and counts what it should."""
    torch.manual_seed(0)
    module, data = Net(step, layers), loader(collate)
    measure = MeasureConfig(estimator="exact", images=SAMPLES, **config)
    callback = HAWQ((2, 4, 8), 8, "6x", measure=measure, progress=False)
    batches, loss_fn = list(data), lambda m, b: m.training_step(b)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    trainer(folder, callback, max_epochs=1).fit(module, data)
    assert callback.sensitivity.settings["images"] == SAMPLES
    assert not torch.equal(state["net.0.weight"], module.state_dict()["net.0.weight"])
    torch.manual_seed(0)
    fresh = Net(step, None if layers is None else convolutions())
    fresh.load_state_dict(state)
    dense = [dense_weight_traces(fresh, b, loss_fn, callback.sites) for b in batches]
    for site in callback.sites.weights:
        expected = sum(d[site.name] for d in dense) / len(dense)
        assert callback.sensitivity[site.name].trace == pytest.approx(expected, rel=1e-3, abs=1e-6), site.name
    assert all(r.trace > 0 for r in callback.sensitivity if r.kind == "activation")
    return callback


@pytest.mark.parametrize("kind", TIME_FIRST)
def test_a_batch_axis_behind_the_first(kind, tmp_path):
    callback = check(*TIME_FIRST[kind], tmp_path, batch_dim=1)
    steps = TIME + (kind == "as many steps as sentences")
    assert callback.sites["net.0.input"].numel == steps * WIDTH  # of one sentence
    assert callback.sites.layers[0].macs == steps * WIDTH * 5


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphs(kind, tmp_path):
    check(*GRAPHS[kind], tmp_path)


@pytest.mark.parametrize("kind", OWN)
def test_batches_of_a_class_of_ones_own(kind, tmp_path):
    step, collate, count = OWN[kind]
    check(step, collate, tmp_path, batch_size_fn=count)


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_tensor_subclasses(kind, tmp_path):
    check(*SUBCLASSES[kind], tmp_path, layers=convolutions())


@pytest.mark.parametrize("kind", RAGGED)
def test_sequences_of_several_lengths(kind, tmp_path):
    check(*RAGGED[kind], tmp_path)


@pytest.mark.parametrize("kind", MASKED)
def test_losses_with_masks(kind, tmp_path):
    check(*MASKED[kind], tmp_path, layers=convolutions() if kind == "pixels" else None)


def test_what_cannot_be_counted_is_one_sentence(tmp_path):
    step, collate, count = OWN["slots"]
    with pytest.raises(HawqError, match="type Slots holds no tensor.*batch_size_fn"):
        trainer(tmp_path, HAWQ(progress=False)).fit(Net(step), loader(collate))
    with pytest.raises(HawqError, match="batch_size_fn returned 0.5"):
        trainer(tmp_path, HAWQ(batch_size_fn=lambda b: 0.5, progress=False)).fit(Net(step), loader(collate))
    short = HAWQ((2, 8), 8, "6x", batch_size_fn=count, progress=False)
    trainer(tmp_path, short).fit(Net(step), loader(collate))
    assert short.sensitivity.settings["images"] == SAMPLES
    with pytest.raises(HawqError, match=r"no batch axis 1 \(its shape is \[2\]\)"):
        batch_images(torch.ones(2), dim=1)
    with pytest.raises(HawqError, match="batch_dim"):
        MeasureConfig(batch_dim=-1)


def test_batches_tell_their_samples():
    packed = nn.utils.rnn.pack_sequence([X[0], X[1][:1]])
    assert batch_images(packed) == 2 and batch_images((packed, torch.ones(5))) == 2
    assert batch_images(joined(Graphs, [0, 1, 2])) == 3 and batch_images({"g": joined(DglGraphs, [0, 1])}) == 2
    assert batch_images(torch.ones(3, 4), dim=1) == 4
