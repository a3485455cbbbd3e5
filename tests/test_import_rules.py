"""The rooms stay apart: what a file may import, read from its syntax tree without running it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.import_tree import RUNTIME, Tree, closure, loads, read, resolve

ROOT = Path(__file__).parents[1]
ROOMS = {
    "lcm_core": set[str](),
    "trainer": {"lcm_core"},
    "nodes": {"lcm_core", "trainer"},
    "extension_a1111": {"lcm_core"},
}
"""Each room, and the other rooms that it may import."""
HOSTS = {
    *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "server"),
    *("modules", "modules_forge", "backend", "gradio", "k_diffusion", "ldm", "ldm_patched", "sgm"),
}
TORCH_ONLY = ("lcm_core.diffusion", "lcm_core.errors")
"""Rooms and files that need torch alone: A1111 loads them without anything else."""
SAFETENSORS_ONLY = ("lcm_core.files",)
"""Rooms that need torch and safetensors alone."""
OF_DIFFUSERS = ("lcm_core.pipeline.scheduler",)
"""Files that only make sense inside diffusers, and extend its classes."""
LAYERS = (
    ("lcm_core.diffusion", "lcm_core.files", "lcm_core.errors"),
    ("lcm_core.networks",),
    ("lcm_core.families",),
    ("lcm_core.pipeline",),
    ("lcm_core.serve",),
    ("lcm_core.cli", "lcm_core.export", "lcm_core.__main__"),
)
"""A room may import its own and those before it, none behind."""


@cache
def checkout() -> Tree:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return read({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths})


def foreign(tree: Tree, modules: set[str], allowed: set[str], when: set[str]) -> list[str]:
    """Imports of packages that are neither ours, nor Python's, nor allowed."""
    ours = allowed | ROOMS.keys() | sys.stdlib_module_names
    return [
        f"{module}:{i.line} imports {i.name}; only {', '.join(sorted(allowed)) or 'the standard library'} may be"
        for module in sorted(modules)
        for i in tree[module]
        if i.when in when and i.top not in ours
    ]


def rooms_are_apart(tree: Tree) -> list[str]:
    """No room imports another that it may not, or leaves by a relative import. Library and trainer know no host."""
    found = []
    for module, imports in tree.items():
        room = module.partition(".")[0]
        banned = ROOMS.keys() - ROOMS[room] - {room} | {"<outside>"}
        if room in ("lcm_core", "trainer"):
            banned |= HOSTS
        found += [f"{module}:{i.line} ({room}) imports {i.name}" for i in imports if i.top in banned]
    return found


def within(module: str, rooms: Sequence[str]) -> bool:
    """Whether a module is one of these rooms or lies in one."""
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def torch_is_enough(tree: Tree) -> list[str]:
    """The modules that hosts load need torch alone, even inside functions; tqdm where its absence is caught."""
    modules = [module for module in tree if within(module, TORCH_ONLY)]
    inside = closure(tree, modules, RUNTIME)
    outside = {module for module in inside if not within(module, TORCH_ONLY)} - {"lcm_core"}
    found = [f"{module} is loaded by a torch-only module" for module in sorted(outside)]
    found += foreign(tree, inside, {"torch"}, RUNTIME)
    return found + foreign(tree, inside, {"torch", "tqdm"}, {"optional"})


def safetensors_is_enough(tree: Tree) -> list[str]:
    """Checkpoints and LoRA, with all that they load, need torch and safetensors alone, even inside functions."""
    inside = closure(tree, [module for module in tree if within(module, SAFETENSORS_ONLY)], RUNTIME)
    found = foreign(tree, inside, {"torch", "safetensors"}, RUNTIME)
    return found + foreign(tree, inside, {"torch", "safetensors", "tqdm"}, {"optional"})


def imports_go_one_way(tree: Tree) -> list[str]:
    """diffusion, files <- networks <- families <- pipeline <- command line and export."""

    def layer(module: str) -> int:
        return next((number for number, rooms in enumerate(LAYERS) if within(module, rooms)), -1)

    return [
        f"{module}:{i.line} imports {target}, which stands above it"
        for module, imports in tree.items()
        for i in imports
        if (target := resolve(tree, i.name)) and layer(module) >= 0 and layer(target) > layer(module)
    ]


def no_circles(tree: Tree) -> list[str]:
    """No module loads itself again by way of others, not even inside a function. A package may name what is in it."""
    apart = {
        module: [i for i in imports if not (resolve(tree, i.name) or "").startswith(f"{module}.")]
        for module, imports in tree.items()
    }
    return [
        f"{module} imports itself by way of {name}"
        for module in apart
        for name in loads(apart, module, RUNTIME)
        if module in closure(apart, [name], RUNTIME) and not name.startswith(f"{module}.")
    ]


def importing_stays_light(tree: Tree) -> list[str]:
    """Importing any of lcm_core loads torch and safetensors at most; the command lines not even those, for --help."""
    library = {module for module in tree if module.partition(".")[0] == "lcm_core" and module not in OF_DIFFUSERS}
    found = foreign(tree, library, {"torch", "safetensors"}, {"import"})
    commands = closure(tree, ["lcm_core.__main__", "trainer.__main__"], {"import"})
    return found + foreign(tree, commands, set(), {"import", "optional"})


RULES = [
    rooms_are_apart,
    torch_is_enough,
    safetensors_is_enough,
    imports_go_one_way,
    no_circles,
    importing_stays_light,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Tree], list[str]]) -> None:
    assert rule(checkout()) == []


