"""A real ComfyUI as a subprocess, for making the workflows and for testing them. Standard library only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 900  # a slow machine with many other things to do
PROMPT_SECONDS = 900


class PromptError(RuntimeError):
    """ComfyUI refused a workflow, or a node of it failed; `details` is what the server said."""

    def __init__(self, message: str, details: Any) -> None:
        super().__init__(message)
        self.details = details


def find_python(checkout: Path) -> Path:
    """The Python that this checkout runs in: $COMFYUI_PYTHON, or a virtual environment in or beside it."""
    places = [checkout / "venv", checkout / ".venv", checkout.with_name(f"{checkout.name}-venv")]
    found = [place / "bin" / "python" for place in places if (place / "bin" / "python").exists()]
    return Path(os.environ.get("COMFYUI_PYTHON") or (found[0] if found else sys.executable))


def make_base(base: Path) -> Path:
    """A fresh ComfyUI data folder with this repository as a custom node, and nothing else.

    The checkout itself is left as it is.
    """
    for name in ("models/checkpoints", "models/loras", "models/controlnet", "input", "output", "user", "custom_nodes"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / "lcm-suite"
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)
    return base


def export_into(base: Path) -> Path:
    """Export the embedded model into a data folder, for ComfyUI's own loaders."""
    export = [sys.executable, "-m", "lcm_core", "export", "--to", "comfyui", "--path", str(base)]
    subprocess.run(export, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return base


class Server:
    """`with Server(checkout, base) as server:` runs ComfyUI on a free port of 127.0.0.1 until the block ends."""

    def __init__(self, checkout: Path, base: Path, *options: str) -> None:
        self.checkout, self.base, self.options = checkout, base, options
        self.log = base / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        command = [str(find_python(self.checkout)), "main.py", "--cpu", "--listen", "127.0.0.1"]
        command += ["--port", str(self.port), "--base-directory", str(self.base), "--disable-auto-launch"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # as a user would start it
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *self.options], cwd=self.checkout, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.is_alive():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"ComfyUI did not start; its last words:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def is_alive(self) -> bool:
        """Whether the server answers."""
        try:
            self.get("/system_stats")
        except OSError:
            return False
        return True

    def get(self, path: str) -> Any:
        """JSON from the server."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue a workflow in API format and wait for it.

        Returns:
            What each output node gave, by node id, e.g. {"9": {"images": [{"filename": ...}]}}.

        Raises:
            PromptError: refused, or a node failed.
        """
        number = self.queue(prompt)
        return self.wait(number)

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a workflow in API format; returns its id."""
        body = json.dumps({"prompt": prompt}).encode()
        request = urllib.request.Request(f"{self.url}/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                told = json.load(answer)
        except urllib.error.HTTPError as error:
            details = json.load(error)
            raise PromptError(f"ComfyUI refused the workflow: {json.dumps(details)[:2000]}", details) from error
        if told["node_errors"]:  # it runs what is left of the workflow
            raise PromptError(f"ComfyUI refused a part of the workflow: {told['node_errors']}", told["node_errors"])
        return told["prompt_id"]

    def wait(self, number: str) -> dict[str, Any]:
        """Wait for a queued workflow; see `run`."""
        deadline = time.monotonic() + PROMPT_SECONDS
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{number}").get(number)
            if entry and (entry["status"]["completed"] or entry["status"]["status_str"] == "error"):
                if entry["status"]["status_str"] != "success":
                    failed = [body for name, body in entry["status"]["messages"] if name == "execution_error"]
                    said = failed[0]["exception_message"] if failed else entry["status"]
                    raise PromptError(str(said), failed[0] if failed else entry["status"])
                return entry["outputs"]
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI died:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)
        raise RuntimeError(f"no end after {PROMPT_SECONDS} s:\n{self.log.read_text()[-3000:]}")

    def file(self, image: dict[str, str]) -> bytes:
        """The bytes of a picture that `run` returned."""
        with urllib.request.urlopen(f"{self.url}/view?{urllib.parse.urlencode(image)}", timeout=60) as answer:
            return answer.read()
