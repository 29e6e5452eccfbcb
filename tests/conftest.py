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

# Whole runs of the console scripts, and families of many members of which other files have the first: `make test-long`.
# On two slow cores they take as long as all the others (`make test`, which is to be over in twelve minutes).
_LONG = (
    "app/test_compare", "app/test_export_cli", "app/test_models_experiments", "app/test_own_project",
    "app/test_packaging", "app/test_report_export", "app/test_run_folder", "app/test_sweep",
    "oracle/test_computed_weights", "oracle/test_generated", "oracle/test_in_place",
    "oracle/test_parameters_in_the_loss", "oracle/test_recomputed", "oracle/test_selection_exact", "stress/",
    "trainer/test_batches_and_loaders", "trainer/test_copies", "trainer/test_data_by_workers",
    "trainer/test_data_state", "trainer/test_distillation_batches", "trainer/test_epoch_length",
    "trainer/test_exact_types", "trainer/test_fine_tuning_schedules", "trainer/test_loaders_with_own_iteration",
    "trainer/test_losses", "trainer/test_optimizers_for_matrices", "trainer/test_other_callbacks",
    "trainer/test_overfit_batches", "trainer/test_own_generators", "trainer/test_requeue", "trainer/test_restart",
    "trainer/test_skipped_batches", "trainer/test_sparse_batches", "trainer/test_spawned_processes",
    "trainer/test_steps_that_change_things", "trainer/test_steps_that_log", "trainer/test_traces_that_say_nothing",
    "trainer/test_transfer_hooks", "trainer/test_weight_averaging", "unit/export/test_detector",
    "unit/export/test_several_weights", "unit/layers/test_function_linear", "unit/layers/test_recurrent",
    "unit/quantization/test_default_dtype", "unit/quantization/test_same_batches",
    "unit/sensitivity/test_backward_hooks", "unit/sensitivity/test_coupled_images",
    "unit/sensitivity/test_few_outputs", "unit/sensitivity/test_fixed_draws",
    "unit/sensitivity/test_importance_sampling", "unit/sensitivity/test_statistics", "unit/test_pattern_forms",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Marks by file: coverage is not traced where it is dear and adds nothing; what is long has a target of its own."""
    here = config.rootpath / "tests"
    for item in items:
        name = item.path.relative_to(here).as_posix()
        if name.startswith(_NOT_COUNTED):
            item.add_marker(pytest.mark.no_cover)
        if name.startswith(_LONG):
            item.add_marker(pytest.mark.long)


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
