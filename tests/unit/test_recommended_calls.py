"""What messages recommend is accepted: every ``Name(keyword=...)`` in a text of the package is a call that works."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import hawq_lightning
from hawq_lightning import HAWQ, MeasureConfig, MeasureTraces

ROOT = Path(hawq_lightning.__file__).parent
FACES = [importlib.import_module(f"hawq_lightning{n}") for n in ("", ".callbacks", ".sensitivity", ".quantization")]


def texts() -> list[tuple[str, str]]:
    """File and text of every string, those of f-strings joined."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
                found.append((str(path.relative_to(ROOT)), "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((str(path.relative_to(ROOT)), node.value))
    return found


def accepted(name: str) -> set[str] | None:
    """Keywords that a public name takes; ``None``: it is none of ours, or takes any."""
    called = next((getattr(face, name) for face in FACES if hasattr(face, name)), None)
    if not callable(called):
        return None
    parameters = inspect.signature(called).parameters
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else set(parameters)


def recommended() -> list[tuple[str, str, str]]:
    calls = []
    for file, text in texts():
        for name, keyword in re.findall(r"\b([A-Za-z_]\w*)\((\w+)=(?!=)", text):
            if accepted(name) is not None:
                calls.append((file, name, keyword))
    return sorted(set(calls))


@pytest.mark.parametrize(("file", "name", "keyword"), recommended())
def test_a_recommended_keyword_is_one(file, name, keyword):
    keywords = accepted(name)
    assert keywords is not None and keyword in keywords, f"{file} recommends {name}({keyword}=...)"


def test_recommendations_are_found():
    assert {("HAWQ", "plan"), ("HAWQ", "measure"), ("MeasureConfig", "loss_fn")} <= {c[1:] for c in recommended()}


def test_another_loss_is_named_with_what_takes_it():
    bare = [(f, t) for f, t in texts() if re.search(r"(?<!MeasureConfig\()loss_fn=", t)]
    assert not bare


@pytest.mark.parametrize("callback", [HAWQ, MeasureTraces])
def test_callbacks_take_another_loss_as_messages_say(callback):
    callback(measure=MeasureConfig(loss_fn=lambda module, batch: module(batch).sum()))
    with pytest.raises(TypeError, match="loss_fn"):
        callback(loss_fn=lambda module, batch: module(batch).sum())
