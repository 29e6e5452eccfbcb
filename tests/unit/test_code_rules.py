"""Measures of the code itself: parameter lists, untyped places, docstrings that say nothing."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import hawq_lightning
from hawq_lightning.export import EXPORTERS
from hawq_lightning.layers import LAYER_KINDS
from hawq_lightning.quantization import ActivationQuantizer, Quantizer, WeightQuantizer, quantizer_names
from hawq_lightning.quantization.post_training import METHODS
from hawq_lightning.selection import COSTS, SCORES, SELECTORS
from hawq_lightning.sensitivity import ESTIMATORS

PACKAGE = Path(hawq_lightning.__file__).parent
MOST_PARAMETERS = 12
MOST_ANY = 10  # times the word in a thousand lines
# words that are also names of entries, but mean something else in these files
OTHER_WORDS = {
    "_block_order.py": {"omega"},  # an order, beside omega_ascending
    "_weight_candidates.py": {"auto"},  # of a setting: no code format
    "_eigen.py": {"ggn"},  # one of two matrices, beside the Hessian
}
for _name in ("_recorder", "_card", "_checks", "_summary", "_sweep_page", "_text"):
    OTHER_WORDS[f"{_name}.py"] = {"accuracy"}  # the metric, as metrics.json has it
PHRASES = re.compile(r"\blikewise\b|^\s*\w+: (one|it|this|that|what it is)\.$", re.I | re.M)


def modules() -> Iterator[tuple[str, str]]:
    """Path below the package and source of every file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), path.read_text(encoding="utf-8")


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """``file: name`` and node of every function and method."""
    for name, text in modules():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}: {node.name}", node


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters a function has, ``self`` and ``cls`` apart."""
    named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([a for a in named if a not in ("self", "cls")]) + bool(node.args.vararg) + bool(node.args.kwarg)


def any_count(text: str) -> int:
    """Uses of the word ``Any``, imports and comments counted too."""
    return len(re.findall(r"\bAny\b", text))


def test_no_parameter_list_is_longer_than_a_screen_of_a_config():
    long = {name: n for name, node in functions() if (n := parameters(node)) > MOST_PARAMETERS}
    assert not long, f"more than {MOST_PARAMETERS} parameters: {long}"


def test_untyped_places_are_few():
    counts = {name: any_count(text) for name, text in modules()}
    lines = sum(text.count("\n") for _, text in modules())
    share = 1000 * sum(counts.values()) / lines
    most = sorted(counts.items(), key=lambda x: -x[1])[:8]
    assert share <= MOST_ANY, f"{share:.1f} `Any` in 1,000 lines; most in {most}"


def test_docstrings_say_what_an_argument_is():
    empty = [f"{name}: {m[0].strip()}" for name, text in modules() for m in PHRASES.finditer(text)]
    assert not empty, "\n".join(empty)


def compared_names(tree: ast.AST, names: set[str]) -> Iterator[ast.Compare | ast.match_case]:
    """Comparisons with, and cases of, a literal that is one of ``names``; not whether a mapping has such a key."""

    def literals(node: ast.expr) -> Iterable[object]:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        return [part.value for part in parts if isinstance(part, ast.Constant)]

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            key = [] if isinstance(node.ops[0], ast.In | ast.NotIn) else [node.left]
            if any(value in names for side in (*key, *node.comparators) for value in literals(side)):
                yield node
        elif isinstance(node, ast.match_case) and isinstance(node.pattern, ast.MatchValue):
            yield from [node] if any(value in names for value in literals(node.pattern.value)) else []


def test_nobody_asks_for_an_entry_of_a_registry_by_its_name():
    registries = (LAYER_KINDS, ESTIMATORS, quantizer_names(), COSTS, SCORES, SELECTORS, EXPORTERS, METHODS)
    names = {name for registry in registries for name in registry}
    assert {"conv2d", "ggn", "lsq", "bops", "omega", "pareto", "onnx", "adaround"} <= names
    found = [
        f"{name}: {ast.unparse(node)[:80]}"
        for name, text in modules()
        for node in compared_names(ast.parse(text), names - OTHER_WORDS.get(name.split("/")[-1], set()))
    ]
    assert not found, "an entry says what it needs and offers, so that no caller compares names:\n" + "\n".join(found)


def test_the_search_for_names_finds_them():
    for text in (
        'name == "onnx"',
        'x if "pareto" != y else z',
        'format in ("onnx", "program")',
        "match f:\n case 'onnx': 1",
    ):
        assert list(compared_names(ast.parse(text), {"onnx", "pareto"})), text
    assert not list(compared_names(ast.parse('{"onnx": 1}["onnx"]; f(name="onnx")'), {"onnx"}))


def test_nobody_asks_for_a_quantizers_class_outside_of_its_own_file():
    bases = {Quantizer, WeightQuantizer, ActivationQuantizer}
    found = []
    for name, text in modules():
        module = "hawq_lightning." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                for part in ast.walk(node.args[1]):
                    asked = (
                        getattr(importlib.import_module(module), part.id, None) if isinstance(part, ast.Name) else None
                    )
                    if isinstance(asked, type) and issubclass(asked, Quantizer) and asked not in bases:
                        found += [f"{name}: {ast.unparse(node)}"] if asked.__module__ != module else []
    assert not found, "\n".join(found)
