"""The "LCM Distil" tab without the web UI: start, stop and continue a run of the trainer, and say how it is doing.

A run lives in a folder below `root`, and everything about it is in files there, so nothing is lost when the web UI is
reloaded, restarted or shut down. `distil_runner` looks after the trainer and holds a lock for as long as it lives; one
run at a time, since they would share one GPU.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from extension_a1111 import distil_runner
from extension_a1111.architecture import checkpoint_width
from extension_a1111.distil_jobs import (
    REPOSITORY,
    check_writable,
    is_locked,
    launch,
    read_json,
    trainer_environment,
    written,
)
from extension_a1111.distil_python import check_python
from extension_a1111.translation import Mistake

EMOJI = "emoji"
"""The embedded model, as a teacher."""
PRESETS = (EMOJI, "sd15-lora", "sd21-lora", "sdxl-lora")
"""The trainer's presets that make a LoRA."""
AUTO = "auto"
"""The preset that suits the teacher."""
_PRESET_OF_WIDTH = {768: "sd15-lora", 1024: "sd21-lora", 2048: "sdxl-lora"}  # by the text that the network reads
_NAME = re.compile(r"[\w][\w .-]*")
SETTINGS = "config.json"
"""File in the folder of a run, where the trainer writes down all of its settings."""
JOB = "job"
"""Folder inside that of a run, with what is not the trainer's."""
_PLAN_SECONDS = 300.0


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
    """A file of prompts instead of pictures, for a run without pictures."""
    steps: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    rank: int = 0
    is_scored: bool = True
    """Whether teacher and student are measured after the training, which can take longer than it."""
    more: str = ""
    """More options of `python -m trainer distill`, as on a command line."""

    @property
    def preset_name(self) -> str:
        """The preset, chosen by the teacher if need be; see `preset_for`."""
        return preset_for(self.teacher) if self.preset in ("", AUTO) else self.preset