def test_all_rooms_of_the_rules_exist() -> None:
    """A rule about a room that was renamed would hold for ever, and one that is in no layer would obey none."""
    rooms = [*TORCH_ONLY, *SAFETENSORS_ONLY, *(room for layer in LAYERS for room in layer)]
    assert [room for room in rooms if not any(within(module, [room]) for module in checkout())] == []
    library = {module for module in checkout() if module.startswith("lcm_core.")}
    assert sorted(module for module in library if not within(module, rooms)) == []


BAD = [
    (rooms_are_apart, {"lcm_core/a.py": "import trainer.lcd"}, "imports trainer.lcd"),
    (rooms_are_apart, {"lcm_core/a.py": "def f():\n    from comfy import samplers"}, "a:2 (lcm_core) imports comfy"),
    (rooms_are_apart, {"lcm_core/cli/a.py": "from ...trainer import lcd"}, "imports <outside>.trainer.lcd"),
    (rooms_are_apart, {"trainer/a.py": "from nodes import Sample"}, "imports nodes.Sample"),
    (rooms_are_apart, {"trainer/a.py": "from ..lcm_core import schedule"}, "imports <outside>.lcm_core.schedule"),
    (rooms_are_apart, {"extension_a1111/a.py": "import importlib\nimportlib.import_module('nodes')"}, "imports nodes"),
    (torch_is_enough, {"lcm_core/diffusion/schedule.py": "import numpy as np"}, "schedule:1 imports numpy"),
    (torch_is_enough, {"lcm_core/diffusion/solver.py": "def f():\n    import einops"}, "solver:2 imports einops"),
    (torch_is_enough, {"lcm_core/diffusion/samplers.py": "from tqdm import trange"}, "imports tqdm.trange"),
    (
        torch_is_enough,
        {"lcm_core/diffusion/process.py": "try:\n    import kornia\nexcept ImportError:\n    pass"},
        "process:2 imports kornia",
    ),
    (
        torch_is_enough,
        {"lcm_core/diffusion/guidance.py": "from lcm_core.networks import unet", "lcm_core/networks/unet.py": ""},
        "lcm_core.networks.unet is loaded by a torch-only module",
    ),
    (torch_is_enough, {"lcm_core/__init__.py": "import diffusers", "lcm_core/errors.py": ""}, "imports diffusers"),
    (
        safetensors_is_enough,
        {
            "lcm_core/files/checkpoint.py": "from . import keys",
            "lcm_core/files/keys.py": "def f():\n    import diffusers",
        },
        "keys:2 imports diffusers",
    ),
    (safetensors_is_enough, {"lcm_core/files/lora.py": "from peft import LoraConfig"}, "imports peft"),
    (
        imports_go_one_way,
        {"lcm_core/files/lora.py": "from ..networks.unet import f", "lcm_core/networks/unet.py": ""},
        "lora:1 imports lcm_core.networks.unet, which stands above it",
    ),
    (
        imports_go_one_way,
        {
            "lcm_core/networks/vae.py": "def f():\n    from lcm_core.pipeline import Pipeline",
            "lcm_core/pipeline/__init__.py": "",
        },
        "vae:2 imports lcm_core.pipeline",
    ),
    (
        imports_go_one_way,
        {"lcm_core/pipeline/image.py": "from lcm_core.cli import info", "lcm_core/cli/info.py": ""},
        "image:1 imports lcm_core.cli.info",
    ),
    (
        no_circles,
        {"lcm_core/a.py": "from lcm_core.b import f", "lcm_core/b.py": "def f():\n    import lcm_core.a"},
        "lcm_core.a imports itself by way of lcm_core.b",
    ),
    (importing_stays_light, {"lcm_core/pipeline/image.py": "import PIL.Image"}, "image:1 imports PIL.Image"),
    (
        importing_stays_light,
        {"lcm_core/__main__.py": "import lcm_core.cli.main", "lcm_core/cli/main.py": "import torch"},
        "main:1 imports torch; only the standard library may be",
    ),
]
GOOD = {
    "lcm_core/__init__.py": "__version__ = '1'",
    "lcm_core/__main__.py": "from lcm_core.cli.main import main",
    "lcm_core/cli/main.py": "from . import info\nimport argparse",
    "lcm_core/cli/__init__.py": "",
    "lcm_core/cli/info.py": "def run():\n    from ..pipeline import Pipeline",
    "lcm_core/diffusion/schedule.py": "import math\nimport torch\nfrom lcm_core.errors import InputError",
    "lcm_core/errors.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy",
    "lcm_core/diffusion/samplers.py": "from .schedule import f\ntry:\n    import tqdm\nexcept ImportError:\n    pass",
    "lcm_core/pipeline/__init__.py": "import lcm_core.diffusion.samplers\ndef f():\n    import diffusers",
    "lcm_core/files/lora.py": "from safetensors.torch import save_file",
    "trainer/loop.py": "import numpy\nfrom lcm_core.diffusion.schedule import f\nfrom . import lcd",
    "trainer/lcd.py": "",
    "nodes/sample.py": "import comfy.samplers\nfrom lcm_core.diffusion import samplers\nimport trainer.lcd",
}


@pytest.mark.parametrize(("rule", "sources", "message"), BAD)
def test_rule_catches(rule: Callable[[Tree], list[str]], sources: dict[str, str], message: str) -> None:
    """The rules above would prove nothing if a breach went unseen."""
    found = rule(read(sources))
    assert message in "\n".join(found)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_lets_pass(rule: Callable[[Tree], list[str]]) -> None:
    """A rule that forbids what is allowed would be switched off soon."""
    assert rule(read(GOOD)) == []
