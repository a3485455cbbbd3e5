"""Subgraph blueprints: parts of a graph that ComfyUI's page lists among the nodes, ready to be put into any graph."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from graph import LCM_LORA, Graph, Link


class Part(NamedTuple):
    """What of a graph becomes the subgraph."""

    nodes: list[str]
    """Its nodes, by number."""
    widgets: list[tuple[str, str]]
    """Settings that it shows: number of the node, name of the widget."""


def four_steps(g: Graph) -> Part:
    """Any MODEL with an LCM-LoRA, made to sample as a latent consistency model."""
    model, clip, _, *_ = g.any_checkpoint()
    settings = {"lora_name": LCM_LORA, "strength_model": 1.0, "strength_clip": 1.0, "save_as": ""}
    lora = g.add("LCMLoraConvert", "LCM-LoRA", model=model, clip=clip, **settings)
    applied = g.add("LCMApply", "LCM Apply", model=lora[0], guidance_scale=0.0, original_steps=50)
    positive = g.text(lora[1], "red apple, fluent style")
    g.paint(applied[0], positive, g.canvas(1))
    (first, _), (second, _) = lora[0], applied[0]
    return Part([first, second], [(first, "lora_name"), (first, "strength_model"), (second, "guidance_scale")])


def hires_fix(g: Graph) -> Part:
    """Two passes of four steps: one that composes, one that adds detail at twice the size."""
    model, clip, vae, *_ = g.full_lcm()
    positive = g.text(clip, "grinning face, noto style")
    first = g.paint(model, positive, g.canvas(1), "First pass")
    larger: Link = g.add("LatentUpscaleBy", "Upscale", samples=first, upscale_method="bicubic", scale_by=2.0)[0]
    second = g.paint(model, positive, larger, "Second pass", strength=0.5)
    g.save(second, vae, "hires fix")
    shown = [(first[0], "seed"), (first[0], "steps"), (first[0], "guidance_scale"), (larger[0], "scale_by")]
    return Part([first[0], larger[0], second[0]], [*shown, (second[0], "strength")])


BLUEPRINTS: dict[str, Callable[[Graph], Part]] = {
    "Make this checkpoint 4-step": four_steps,
    "4-step hires fix": hires_fix,
}


def blueprint_of(name: str, drawn: dict[str, Any]) -> dict[str, Any]:
    """A graph in which the page has made one subgraph, without all that lies around it.

    Args:
        name: the blueprint's.
        drawn: the page's serialised graph.
    """
    [subgraph] = drawn["definitions"]["subgraphs"]
    [node] = [node for node in drawn["nodes"] if node["type"] == subgraph["id"]]
    subgraph["name"] = name
    subgraph["category"], subgraph["description"] = "LCM Suite", (BLUEPRINTS[name].__doc__ or "").strip()
    own = str(uuid.uuid5(uuid.NAMESPACE_URL, f"lcm-suite/{name}"))  # the page's own is another one each time
    subgraph["id"] = node["type"] = own
    for slot in node["inputs"]:
        slot["link"] = None
    for slot in node["outputs"]:
        slot["links"] = None
    node |= {"title": name, "pos": [0, 0], "order": 0}
    return {
        "revision": 0,
        "last_node_id": node["id"],
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
    }
