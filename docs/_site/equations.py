"""Equations between dollars become MathML while the site is built, so that pages need no script from elsewhere."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.M | re.S)
_BLOCK = re.compile(r"\$\$(.+?)\$\$", re.S)
_INLINE = re.compile(r"(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\w$])")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with MathML instead of LaTeX; code stays as it is."""
    parts = _CODE.split(markdown)
    for i in range(0, len(parts), 2):
        text = _BLOCK.sub(lambda m: f"\n\n<div>{convert(_numbered(m[1]), display='block')}</div>\n\n", parts[i])
        # without the span, Markdown would take an equation at the start of a line for a block of its own
        parts[i] = _INLINE.sub(lambda m: f"<span>{convert(m[1])}</span>", text)
    return "".join(parts)


def _numbered(equation: str) -> str:
    """Its number behind it, with room between."""
    return re.sub(r"\\tag\{([^}]*)\}", r"\\qquad (\1)", equation.strip())
