"""The "LCM Distil" tab without the web UI: start, stop and continue a run of the trainer, and say how it is doing.

A run lives in a folder below `root`, and everything about it is in files there, so nothing is lost when the web UI is
reloaded, restarted or shut down. `distil_runner` looks after the trainer and holds a lock for as long as it lives; one
run at a time, since they would share one GPU.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extension_a1111 import distil_runner
from extension_a1111.architecture import checkpoint_width
from lcm_core.errors import InputError

REPOSITORY = Path(__file__).parents[1]
EMOJI = "emoji"
"""The embedded model, as a teacher."""
PRESETS = (EMOJI, "sd15-lora", "sd21-lora", "sdxl-lora")
"""The trainer's presets that make a LoRA."""
AUTO = "auto"
"""The preset that suits the teacher."""
_PRESET_OF_WIDTH = {768: "sd15-lora", 1024: "sd21-lora", 2048: "sdxl-lora"}  # by the text that the network reads
NEEDED = ("torch", "diffusers", "transformers", "safetensors", "numpy", "PIL", "tqdm")
_NAME = re.compile(r"[\w][\w .-]*")
JOB = "job"
"""Folder inside that of a run, with what is not the trainer's."""
_START_SECONDS = 60.0
_PROBE = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"


@dataclass(frozen=True)
class Places:
    """Where things are, from the web UI's settings."""

    python: str
    """Interpreter that has the trainer's packages."""
    root: Path
    """Folder of all runs."""
    loras: Path
    """The web UI's folder of LoRAs."""


@dataclass(frozen=True)
class Order:
    """What the user asks for in the tab. A number of 0 leaves it to the preset."""

    name: str
    teacher: str = EMOJI
    preset: str = AUTO
    """One of `PRESETS`, or `AUTO`."""
    data: str = ""
    """Folder of pictures with captions; the embedded model has its own."""
    prompts: str = ""
    """Or a file of prompts, for a run without pictures."""
    steps: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    rank: int = 0
    more: str = ""
    """More options of `python -m trainer distill`, as on a command line."""

    @property
    def preset_name(self) -> str:
        """The preset, chosen by the teacher if need be; see `preset_for`."""
        return preset_for(self.teacher) if self.preset in ("", AUTO) else self.preset


def command(order: Order, places: Places) -> list[str]:
    """The command line of a run.

    Raises:
        InputError: something is missing, or the options cannot be read.
    """
    if not _NAME.fullmatch(order.name):
        raise InputError(f"{order.name!r} is no name for files; use letters, digits, - and _")
    is_emoji = order.teacher == EMOJI
    if not is_emoji and not order.data and not order.prompts:
        raise InputError("nothing to learn from; give a folder of pictures with captions, or a file with prompts")
    for path in filter(None, (None if is_emoji else order.teacher, order.data, order.prompts)):
        if not Path(path).exists():
            raise InputError(f"{path} does not exist; check the path")
    try:
        more = shlex.split(order.more)
    except ValueError as error:
        raise InputError(f"the additional options {order.more!r} cannot be read ({error}); check the quotes") from error
    given = {
        "--preset": order.preset_name,
        "--teacher": order.teacher,
        "--name": order.name,
        "--output": str(places.root / order.name),
        "--data": order.data,
        "--prompts": order.prompts,
        "--steps": int(order.steps),
        "--batch-size": int(order.batch_size),
        "--learning-rate": order.learning_rate,
        "--rank": int(order.rank),
    }
    options = [word for flag, value in given.items() if value for word in (flag, str(value))]
    return [places.python, "-m", "trainer", "distill", *options, *more]


def preset_for(teacher: str) -> str:
    """The preset for a teacher, told by the header of its file.

    Raises:
        InputError: a file of another format, or of a network that no preset is for.
    """
    if teacher == EMOJI:
        return EMOJI
    width = checkpoint_width(Path(teacher))
    if width not in _PRESET_OF_WIDTH:
        read = "no U-Net" if width is None else f"a U-Net that reads text of width {width}"
        raise InputError(f"{teacher} has {read}, for which no preset is known; choose a preset yourself")
    return _PRESET_OF_WIDTH[width]


