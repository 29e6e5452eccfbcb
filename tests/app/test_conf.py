"""Every file under conf/ composes, and every node fits the thing that it builds."""

import inspect
from importlib.resources import files

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

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
    parts = "model data task trainer hawq selector sensitivity quantizer callbacks logger paths hydra launcher"
    assert {*parts.split(), "experiment", "debug"} <= set(GROUPS)


@pytest.mark.parametrize("name", ["train", "analyze"])
def test_defaults_compose(name):
    cfg = settings(name)
    check_targets(cfg)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert (cfg.epochs == 0) == (name == "analyze")


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=["=".join(c) for c in CHOICES])
def test_every_option_composes_and_fits_its_target(group, choice):
    if group == "logger" and choice in ("wandb", "tensorboard"):
        pytest.importorskip({"wandb": "wandb", "tensorboard": "tensorboard"}[choice])
    if group == "launcher":
        pytest.importorskip(f"hydra_plugins.hydra_{'joblib' if choice == 'joblib' else 'submitit'}_launcher")
    # hydra/ is fixed in the defaults list; everything else is chosen
    cfg = settings("train", [] if group == "hydra" else [f"{group}={choice}"])
    check_targets(cfg)
    OmegaConf.to_container(cfg, resolve=True)


def test_configs_say_what_they_are_for():
    for group, choice in CHOICES:
        first = CONF.joinpath(group, f"{choice}.yaml").read_text().splitlines()
        assert first[0].startswith("#"), f"{group}/{choice}.yaml has no comment"


def test_saved_configs_keep_interpolations():
    text = OmegaConf.to_yaml(compose("train"))
    assert "budget: ${selector.budget}" in text and "output_dir: ${hydra:runtime.output_dir}" in text


def test_one_setting_reaches_the_callback():
    overrides = ["selector.budget={bops: 50%}", "quantizer.weight_bits=[3,5]", "seed=9", "sensitivity=hutchinson"]
    node: DictConfig = settings("train", overrides).hawq
    assert OmegaConf.to_container(node.budget) == {"bops": "50%"}
    assert (list(node.weight_bits), node.selection_seed, node.estimator) == ([3, 5], 9, "hutchinson")
    assert node.seed == 0  # runs with other seeds of training share their traces
