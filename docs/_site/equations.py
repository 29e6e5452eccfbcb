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
        text = _BLOCK.sub(lambda m: f"\n\n<div>{convert(m[1].strip(), display='block')}</div>\n\n", parts[i])
        parts[i] = _INLINE.sub(lambda m: convert(m[1]), text)
    return "".join(parts)
