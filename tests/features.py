"""The table of docs/trainer_features.md, made from the tests that prove it: ``python -m tests.features`` writes it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "trainer_features.md"
GROUPS = ("Processes", "Restart", "Checkpoints", "Settings", "Data", "Modules", "Optimizers", "Other callbacks",
          "Loggers", "Command line", "Files from strangers")  # fmt: skip
HEAD = """# HAWQ in other people's Trainers

Every row is proven by the tests that it names, and each of these tests asserts that quantizers are enabled and that
layers have unequal bits. This page is written by `python -m tests.features`; a test fails if it is not up to date.
Tests marked \\* run under `make stress`, the others under `make test` and `make test-long`.
"""
TAIL = """
## What these tests cannot show

They run on CPUs, with gloo between processes. On GPUs remain to be confirmed: NCCL in the place of gloo, a saved plan
under FSDP (torch 2.14 does not start FSDP without an accelerator) and there `bf16-mixed` (it casts buffers),
`16-mixed`, CUDA graphs (`torch.compile(mode="reduce-overhead")`), several machines.
"""


def rows() -> dict[tuple[str, str, str], list[str]]:
    """(group, feature, result) -> the tests that carry it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        slow_file = any(
            isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in n.targets)
            and "stress" in ast.dump(n.value) for n in tree.body
        )  # fmt: skip
        for function in [n for n in tree.body if isinstance(n, ast.FunctionDef)]:
            marks = [d for d in function.decorator_list if "stress" in ast.dump(d) and not _is(d, "parametrize")]
            for call in ast.walk(ast.Module([ast.Expr(d) for d in function.decorator_list], [])):
                if not (isinstance(call, ast.Call) and _is(call, "feature")):
                    continue
                key = tuple(ast.literal_eval(a) for a in call.args)
                assert len(key) == 3 and key[0] in GROUPS, f"{path.name}: {function.name}: {key}"
                name = f"`{path.relative_to(ROOT)}::{function.name}`" + (" \\*" if marks or slow_file else "")
                found.setdefault(key, []).append(name)
    return found


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name


def page() -> str:
    """The whole page."""
    known = rows()
    parts = [HEAD]
    for group in GROUPS:
        mine = {key: tests for key, tests in known.items() if key[0] == group}
        if mine:
            parts.append(f"\n## {group}\n\n| | result | proven by |\n|---|---|---|\n")
            parts += [f"| {what} | {result} | {', '.join(tests)} |\n" for (_, what, result), tests in mine.items()]
    return "".join(parts) + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{len(rows())} rows: {PAGE.relative_to(ROOT)}")
