"""Every file under conf/ composes, and every node fits the thing that it builds."""

import inspect
from dataclasses import fields
from importlib.resources import files
from itertools import zip_longest

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from hawq_lightning import HawqError, MeasureConfig, QuantizerConfig, SelectConfig
from hawq_lightning.cli import check_renamed, make_companions

CONF = files("hawq_lightning.conf")
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_"))
CHOICES = [
    (group, p.name.removesuffix(".yaml"))
    for group in GROUPS
    for p in sorted(CONF.joinpath(group).iterdir(), key=lambda p: p.name)
    if p.name.endswith(".yaml")
]
SUPPLIED = {"net", "callbacks", "logger"}  # given by the program


@pytest.fixture(autouse=True)
def conf():
    GlobalHydra.instance().clear()
    with initialize_config_module("hawq_lightning.conf", version_base="1.3"):
        yield


def settings(name, overrides=()):
    overrides = [*overrides, "paths.output_dir=/tmp/run"]
    cfg = compose(name, overrides)
    if "root" in cfg.data and OmegaConf.is_missing(cfg.data, "root"):
        cfg.data.root = "/data"
    return cfg


def check_targets(node):
    if OmegaConf.is_dict(node):
        if "_target_" in node:
            target = get_object(node._target_)
            known = inspect.signature(target).parameters
            accepts_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
            given = [k for k in node if not k.startswith("_")]
            assert accepts_any or set(given) <= set(known), (node._target_, set(given) - set(known))
            needed = {
                n for n, p in known.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            }
            assert needed <= {*given, *SUPPLIED}, (node._target_, needed - set(given))
        for key in node:
            if not OmegaConf.is_missing(node, key):
                check_targets(node[key])


def test_there_is_a_group_for_every_part():
    parts = "model data task trainer hawq select measure quantizer fine_tuning callbacks logger paths hydra launcher"
    assert {*parts.split(), "experiment", "debug"} <= set(GROUPS)


@pytest.mark.parametrize("name", ["train", "analyze"])
def test_defaults_compose(name):
    cfg = settings(name)
    check_targets(cfg)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert (cfg.epochs == 0) == (name == "analyze")


def rows_of_choices():
    """Every choice once: the first of every group together, then the second of every group and so on."""
    alone = ("experiment", "debug", "hydra", "launcher")  # these set others, or are fixed in the defaults list
    columns = [[c for c in CHOICES if c[0] == group] for group in GROUPS if group not in alone]
    rows = [[c for c in row if c] for row in zip_longest(*columns)]
    return rows + [[c] for c in CHOICES if c[0] in alone]


@pytest.mark.parametrize("row", rows_of_choices(), ids=lambda row: ",".join(map("=".join, row)))
def test_every_option_composes_and_fits_its_target(row):
    chosen = dict(row)
    if chosen.get("logger") in ("wandb", "tensorboard"):
        pytest.importorskip(chosen["logger"])
    if "launcher" in chosen:
        plugin = {"joblib": "joblib", "ray": "ray"}.get(chosen["launcher"], "submitit")
        pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    # hydra/ is fixed in the defaults list; everything else is chosen
    cfg = settings("train", [f"{group}={choice}" for group, choice in row if group != "hydra"])
    check_targets(cfg)
    OmegaConf.to_container(cfg, resolve=True)


def test_configs_say_what_they_are_for():
    for group, choice in CHOICES:
        first = CONF.joinpath(group, f"{choice}.yaml").read_text().splitlines()
        assert first[0].startswith("#"), f"{group}/{choice}.yaml has no comment"


def test_saved_configs_keep_interpolations():
    text = OmegaConf.to_yaml(compose("train"))
    assert "select: ${select}" in text and "output_dir: ${hydra:runtime.output_dir}" in text


def callback(*overrides, name="train"):
    return instantiate(settings(name, overrides).hawq, _convert_="all")


