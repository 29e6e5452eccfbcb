"""The documentation holds: Python blocks run, command lines compose, every argument is described."""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch import LightningDataModule
from torch.nn import functional as F

import hawq_lightning
from tests.internals import internal
from tests.trainers import Classifier, loader

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").glob("*/README.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
NEEDS = re.compile(r"^<!-- needs (\w+) -->\n```python\n(.*?)^```", re.M | re.S)  # a package that few have
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
REFERENCE = re.compile(r"^::: (\S+)$", re.M)
# on the face for the package's own other parts
FOR_NEIGHBOURS = {"__version__"}
COMMAND = re.compile(r"^hawq-lightning(-analyze|-export)? .*$", re.M)


def blocks(page: str, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall((ROOT / page).read_text("utf-8")) if language in languages]


class Blobs(LightningDataModule):
    def train_dataloader(self):
        return loader()


def given() -> dict:
    """What the README takes as given: a model, its data, its loss."""
    torch.manual_seed(0)
    batches = list(loader())
    return {
        "model": Classifier(), "datamodule": Blobs(), "batch": batches[0], "batches": batches,
        "fresh_model": Classifier(), "loss_fn": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    }  # fmt: skip


@pytest.fixture
def forgotten_entries():
    """What a page registers is forgotten afterwards: other tests register entries of the same names."""
    registries = internal("_registry")._REGISTRIES.values()
    before = [set(registry.names) for registry in registries]
    yield
    for registry, names in zip(registries, before):
        for name in set(registry.names) - names:
            registry.remove(name)


@pytest.mark.parametrize("page", [n for n in NAMES if blocks(n, "python")])
def test_python_runs(page, tmp_path, monkeypatch, forgotten_entries):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    left_out: list[str] = []
    needs = {code: package for package, code in NEEDS.findall((ROOT / page).read_text("utf-8"))}
    for code in blocks(page, "python"):
        if code in needs and importlib.util.find_spec(needs[code]) is None:
            left_out.append(needs[code])
            continue
        if page == "README.md":
            names = given()
        exec(compile(code, page, "exec"), names)
    if left_out:
        pytest.skip(f"the blocks of {page} that need {' and '.join(left_out)} were left out, the others ran")


def commands() -> list[tuple[str, str]]:
    found = []
    for page in NAMES:
        for code in blocks(page, "", "sh", "bash"):
            found += [(page, m[0]) for m in COMMAND.finditer(code.replace("\\\n", " ")) if "..." not in m[0]]
    return found


def first_of(override: str) -> str:
    """The first run of a sweep."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={next(parsed.sweep_string_iterator())}"


def test_every_command_composes():
    given: dict[tuple[str, tuple[str, ...]], str] = {}
    for page, command in commands():
        script, *words = shlex.split(command, comments=True)
        name = {"hawq-lightning": "train"}.get(script, script.removeprefix("hawq-lightning-"))
        # the launchers are packages of the extra sweep; a user's own folder is not here
        if "--config-dir" not in words:
            words = [w for w in words if w != "-m" and not w.startswith(("launcher=", "hydra.launcher", "--"))]
            given[name, tuple(first_of(w) for w in words)] = f"{page}: {command}"
    assert len(given) > 20
    wrong = []
    with initialize_config_module("hawq_lightning.conf", version_base="1.3"):
        for (name, words), where in given.items():
            # what another command has among its words need not be composed a second time
            if any(n == name and set(words) < set(more) for n, more in given):
                continue
            try:
                compose(name, list(words), return_hydra_config=True)
            except Exception as error:
                wrong.append(f"{where}: {error}")
    assert not wrong, "\n".join(wrong)


def test_equations_become_mathml_and_code_stays():
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("equations", ROOT / "docs" / "_site" / "equations.py")
    equations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(equations)
    page = "cost $x_1$ is $3 and `$y$`\n\n$$a = b \\tag{1}$$\n\n```\n$z$\n```\n"
    text = equations.on_page_markdown(page)
    assert text.count("<math") == 2 and "`$y$`" in text and "\n$z$\n" in text and "is $3 and" in text


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 15 and not [p for p in pages if p not in text]


def names_of_the_api_pages() -> list[str]:
    return [
        m[1] for p in sorted((ROOT / "docs" / "api").glob("*.md")) for m in REFERENCE.finditer(p.read_text("utf-8"))
    ]


@pytest.mark.parametrize("name", names_of_the_api_pages())
def test_a_documented_name_exists_and_is_public(name):
    module, _, attribute = name.rpartition(".")
    assert not any(part.startswith("_") for part in name.split(".")), "a private module on an API page"
    assert hasattr(importlib.import_module(module), attribute)


def test_every_public_name_is_on_an_api_page():
    written = {name.rpartition(".")[2] for name in names_of_the_api_pages()}
    assert not set(hawq_lightning.__all__) - written - FOR_NEIGHBOURS


def documented_callables():
    """Public classes and functions of the package with an ``Args:`` section."""
    for _, module in sorted(public_modules().items()):
        for name, thing in vars(module).items():
            own = getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_")
            if own and callable(thing) and "Args:" in (inspect.getdoc(thing) or ""):
                yield pytest.param(thing, id=f"{module.__name__.removeprefix('hawq_lightning.')}.{name}")


def public_modules():
    found = {}
    for info in pkgutil.walk_packages(hawq_lightning.__path__, "hawq_lightning."):
        with contextlib.suppress(ModuleNotFoundError):  # an extra that is not installed
            found[info.name] = importlib.import_module(info.name)
    return found


@pytest.mark.parametrize("thing", list(documented_callables()))
def test_every_argument_is_described(thing):
    described = re.findall(r"^\s*((?:\*{0,2}\w+, )*\*{0,2}\w+):", inspect.getdoc(thing), re.M)
    names = {name.strip("* ") for line in described for name in line.split(",")}
    missing = [p for p in inspect.signature(thing).parameters if p not in names and not p.startswith("_")]
    assert not missing, f"{thing.__qualname__} does not describe {missing}"


# described by one sentence today; names may only go
VAGUE = {"Problem", "check_linearity", "find_sites", "first_order_term", "group_frontier", "layer_type",
         "monotone_frontier", "top_eigenvalues", "weight_options", "with_bootstrap_stability"}  # fmt: skip
FACES = ["", *(f".{name}" for name in ("sensitivity", "quantization", "selection", "callbacks", "export"))]


@pytest.mark.parametrize("face", FACES, ids=lambda name: f"hawq_lightning{name}")
def test_every_public_name_is_documented(face):
    """All have a docstring; where more than three parameters hang on a name, one sentence cannot describe them."""
    module = importlib.import_module(f"hawq_lightning{face}")
    most = 0 if face == "" else 3
    silent, vague = [], []
    for name in module.__all__:
        thing = getattr(module, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)) or (
            inspect.isclass(thing) and issubclass(thing, BaseException)
        ):
            continue
        text = inspect.getdoc(thing) or ""
        if not text:
            silent.append(name)
        elif not dataclasses.is_dataclass(thing) and "Args:" not in text:
            missing = [p for p in inspect.signature(thing).parameters if f"``{p}``" not in text and p != "self"]
            if len(missing) > most and name not in VAGUE:
                vague.append((name, missing))
    assert not silent and not vague, (silent, vague)
