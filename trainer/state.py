"""What a run has to remember to go on after any stop, and how it is told to stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.safetensors import check_checksum, read_safetensors, write_safetensors
from trainer.distributed import is_shared_out, shared_out_like, whole


class Log(NamedTuple):
    """One step."""

    step: int
    loss: float
    learning_rate: float
    seconds: float
    """The seconds that the step took."""
    peak_memory: int
    """The most memory so far, in bytes."""


_SCALE = "loss_scale"  # of a scaled loss, and for how many steps it has been right
STATE, EARLIER_STATE = "state.safetensors", "state-earlier.safetensors"
"""The last state that was saved, and the one before, for when the last is damaged or of too high a learning rate."""


def has_state(folder: Path) -> bool:
    """Whether a run in this folder was saved."""
    return (folder / STATE).exists() or (folder / EARLIER_STATE).exists()


class State:
    """Weights, their average, the optimiser's moments, and the log of all steps; in `state.safetensors`, and as they
    were one save earlier in `state-earlier.safetensors`.

    Attributes:
        updating: true while weights are being changed, when a state would be neither the old nor the new one.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        ema: nn.Module | None,
        writes: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.folder, self.parameters, self.optimizer, self.writes = folder, parameters, optimizer, writes
        self.averages = {} if ema is None else {n: p for n, p in ema.named_parameters() if n in parameters}
        self.log: list[Log] = []
        self.updating = False
        self.saved_step, self.saved_at = 0, time.monotonic()
        self._is_whole = True  # as far as is known, the file of the last state

    @property
    def path(self) -> Path:
        """The file of the last state."""
        return self.folder / STATE

    @property
    def earlier(self) -> Path:
        """The file of the state before."""
        return self.folder / EARLIER_STATE

    @property
    def is_shared_out(self) -> bool:
        """Whether each process has only a part of the weights, so that all of them must save."""
        return is_shared_out(self.parameters.values())

    @property
    def next_step(self) -> int:
        """The step to go on with."""
        return len(self.log)

    def record(self, log: Log) -> None:
        """A step is done."""
        self.log.append(log)
        self.updating = False

    def age(self) -> float:
        """Seconds since the last save."""
        return time.monotonic() - self.saved_at

    def save(self) -> None:
        """Write the state, whole or not at all, if there is anything new; only one process does."""
        if self.next_step != self.saved_step and self.writes:
            tensors = self._tensors()
            log = torch.tensor([tuple(line) for line in self.log], dtype=torch.float64)
            seconds = {"step": str(self.next_step), "seconds": f"{sum(line.seconds for line in self.log):.1f}"}
            if self._is_whole and self.path.exists():
                keep_copy(self.path, self.earlier)
            write_safetensors(self.path, {**tensors, "log": log}, seconds)
            self._is_whole = True
            with atomic_write(self.folder / "log.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(line._asdict()) + "\n" for line in self.log), encoding="utf-8")
        elif self.next_step != self.saved_step and self.is_shared_out:
            self._tensors()  # of which the process that writes needs the parts
        self.saved_step, self.saved_at = self.next_step, time.monotonic()

    def load(self) -> int:
        """Put the saved state back, or the one before where the last is damaged. Returns the step to go on with, 0
        where nothing was saved.

        Raises:
            InputError: both are damaged, or of another network.
        """
        if not has_state(self.folder):
            return 0
        tensors = self._read()
        self._check(tensors)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(shared_out_like(tensors[f"online.{name}"], parameter))
            for name, parameter in self.averages.items():
                parameter.copy_(shared_out_like(tensors[f"ema.{name}"], parameter))
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            field, _, name = rest.partition(".")
            if kind in ("moment", "number"):
                parameter = self.parameters[name]
                # moments in their parameter's own memory layout, which a fused optimiser insists on
                is_each = value.shape == parameter.shape  # else one number for all
                like = parameter if is_each else value.to(parameter.device)
                given = shared_out_like(value, parameter) if is_each else value
                ready = value.item() if kind == "number" else torch.empty_like(like, dtype=value.dtype).copy_(given)
                self.optimizer.state[parameter][field] = ready
        if self.scaler is not None and _SCALE in tensors:
            scale, steps = tensors[_SCALE].tolist()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(steps)})
        rows = tensors["log"].tolist()
        self.log = [Log(int(row[0]), row[1], row[2], row[3], int(row[4])) for row in rows]
        self.saved_step = self.next_step
        return self.next_step

    @contextmanager
    def saved_on_exit(self) -> Iterator[None]:
        """Save at the end and on any exception between two updates of the weights. Weights that are shared out are not
        saved on an exception, of which the other processes may not know."""
        try:
            yield
        except BaseException:
            if not self.updating and not self.is_shared_out:
                self.save()
            raise
        self.save()

    def _read(self) -> dict[str, Tensor]:
        """The tensors of the last state that is whole."""
        try:
            return read_checked(self.path)
        except InputError as error:
            self._is_whole = False  # and must not take the place of the earlier one
            try:
                tensors = read_checked(self.earlier)
            except InputError as second:
                raise InputError(
                    f"no state of this run can be used: {error}; {second}; delete {self.folder} to begin anew"
                ) from error
            what, _, _ = str(error).partition(";")
            warnings.warn(f"{what}; the run goes on from the state before it, {self.earlier}", stacklevel=3)
            return tensors

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"online.{n}": self._ready(p) for n, p in self.parameters.items()}
        tensors |= {f"ema.{n}": self._ready(p) for n, p in self.averages.items()}
        if self.scaler is not None:
            said = self.scaler.state_dict()
            tensors[_SCALE] = torch.tensor([said["scale"], said["_growth_tracker"]], dtype=torch.float64)
        for name, parameter in self.parameters.items():
            for field, value in self.optimizer.state[parameter].items():
                # AdamW counts in tensors, bitsandbytes in plain numbers; each must get its own kind back
                kind = "moment" if isinstance(value, Tensor) else "number"
                tensors[f"{kind}.{field}.{name}"] = self._ready(torch.as_tensor(value))
        return tensors

    def _ready(self, value: Tensor) -> Tensor:
        """A tensor as it is written. Of one that is shared out the process that writes has the whole, in main memory,
        the others nothing."""
        if not is_shared_out([value]):
            return value.detach()
        full = whole(value.detach())
        return full.cpu() if self.writes else full[:0]

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        own = {f"online.{n}": p for n, p in self.parameters.items()} | {f"ema.{n}": p for n, p in self.averages.items()}
        expected = {n: p.shape for n, p in own.items()}
        found = {n: v.shape for n, v in tensors.items() if n.startswith(("online.", "ema."))}
        if expected != found:
            odd = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            raise InputError(
                f"{self.path} was saved by a run with other networks (first difference: '{odd}'); "
                "choose another output folder, or the settings that it was started with"
            )


def load_weights(folder: Path, trained: nn.Module, average: nn.Module | None) -> None:
    """Put what a run has saved into a student's trained weights and into their average.

    Raises:
        InputError: the state is damaged.
    """
    tensors = read_checked(folder / STATE)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.copy_(tensors[f"online.{name}"])
        for name, parameter in () if average is None else average.named_parameters():
            if f"ema.{name}" in tensors:
                parameter.copy_(tensors[f"ema.{name}"])


def read_checked(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, all of them read and compared with its checksum.

    Raises:
        InputError: missing, cut short, or not bit by bit what was written.
    """
    tensors, metadata = read_safetensors(path)
    check_checksum(path, tensors, metadata)
    return tensors


def keep_copy(path: Path, copy: Path) -> None:
    """Give a file a second name, which stays when the first gets another content; where the disk knows no links, its
    content is copied."""
    with atomic_write(copy) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Catch Ctrl-C, and SIGTERM, which job schedulers send. Yields a function that says whether one came.

    The step under way is finished first, so that what is saved is whole; a second signal stops at once. Only a main
    thread may catch signals: in another, whoever runs it must stop the run, e.g. with an exception in its callback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
