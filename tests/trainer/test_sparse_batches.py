"""Graphs whose batches hold sparse matrices: the same plans, forecasts and training as with dense ones."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hawq_lightning.quantization import enabled_bits
from tests.trainers import assert_mixed, hawq, trainer

NODES, WIDTH, CLASSES, GRAPHS = 9, 5, 3, 8
LAYOUTS = {
    "coo": torch.Tensor.to_sparse_coo,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
    "bsr": lambda a: a.to_sparse_bsr((3, 3)),
    "bsc": lambda a: a.to_sparse_bsc((3, 3)),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse (CSR|CSC|BSR|BSC) tensor", "ignore:HAWQ. Much of the network stays float", "ignore:HAWQ. the loss is"
)


def graphs(make, seed=0):
    draw = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(GRAPHS):
        x, y = torch.randn(NODES, WIDTH, generator=draw), torch.randint(0, CLASSES, (NODES,), generator=draw)
        adjacency = torch.rand(NODES, NODES, generator=draw)
        adjacency *= torch.rand(NODES, NODES, generator=draw) < 0.4
        out.append({"x": x, "graph": [make(adjacency)], "y": y})
    return out


class Graphs(LightningDataModule):
    """A hook after the transfer, so that batches are moved twice and kept."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def train_dataloader(self):
        return DataLoader(graphs(self.make), batch_size=None, shuffle=True)

    def val_dataloader(self):
        return DataLoader(graphs(self.make, 1), batch_size=None)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch | {"x": 2 * batch["x"]}


class Network(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(WIDTH, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def training_step(self, batch, batch_idx):
        (adjacency,) = batch["graph"]
        if adjacency.layout in (torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):  # torch multiplies few
            adjacency = adjacency.to_dense()
        hidden = F.relu(self.b(adjacency @ F.relu(self.a(batch["x"]))))
        return F.cross_entropy(self.c(adjacency @ hidden), batch["y"])

    def validation_step(self, batch, batch_idx):
        self.log("val", self.training_step(batch, batch_idx), batch_size=NODES)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(folder, make, **settings):
    torch.manual_seed(0)
    callback, model = hawq(dirpath=folder, images=5 * NODES, weight_bits=(2, 4, 8), **settings), Network()
    trainer(folder, callback).fit(model, datamodule=Graphs(make))
    assert_mixed(model, callback)
    return callback, model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_are_those_of_dense_matrices(tmp_path, layout):
    settings = {"estimator": "exact", "forecast": "fast", "quadratic_forms": layout == "coo"}
    dense, its_model = fitted(tmp_path / "dense", torch.clone, **settings)
    found, model = fitted(tmp_path / layout, LAYOUTS[layout], **settings)
    assert enabled_bits(model) == enabled_bits(its_model)
    for name, record in {r.name: r for r in dense.sensitivity}.items():
        assert found.sensitivity[name].trace == pytest.approx(record.trace, rel=1e-4), name
    for bits in (2, 4, 8):
        plan = {s.name: bits for s in dense.plan.sites if s.kind == "weight"}
        assert found.outlook.of(plan).kl == pytest.approx(dense.outlook.of(plan).kl, rel=1e-3)
    assert torch.allclose(model.c.weight, its_model.c.weight, atol=1e-5)


def test_a_budget_by_loss_is_measured_on_sparse_batches(tmp_path):
    dense, _ = fitted(tmp_path / "dense", torch.clone, budget={"kl": 0.003})
    found, _ = fitted(tmp_path / "sparse", torch.Tensor.to_sparse, budget={"kl": 0.003})
    assert [s.bits for s in found.plan.sites] == [s.bits for s in dense.plan.sites]
