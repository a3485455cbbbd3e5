"""The training loop: one step after another, saved so that the same command continues after any stop.

Everything random in step `n` comes from a generator seeded by `(seed, n)`. A run that was killed and continued
therefore sees the same batches and the same noise as one that was not, and no data-loader position has to be saved.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lcm_core.errors import InputError
from lcm_core.files import atomic_write
from lcm_core.weights import read_safetensors, write_safetensors

LossFunction = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class LoopConfig:
    steps: int
    """Optimiser steps in all."""
    batch_size: int
    """Samples in each step."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises from zero."""
    cooldown: float = 0.3
    """The last share of the steps, over which the learning rate falls to zero."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights; smaller at the start, where an average has nothing to remember."""
    seed: int = 0
    """Seeds the batches and the noise of every step."""
    save_every: float = 120.0
    """Seconds between two saved states."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for everything random in one step."""
    # The multiplier keeps the streams of neighbouring seeds apart; a generator hashes its seed anyway.
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """Linear warm-up, a plateau, then a linear fall to zero over the last `cooldown` share of the steps."""
    rise = (step + 1) / max(1, config.warmup_steps)
    fall = (config.steps - step) / max(1.0, config.cooldown * config.steps)
    return config.learning_rate * min(1.0, rise, fall)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, over the parameters that `model` trains."""
    averaged = dict(ema.named_parameters())
    pairs = [(averaged[name], p) for name, p in model.named_parameters() if p.requires_grad]
    torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1.0 - decay)


def train(
    model: nn.Module, loss_fn: LossFunction, config: LoopConfig, folder: Path, ema: nn.Module | None = None
) -> None:
    """Train the parameters of `model` that require gradients, from the last saved state in `folder` to `config.steps`.

    Args:
        model: holds the trained parameters; `loss_fn` calls it.
        loss_fn: (step, generator) -> scalar loss of one batch.
        config: how long and how fast.
        folder: holds `state.safetensors` and `log.jsonl`; running again with the same folder continues there.
        ema: a copy of `model` that follows it as a moving average.

    Raises:
        InputError: the loss is not finite (the last good state stays on disk), or the state is of another model.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    state = _State(folder, parameters, optimizer, ema)
    first = state.load()
    with _progress(config.steps, first, folder.name) as progress, _saved_on_exit(state):
        for step in range(first, config.steps):
            loss = _optimise(step, loss_fn, config, optimizer, parameters)
            if ema is not None:
                update_ema(ema, model, min(config.ema_decay, (1 + step) / (10 + step)))
            state.record(step, loss)
            progress(step, loss)
            if state.age() > config.save_every:
                state.save()


def _optimise(
    step: int,
    loss_fn: LossFunction,
    config: LoopConfig,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
) -> float:
    """One optimiser step. Returns the loss."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    loss = loss_fn(step, step_generator(config.seed, step))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InputError(
            f"the loss became {value} at step {step}; the last good state is kept: lower the learning rate"
        )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


class _State:
    """What a run has to remember: weights, their average, AdamW's moments, the step and the losses."""

    def __init__(
        self,
        folder: Path,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        ema: nn.Module | None,
    ) -> None:
        self.folder, self.parameters, self.optimizer = folder, parameters, optimizer
        self.averages = {} if ema is None else {n: p for n, p in ema.named_parameters() if n in parameters}
        self.next_step, self.losses = 0, list[float]()
        self.seconds = 0.0
        self.saved_step, self.saved_at = 0, time.monotonic()

    @property
    def path(self) -> Path:
        return self.folder / "state.safetensors"

    def record(self, step: int, loss: float) -> None:
        self.next_step = step + 1
        self.losses.append(loss)

    def age(self) -> float:
        return time.monotonic() - self.saved_at

    def save(self) -> None:
        if self.next_step == self.saved_step:
            return
        self.seconds += self.age()
        tensors = {f"online.{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"ema.{n}": p.detach() for n, p in self.averages.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"adam.{k}.{name}": v for k, v in self.optimizer.state[parameter].items()}
        losses = torch.tensor(self.losses, dtype=torch.float64)
        write_safetensors(self.path, {**tensors, "losses": losses}, self._metadata())
        with atomic_write(self.folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps({"step": i, "loss": x}) + "\n" for i, x in enumerate(self.losses)))
        self.saved_step, self.saved_at = self.next_step, time.monotonic()

    def _metadata(self) -> dict[str, str]:
        return {"step": str(self.next_step), "seconds": f"{self.seconds:.1f}"}

    def load(self) -> int:
        """Put the saved state back. Returns the step to go on with, 0 where nothing was saved."""
        if not self.path.exists():
            return 0
        tensors, metadata = read_safetensors(self.path)
        expected = {f"online.{n}" for n in self.parameters} | {f"ema.{n}" for n in self.averages}
        found = {n for n in tensors if n.startswith(("online.", "ema."))}
        if expected != found:
            raise InputError(f"{self.path} was saved by a run with other networks; choose another output folder")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"online.{name}"])
            for name, parameter in self.averages.items():
                parameter.copy_(tensors[f"ema.{name}"])
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                k: tensors[f"adam.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")
            }
        self.losses = tensors["losses"].tolist()
        self.seconds = float(metadata["seconds"])
        self.next_step = self.saved_step = int(metadata["step"])
        return self.next_step


@contextmanager
def _saved_on_exit(state: _State) -> Iterator[None]:
    """Save after the last step, Ctrl-C and SIGTERM, but not after an error: the last good state must stay."""
    with _terminate_as_interrupt():
        try:
            yield
        except KeyboardInterrupt:
            state.save()
            raise
        state.save()


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM, which job schedulers send, into the KeyboardInterrupt of Ctrl-C; only a main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(total: int, first: int, name: str) -> Iterator[Callable[[int, float], None]]:
    """A progress bar with the loss averaged over about the last hundred steps."""
    from tqdm import tqdm

    with tqdm(total=total, initial=first, desc=name, mininterval=5.0, dynamic_ncols=True) as bar:
        average: float | None = None

        def update(step: int, loss: float) -> None:
            nonlocal average
            average = loss if average is None else 0.99 * average + 0.01 * loss
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            bar.update()

        yield update