def command(order: Order, places: Places, settings: Path | None = None) -> list[str]:
    """The command line of a run.

    Args:
        order: what is asked for.
        places: where things are.
        settings: a file of settings that takes the preset's place, where there is one.

    Raises:
        InputError: something is missing, or the options cannot be read.
    """
    if not _NAME.fullmatch(order.name):
        raise Mistake("'{name}' is no name for files; use letters, digits, - and _.", name=order.name)
    is_emoji = order.teacher == EMOJI
    if not is_emoji and not order.data and not order.prompts:
        raise Mistake("There is nothing to learn from; give a folder of pictures with captions, or a file of prompts.")
    for path in filter(None, (None if is_emoji else order.teacher, order.data, order.prompts)):
        if not Path(path).exists():
            raise Mistake("{path} does not exist; check the path.", path=path)
    try:
        more = shlex.split(order.more)
    except ValueError as error:
        words = "The additional options {options} cannot be read ({reason}); check the quotes."
        raise Mistake(words, options=order.more, reason=error) from error
    is_kept = settings is not None and settings.is_file()
    given = {
        "--config" if is_kept else "--preset": settings if is_kept else order.preset_name,
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
    scores = [] if order.is_scored else ["--samples", "0"]
    return [places.python, "-m", "trainer", "distill", *options, *scores, *more]


def preset_for(teacher: str) -> str:
    """The preset for a teacher, told by the header of its file.

    Raises:
        InputError: a file of another format, or of a network that no preset is for.
    """
    if teacher == EMOJI:
        return EMOJI
    width = checkpoint_width(Path(teacher))
    if width not in _PRESET_OF_WIDTH:
        words = "{teacher} has no U-Net; choose another teacher."
        if width is not None:
            words = "{teacher} has a U-Net that reads text of width {width}; no preset is for it; choose one yourself."
        raise Mistake(words, teacher=teacher, width=width)
    return _PRESET_OF_WIDTH[width]


@dataclass(frozen=True)
class Plan:
    """What a run will need, in the trainer's words for numbers, such as "3.20 GiB" and "12 min"."""

    preset: str
    memory: str
    disk: str
    time: str
    """Empty where nothing like it has been measured."""


def plan(order: Order, places: Places) -> Plan:
    """Ask the trainer what a run will need; nothing is written.

    Raises:
        InputError: as `start`; the trainer's own complaint among them.
    """
    words = [*command(order, places), "--dry-run"]
    check_python(places.python)
    try:
        done = subprocess.run(
            words,
            cwd=REPOSITORY,
            env=trainer_environment(),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PLAN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        late = "The trainer has made no plan in {seconds} s; start the run without one."
        raise Mistake(late, seconds=f"{_PLAN_SECONDS:.0f}") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Mistake("The trainer says: {words}", words=said)
    return read_plan(order.preset_name, done.stdout)


def read_plan(preset: str, text: str) -> Plan:
    """A plan as the trainer prints it."""
    lines = dict(re.findall(r"^(memory|disk|time) +(.*)$", text, re.MULTILINE))
    time = re.fullmatch(r"about (.*) from here on", lines.get("time", ""))  # more follows where a part is unknown
    memory = lines.get("memory", "").removesuffix(" at the peak")
    return Plan(preset, memory, lines.get("disk", ""), time[1] if time else "")


def start(order: Order, places: Places, settings: Path | None = None) -> str:
    """Start a run, or continue the one of that name. Returns its name.

    Args:
        order, places, settings: see `command`.

    Raises:
        InputError: a run is going on, a wrong setting, a Python without the trainer's packages, or a folder that cannot
            be written; before anything was started.
    """
    words = command(order, places, settings)
    check_idle(places)
    check_python(places.python)
    check_writable(places.loras)
    check_writable(places.root)
    run, lora = places.root / order.name, places.loras / f"{order.name}.safetensors"
    if lora.exists() and not run.exists():
        raise Mistake("{lora} exists already; choose another name.", lora=lora)
    job = {
        "command": words,
        "cwd": str(REPOSITORY),
        "lock": str(_lock(places)),
        "result": str(run / f"{order.name}_lora.safetensors"),
        "lora": str(lora),
        "order": order.__dict__,
    }
    with written(run):
        (run / JOB).mkdir(parents=True, exist_ok=True)
        distil_runner.write(run / JOB / "job.json", job)
        distil_runner.write(places.root / "current.json", {"name": order.name})
        launch(run / JOB, places.python)
    return order.name


def resume(places: Places) -> str:
    """Continue the last run with the settings in its folder: its preset may be another since. Returns its name.

    Raises:
        InputError: there is none, or as `start`.
    """
    name = current(places)
    if name is None:
        raise Mistake("There is no run to continue; start one.")
    order = read_json(places.root / name / JOB / "job.json").get("order")
    if order is None:
        words = "{folder} does not say how it was started; start it again under its name."
        raise Mistake(words, folder=places.root / name)
    return start(Order(**order), places, places.root / name / SETTINGS)


def stop(places: Places) -> None:
    """Ask the run to save and stop; a second time: to stop at once.

    Raises:
        InputError: none is going on.
    """
    name = current(places)
    if name is None or not is_running(places):
        raise Mistake("No distillation is running.")
    job = places.root / name / JOB
    with written(job), open(job / "stop", "a", encoding="utf-8") as file:
        file.write("x")
    if not is_locked(job / distil_runner.RUNNER_LOCK):  # it was killed; the run's lock says that the trainer was not
        distil_runner.interrupt(read_json(job / "pids.json")["trainer"])


def is_running(places: Places) -> bool:
    """Whether a run is alive, whichever web UI has started it."""
    return is_locked(_lock(places))


def current(places: Places) -> str | None:
    """The name of the run that was started last."""
    name = read_json(places.root / "current.json").get("name")
    return name if name and (places.root / name).is_dir() else None


def check_idle(places: Places) -> None:
    """Raise InputError while a run is going on."""
    if is_running(places):
        words = "The distillation '{name}' is running already; stop it first, or wait."
        raise Mistake(words, name=current(places))


def _lock(places: Places) -> Path:
    return places.root / "running.lock"
