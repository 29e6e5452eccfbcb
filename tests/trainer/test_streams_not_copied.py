"""Streams that cannot be copied are refused by name, before any sample is taken from them."""

from __future__ import annotations

import threading
from typing import BinaryIO

import pytest
from torch.utils.data import DataLoader, IterableDataset

from hawq_lightning import HawqError
from tests.trainers import IMAGES, Classifier, blobs, hawq, loader, measuring, trainer

OPENED: list[BinaryIO] = []


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPENED:
        OPENED.pop().close()


class OpenFile(IterableDataset):
    def __init__(self):
        self.file = open(__file__, "rb")  # noqa: SIM115 - it stays open, which is what this is about
        OPENED.append(self.file)

    def __iter__(self):
        self.file.seek(0)
        yield from (blobs()[i] for i in range(IMAGES))


class OneGenerator(IterableDataset):
    def __init__(self):
        self.rows = (blobs()[i] for i in range(IMAGES))

    def __iter__(self):
        return self.rows


class Locked:
    """No DataLoader at all."""

    def __init__(self):
        self.lock = threading.Lock()

    def __iter__(self):
        yield from loader()


class OwnIteration(DataLoader):
    def __iter__(self):
        yield from super().__iter__()


class GivesAGenerator(Classifier):
    def train_dataloader(self):
        return (batch for batch in loader())


class OpensAnew(IterableDataset):
    """What the message asks for."""

    def __iter__(self):
        with open(__file__, "rb"):
            yield from (blobs()[i] for i in range(IMAGES))


STREAMS = {
    "OpenFile": lambda: DataLoader(OpenFile(), 16),
    "OneGenerator": lambda: DataLoader(OneGenerator(), 16),
    "Locked": Locked,
    "generator": lambda: None,
}


@pytest.mark.parametrize("callback", [hawq, measuring])
@pytest.mark.parametrize("name", STREAMS)
def test_the_message_names_the_stream_and_the_remedy(tmp_path, name, callback):
    with pytest.raises(HawqError, match=f"'{name}' cannot be copied .*__iter__ open what it reads from"):
        trainer(tmp_path, callback()).fit(GivesAGenerator(), STREAMS[name]())


def test_a_stream_in_a_loader_with_its_own_iteration_is_named_too(tmp_path):
    with pytest.raises(HawqError, match="'OpenFile' cannot be copied"):
        trainer(tmp_path, hawq()).fit(Classifier(), OwnIteration(OpenFile(), 16))


def test_the_remedy_works(tmp_path):
    callback = hawq()
    trainer(tmp_path, callback).fit(Classifier(), DataLoader(OpensAnew(), 16))
    assert callback.has_plan
