"""Filling the report's templates, which lie beside this file; whatever is put into one is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def fill(template: str, **values: Any) -> Markup:
    """A template's HTML: text in `values` is escaped, HTML of another template is not escaped again.

    Raises:
        jinja2.UndefinedError: the template uses a name that is not among the values.
    """
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["pixels"] = "{:.1f}".format  # a tenth of a pixel is enough for a chart
    environment.filters["number"] = "{:,g}".format
    return environment
