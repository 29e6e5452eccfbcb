"""The tests share no traces with the user's own runs."""

import os
import tempfile

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache():
    with tempfile.TemporaryDirectory(prefix="hawq_lightning-cache-") as folder:
        os.environ["HAWQ_LIGHTNING_CACHE"] = folder
        yield
