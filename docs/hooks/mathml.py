"""Equations as MathML, which browsers draw themselves: the pages load no script from anywhere."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)  # as pymdownx.arithmatex leaves them, with `generic`


def on_page_content(content: str, **_: Any) -> str:
    """Replace the equations of one page."""
    return _EQUATION.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    tag, bracket, latex = found.groups()
    display = "block" if bracket == "[" else "inline"
    return f"<{tag}>{convert(html.unescape(latex).strip(), display=display)}</{tag}>"
