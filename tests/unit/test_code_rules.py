"""Measures of the code itself: parameter lists, untyped places, docstrings that say nothing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import hawq_lightning

PACKAGE = Path(hawq_lightning.__file__).parent
MOST_PARAMETERS = 12
MOST_ANY = 10  # times the word in a thousand lines
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
