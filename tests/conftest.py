"""The tests share no traces with the user's own runs, and one process that starts their programs."""

import os
import sys
import tempfile

import pytest

# Whole runs, which spend their time in Hydra, Lightning and torch's exporter, and comparisons with ground truth: other
# tests reach the lines that they reach. Tracing these for coverage is a fifth to a half of their time.
_NOT_COUNTED = ("app/test_compare", "app/test_detection", "app/test_docs", "app/test_models_experiments",
                "app/test_sweep", "golden/", "oracle/", "trainer/", "unit/sensitivity/test_importance_sampling",
                "unit/sensitivity/test_statistics")  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Coverage is not traced where it is dear and adds nothing."""
    here = config.rootpath / "tests"
    for item in items:
        if item.path.relative_to(here).as_posix().startswith(_NOT_COUNTED):
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture(scope="session", autouse=True)
def own_cache():
    with tempfile.TemporaryDirectory(prefix="hawq_lightning-cache-") as folder:
        os.environ["HAWQ_LIGHTNING_CACHE"] = folder
        yield


@pytest.fixture(scope="session", autouse=True)
def programs(own_cache):
    """Before the first test, so that nothing has computed; only where a collected test starts programs."""
    console = sys.modules.get("tests.console")
    if console is None:
        yield
        return
    with console.serving():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test that proves a row of docs/trainer_features.md has looked at enabled quantizers with unequal bits."""
    before = getattr(sys.modules.get("tests.trainers"), "proofs", 0)
    result = yield
    if item.get_closest_marker("feature") is not None:
        assert getattr(sys.modules.get("tests.trainers"), "proofs", 0) > before, (
            "enabled and unequal bits: not asserted"
        )
    return result