def start(order: Order, places: Places) -> str:
    """Start a run, or continue the one of that name. Returns its name.

    Raises:
        InputError: a run is going on, a wrong setting, a Python without the trainer's packages, or a folder that cannot
            be written; before anything was started.
    """
    words = command(order, places)
    check_idle(places)
    check_python(places.python)
    _check_writable(places.loras, "the LoRA folder")
    _check_writable(places.root, "the folder of the runs")
    run, lora = places.root / order.name, places.loras / f"{order.name}.safetensors"
    if lora.exists() and not run.exists():
        raise InputError(f"{lora} exists already; choose another name")
    job = {
        "command": words,
        "cwd": str(REPOSITORY),
        "lock": str(_lock(places)),
        "result": str(run / f"{order.name}_lora.safetensors"),
        "lora": str(lora),
        "order": order.__dict__,
    }
    with _written(run):
        (run / JOB).mkdir(parents=True, exist_ok=True)
        distil_runner.write(run / JOB / "job.json", job)
        distil_runner.write(places.root / "current.json", {"name": order.name})
        _launch(run / JOB, places)
    return order.name


def resume(places: Places) -> str:
    """Continue the last run with the options that it was started with. Returns its name.

    Raises:
        InputError: there is none, or as `start`.
    """
    name = current(places)
    if name is None:
        raise InputError("there is no run to continue; start one")
    order = read_json(places.root / name / JOB / "job.json").get("order")
    if order is None:
        raise InputError(f"{places.root / name} does not say how it was started; start it again under its name")
    return start(Order(**order), places)


def stop(places: Places) -> None:
    """Ask the run to save and stop; a second time: to stop at once.

    Raises:
        InputError: none is going on.
    """
    name = current(places)
    if name is None or not is_running(places):
        raise InputError("no distillation is running")
    job = places.root / name / JOB
    with _written(job), open(job / "stop", "a", encoding="utf-8") as file:
        file.write("x")
    if not _is_locked(job / distil_runner.RUNNER_LOCK):  # it was killed; the run's lock says that the trainer was not
        distil_runner.interrupt(read_json(job / "pids.json")["trainer"])


def is_running(places: Places) -> bool:
    """Whether a run is alive, whichever web UI has started it."""
    return _is_locked(_lock(places))


def current(places: Places) -> str | None:
    """The name of the run that was started last."""
    name = read_json(places.root / "current.json").get("name")
    return name if name and (places.root / name).is_dir() else None


def check_idle(places: Places) -> None:
    """Raise InputError while a run is going on."""
    if is_running(places):
        raise InputError(f"the distillation '{current(places)}' is running already; stop it first, or wait")


def check_python(python: str) -> None:
    """Refuse an interpreter that cannot run the trainer, and say how to make one that can.

    Raises:
        InputError: there is no such program, or packages are missing.
    """
    pip = Path("distil-venv", "Scripts" if os.name == "nt" else "bin", "pip")
    advice = f'make one with: python -m venv distil-venv, then: {pip} install "{REPOSITORY}[train]"'
    if not python:
        raise InputError(f"no Python for the trainer; name one in Settings > LCM Suite; {advice}")
    try:
        words = [python, "-c", _PROBE, *NEEDED]
        probe = subprocess.run(words, capture_output=True, text=True, timeout=_START_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"the trainer's Python {python!r} does not start ({_reason(error)}); {advice}") from error
    if missing := probe.stdout.split():
        names = " ".join(missing).replace("PIL", "pillow")
        raise InputError(
            f"the trainer's Python {python} lacks {', '.join(missing)}; install: {python} -m pip install {names}"
        )


def _launch(job: Path, places: Places) -> None:
    """Start the runner, and wait until it has the lock."""
    (job / "pids.json").unlink(missing_ok=True)
    own_group: dict[str, Any] = {"creationflags": 0x200} if os.name == "nt" else {"start_new_session": True}
    with open(job / "run.log", "wb") as log:  # of this start alone: an old progress bar would be shown
        runner = subprocess.Popen(
            [places.python, str(Path(distil_runner.__file__)), str(job)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"},
            **own_group,
        )
    deadline = time.monotonic() + _START_SECONDS
    while not (job / "pids.json").exists() and time.monotonic() < deadline:
        if (code := runner.poll()) is not None:
            if code == distil_runner.BUSY:
                raise InputError("a distillation is running already; stop it first, or wait")
            raise InputError(f"the trainer did not start: {_last_line(job / 'run.log')}")
        time.sleep(0.05)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Around what writes into a run's folder: a full disk is said in one line."""
    try:
        yield
    except OSError as error:
        said = f"{folder} cannot be written ({error.strerror}); free some space or choose another folder of the runs"
        raise InputError(said) from error


def _check_writable(folder: Path, what: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # a full disk still makes empty files
    except OSError as error:
        raise InputError(f"{what} {folder} cannot be written ({error.strerror}); choose or free another") from error


def _lock(places: Places) -> Path:
    return places.root / "running.lock"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or none yet."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    lock = distil_runner.take_lock(path)
    if lock is None:
        return True
    lock.close()
    return False


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _reason(error: Exception) -> str:
    said: Sequence[str] = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return said[-1] if said else type(error).__name__
