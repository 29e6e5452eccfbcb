"""The size of a batch, and batches of every type through the functions."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.nn import functional as F

from hawq_lightning.sensitivity import batch_images
from tests.small_network import Batch, Small, images, small_plan


def test_batches_as_dataclass_and_defaultdict():
    x, y = images()
    listed = defaultdict(list, image=x, label=y)
    expected = small_plan(Small()).bits.keys()
    kinds = {
        Batch: (Batch(x, y), lambda b: (b.image, b.label)),
        defaultdict: (listed, lambda b: (b["image"], b["label"])),
    }
    for kind, (batch, read) in kinds.items():
        model = Small()

        def loss(module, b, kind=kind, read=read):
            assert type(b) is kind
            image, label = read(b)
            return F.cross_entropy(module(image), label)

        plan = small_plan(model, loss_fn=loss, batch=batch, forward=lambda m, b, read=read: m(read(b)[0]))
        assert plan.bits.keys() == expected


def test_two_inputs_are_not_two_images():
    a, y = torch.zeros(8, 5), torch.zeros(8)
    assert batch_images(((a, a), y)) == 8
    assert batch_images({"pair": [a, a], "label": y}) == 8
    assert batch_images(Batch(a, y)) == 8
    # a detector's: one image an entry
    boxes = [{"boxes": torch.zeros(2, 4)}] * 5
    assert batch_images(([torch.zeros(3, 4, 4)] * 5, boxes)) == 5
    assert batch_images(([torch.zeros(3, 4, 4)] * 3, torch.zeros(3))) == 3
