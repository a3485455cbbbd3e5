"""All node classes."""

from __future__ import annotations

from . import without_trainer
from .distiller import LCMDistiller

NODES = [*without_trainer.NODES, LCMDistiller]
"""All nodes, in the order of the menu."""
