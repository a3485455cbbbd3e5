"""Small bridges to ComfyUI that every node uses: its schema, its category, and a line of text on the node."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

CATEGORY = "LCM Suite"


def schema(aliases: Sequence[str] = (), **fields: Any) -> io.Schema:
    """A node's schema in this suite's category.

    Args:
        aliases: other words to find the node by; left out on hosts that do not know them (0.3.64).
        fields: of `io.Schema`.
    """
    if any(field.name == "search_aliases" for field in dataclasses.fields(io.Schema)):
        fields["search_aliases"] = list(aliases)
    return io.Schema(category=CATEGORY, hidden=[io.Hidden.unique_id], **fields)


def say(node: type[io.ComfyNode], text: str, log: bool = True) -> None:
    """Show a line of text on the node, and write it to the host's log."""
    if log:
        logging.info("%s: %s", node.__name__.removesuffix("Clone"), text)  # the host runs a copy of the class
    server = page_server()
    if server is not None and node.hidden is not None:
        server.send_progress_text(text, node.hidden.unique_id)


def page_server() -> Any:
    """The host's server; None where nodes run without one. Where there is one, it is loaded before them."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