def test_one_setting_reaches_the_callback():
    overrides = ["select.budget={bops: 50%}", "quantizer.weight_bits=[3,5]", "seed=9", "measure=hutchinson"]
    parts = callback(*overrides).measure_callback
    assert parts.select.budget == {"bops": "50%"} and parts.select.seed == 9
    assert parts.quantizer.weight_bits == (3, 5) and parts.measure.estimator == "hutchinson"
    assert parts.measure.seed == 0  # runs with other seeds of training share their traces


PARTS = [("quantizer", QuantizerConfig), ("measure", MeasureConfig), ("select", SelectConfig)]
FOR_THE_SHELL = {
    "cache": "${paths.cache}",
    "loss_per_site": True,
    "forecast": "fast",
    ("select", "seed"): "${seed}",
}


@pytest.mark.parametrize(("group", "config"), PARTS, ids=[group for group, _ in PARTS])
def test_every_field_of_a_config_is_one_line_of_its_group_with_the_same_default(group, config):
    node = OmegaConf.to_container(OmegaConf.load(CONF.joinpath(group, "default.yaml")), resolve=False)
    assert node.pop("_target_") == f"hawq_lightning.{config.__name__}"
    defaults = {f.name: getattr(config(), f.name) for f in fields(config)}
    assert list(node) == list(defaults)
    for name, value in defaults.items():
        expected = FOR_THE_SHELL.get((group, name), FOR_THE_SHELL.get(name, value))
        assert node[name] == (list(expected) if isinstance(expected, tuple) else expected), name


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "select" and c not in ("default", "manual")])
def test_every_choice_of_a_selector_is_a_select_config(choice):
    parts = callback(f"select={choice}").measure_callback
    assert parts.select.selector == {"inception_blocks": "pareto"}.get(choice, choice)
    assert (parts.select.constraints is None) == (choice != "inception_blocks")


def test_bits_by_hand_come_from_a_file(tmp_path):
    (tmp_path / "bits.json").write_text('{"*": 4}')
    parts = callback("select=manual", f"select.bits={tmp_path / 'bits.json'}").measure_callback
    assert parts.select.selector == "manual" and parts.select.budget is None


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("none", []), ("low_bits", ["Distillation"]), ("post_training", ["PostTraining"]),
     ("[blockwise,freeze]", ["BlockwiseOrder", "FreezeSchedule"])],
)  # fmt: skip
def test_fine_tuning_is_a_list_of_callbacks(choice, expected):
    companions = make_companions(settings("train", [f"fine_tuning={choice}"]))
    assert [type(c).__name__ for c in companions] == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [("selector.budget=12x", "select.budget=12x"), ("selector=l2", "select=l2"),
     ("sensitivity.rtol=0.1", "measure.rtol=0.1"), ("sensitivity=ggn", "measure=ggn"),
     ("hawq.rtol=0.1", "measure.rtol=0.1"), ("sensitivity.draw=all", "measure.sampling=all"),
     ("hawq.l1=zero", "measure.l1_curvature=zero"), ("hawq.start=2", "hawq.start_epoch=2"),
     ("hawq.check_loss=false", "measure.loss_per_site=false"), ("quantizer.imports=[a.py]", "imports=[a.py]"),
     ("+hawq.exclude=[head]", "+quantizer.exclude=[head]"),
     ("fine_tuning.distill=1", "fine_tuning=distillation fine_tuning.distillation.weight=1")],
)  # fmt: skip
def test_a_key_of_release_0_1_0_names_the_new_one(old, new):
    with pytest.raises(HawqError) as caught:
        check_renamed(["-m", "seed=1", old])
    assert str(caught.value).endswith(f" now: {new}") and "\n" not in str(caught.value)


def test_new_keys_pass():
    check_renamed(
        ["-m", "select.budget=8x,10x", "measure=hutchinson", "hawq.sensitivity=/a/sensitivity.json", "seed=1,2"]
    )
