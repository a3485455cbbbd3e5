"""The recipe of the embedded model: emoji drawings and their names, from the icon packages to the shipped weights."""

from typing import Any, TypeAlias

AnyModule: TypeAlias = Any
"""A network of diffusers or transformers, whose settings and sub-modules no type checker can see."""
