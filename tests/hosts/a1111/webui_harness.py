"""Starts a real web UI (A1111, Forge, Neo, reForge or Classic) with this repository as its extension, and speaks to it.

Models, extensions and settings lie in a folder of the test's own (`--data-dir`), so that the checkout stays as it is.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lcm_core.files.recommended import Recommended
from lcm_core.files.safetensors import read_safetensors, write_safetensors

ROOT = Path(__file__).parents[3]
PROBE = Path(__file__).with_name("probe_extension")
EMOJI = ROOT / "lcm_core" / "models" / "emoji"
_FLAGS = "--skip-prepare-environment --skip-torch-cuda-test --skip-version-check --skip-python-version-check --api"
_CPU = {
    "A1111": "--use-cpu all --no-half --precision full --no-download-sd-model --no-hashing",
    "FORGE": "--always-cpu --all-in-fp32",
    "NEO": "--cpu --force-fp32",
    "REFORGE": "--always-cpu --all-in-fp32 --no-download-sd-model --no-hashing",
    "CLASSIC": "--always-cpu --all-in-fp32 --no-download-sd-model --no-hashing",
}
"""Flags for the CPU by kind of web UI."""
KINDS = ("A1111", "FORGE", "NEO")
"""Those that can load the embedded model; the others build Stable Diffusion in its usual sizes only."""
_SETTINGS = {  # noise as everywhere, no downloads for previews, and no second copy of pictures
    "randn_source": "CPU",
    "live_previews_enable": False,
    "samples_save": False,
    "grid_save": False,
    "sd_checkpoint_cache": 0,
    "CLIP_stop_at_last_layers": 1,  # Neo starts with 2
    "eta_noise_seed_delta": 0,  # what is not here keeps the value that a request has overridden
    "sgm_noise_multiplier": False,
    "s_min_uncond": 0,
    "show_refiner": True,  # Neo hides it
    "VERSION_UID": "PY313",  # Neo waits for a key to be pressed where its settings are of an earlier version
}
_STARTED = "Startup time:"
"""Printed when the page has been built; the interface answers before that, and drops options."""
_PATIENCE = 600  # seconds; a cold start on one busy core


class HttpError(Exception):
    """The web UI answered with an error; the text is its body."""


class WebUI:
    """A running web UI."""

    def __init__(self, kind: str, checkout: Path, data: Path, with_extension: bool = True) -> None:
        self.kind = kind
        """One of `KINDS`, REFORGE or CLASSIC."""
        self.checkout = checkout.resolve()
        self.data = data
        self.is_forge = (checkout / "modules_forge").is_dir()
        """Forge and what came of it: they have a CFG of their own for hires fix."""
        self.upscaler = "None" if kind == "NEO" else "Latent"
        """For hires fix; Neo has no latent one."""
        self.log = data / "webui.log"
        self._prepare(with_extension)

    def _prepare(self, with_extension: bool) -> None:
        extensions = self.data / "extensions"
        extensions.mkdir(parents=True, exist_ok=True)
        if with_extension:
            (extensions / "lcm-suite").symlink_to(ROOT, target_is_directory=True)
        (extensions / "probe").symlink_to(PROBE, target_is_directory=True)
        (self.data / "tmp").mkdir(exist_ok=True)  # where Neo's page puts pictures; it does not make the folder
        (self.data / "modules").symlink_to(self.checkout / "modules")  # what `export` knows a web UI by
        if self.is_forge:
            (self.data / "modules_forge").symlink_to(self.checkout / "modules_forge")
        (self.data / "config.json").write_text(json.dumps(_SETTINGS), encoding="utf-8")
        # What it writes here at its first start: until then Neo's page leaves the prompt out of what is pasted.
        (self.data / "ui-config.json").write_text(json.dumps({"txt2img/Prompt/value": ""}), encoding="utf-8")

    def export(self, model: str | Path = "emoji") -> None:
        """Put a model in with the command that users have."""
        host = "forge" if self.is_forge else "a1111"
        command = ["-m", "lcm_core", "export", "--to", host, "--path", str(self.data), "--model", str(model)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)

    def start(self) -> None:
        """Start, and wait until it is ready."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "IGNORE_CMD_ARGS_ERRORS": "1", "PYTHONUNBUFFERED": "1"}
        flags = f"{_FLAGS} {_CPU[self.kind]} --server-name 127.0.0.1 --port {self.port} --data-dir {self.data}"
        flags += f" --gradio-allowed-path {self.checkout}"  # Forge forgets its own page under --data-dir
        self._output = self.log.open("w")
        self.process = subprocess.Popen(
            [self._python(), "launch.py", *flags.split()],
            cwd=self.checkout,
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self._wait_for(_STARTED)
        if self.kind == "A1111":
            self._wait_for("Model loaded in")  # behind the page's back; a choice made before that would be taken back

    def _wait_for(self, line: str, times: int = 1) -> None:
        """Wait until a line was printed so many times."""
        end = time.monotonic() + _PATIENCE
        while self.read_log().count(line) < times:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the web UI did not start:\n{self.read_log()[-4000:]}")
            time.sleep(0.5)

    def read_log(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """End it."""
        if hasattr(self, "process"):
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self._output.close()

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET, or POST of a JSON body. Raises HttpError."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise HttpError(error.read().decode()) from error

    def paint(self, kind: str = "txt2img", **body: Any) -> Painted:
        """One request; 64x64, seed 1, unless said otherwise."""
        given: dict[str, Any] = {}
        if "infotext" not in body:
            given = {"prompt": "pizza, noto style", "seed": 1, "width": 64, "height": 64, "steps": 4, "cfg_scale": 1}
        if self.is_forge and body.get("enable_hr"):
            given |= {"hr_additional_modules": []}
        self.call("/probe/calls")  # forget what came before
        answer = self.call(f"/sdapi/v1/{kind}", given | body)
        info = json.loads(answer["info"])
        pictures = [Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB") for picture in answer["images"]]
        return Painted(pictures, info["infotexts"][0], self.call("/probe/calls"), self.call("/probe/comments")[0])

    def load(self, checkpoint: str) -> None:
        """Change the checkpoint."""
        self.call("/sdapi/v1/options", {"sd_model_checkpoint": checkpoint})

    def title(self, checkpoint: str) -> str:
        """A checkpoint's name in the page's lists."""
        known = self.call("/sdapi/v1/sd-models")
        return str(next(model["title"] for model in known if model["model_name"] == checkpoint))

    def reload_ui(self) -> None:
        """What the button "Reload UI" does."""
        before = self.read_log().count(_STARTED)
        self.call("/probe/reload")
        self._wait_for(_STARTED, before + 1)

    def _python(self) -> str:
        inside = self.checkout / "venv" / "bin" / "python"
        return os.environ.get(f"{self.kind}_PYTHON") or (str(inside) if inside.exists() else sys.executable)


class Painted:
    """What a request gave."""

    def __init__(self, pictures: list[Image.Image], infotext: str, calls: list[list[float]], said: str) -> None:
        self.pictures = pictures
        self.infotext = infotext
        self.calls = calls
        """For each call of the U-Net, the timestep of each row."""
        self.said = said
        """Comments under the picture."""

    @property
    def timesteps(self) -> list[float]:
        """One for each call."""
        return [call[0] for call in self.calls]

    @property
    def batches(self) -> list[int]:
        """Rows in each call."""
        return [len(call) for call in self.calls]

    @property
    def sampler(self) -> str:
        """As the infotext has it: the web UI turns a name that it does not know into another sampler."""
        return self.infotext.split("Sampler: ")[1].split(",")[0]


def difference(first: Image.Image, second: Image.Image) -> int:
    """The greatest difference of two pictures in any pixel and colour, of 255."""
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


def to_base64(picture: Image.Image) -> str:
    """A picture as the web UI's interface takes it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def save_phased_lora(file: Path) -> None:
    """The embedded LoRA as if it were a student of two phases, to be sampled with TCD and gamma 0, on a grid of 25."""
    tensors, metadata = read_safetensors(EMOJI / "lora" / "lcm_lora.safetensors")
    write_safetensors(file, tensors, {**metadata, **Recommended("tcd", 2, 0.0, 25).metadata()})


def copy_with_prediction(folder: Path) -> Path:
    """The embedded model under the other prediction type: it paints noise, but the same in all programs."""
    shutil.copytree(EMOJI, folder)
    card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    card["prediction_type"] = "v_prediction" if card["prediction_type"] == "epsilon" else "epsilon"
    (folder / "model.json").write_text(json.dumps(card), encoding="utf-8")
    return folder
