"""reForge, as far as it goes without a full-size model: the extension loads, and its noise process is understood."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from webui_harness import ROOT, WebUI

pytestmark = pytest.mark.host
PROCESSES = """
import json, sys
sys.argv = sys.argv[:1] + ["--always-cpu"]
from modules import paths
from ldm_patched.modules.model_base import ModelType, model_sampling
from ldm_patched.modules.supported_models import SD15
sys.path.append({root!r})
from extension_a1111.architecture import prediction_of
kinds = [kind for kind in ModelType if kind.name in ("EPS", "V_PREDICTION", "V_PREDICTION_EDM", "FLOW")]
made = {{kind.name: model_sampling(SD15({{}}), kind) for kind in kinds}}
print()
print(json.dumps({{name: [prediction_of(found), len(found.sigmas)] for name, found in made.items()}}))
"""


@pytest.fixture(scope="module")
def reforge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    path = os.environ.get("REFORGE_PATH")
    if not path:
        pytest.skip("REFORGE_PATH is not set to a checkout of reForge")
    server = WebUI("REFORGE", Path(path), tmp_path_factory.mktemp("reforge"))
    try:
        server.start()
        yield server
    finally:
        server.close()


def test_everything_is_loaded_and_listed(reforge: WebUI) -> None:
    assert "could not be loaded" not in reforge.read_log()
    names = [sampler["name"] for sampler in reforge.call("/sdapi/v1/samplers")]
    assert names.count("LCM Suite") == names.count("TCD Suite") == 1
    scripts = reforge.call("/sdapi/v1/scripts")
    assert "lcm suite" in scripts["txt2img"]
    assert "lcm latent travel" in scripts["img2img"]
    parts = [str(part["props"].get("elem_id")) for part in reforge.call("/config")["components"]]
    assert "lcm_distil_start" in parts


def test_its_own_noise_processes_are_understood(reforge: WebUI) -> None:
    command = [reforge._python(), "-c", PROCESSES.format(root=str(ROOT))]
    result = subprocess.run(command, cwd=reforge.checkout, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["EPS"] == ["epsilon", 1000]
    assert found["V_PREDICTION"] == ["v_prediction", 1000]
    assert found["V_PREDICTION_EDM"][0] not in ("epsilon", "v_prediction")
    assert found["FLOW"][0] not in ("epsilon", "v_prediction")
