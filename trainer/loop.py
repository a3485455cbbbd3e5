"""The training loop: one step after another, saved so that the same command continues after any stop.

Everything random in step `n` comes from a generator seeded by `(seed, n)`. A run that was killed and continued
therefore sees the same batches and the same noise as one that was not, and no data-loader position has to be saved;
and of several processes each takes its rows of the one batch, so that their number does not change the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcm_core.errors import InputError
from trainer.config import LoopConfig
from trainer.distributed import Gradients, Processes, own_part, whole
from trainer.machine import peak_memory
from trainer.progress import show_progress
from trainer.ranges import check_choices
from trainer.state import Log, State, stop_requests

__all__ = ["Diverged", "LoopConfig", "LossFunction", "learning_rate_at", "step_generator", "train", "update_ema"]

OPTIMIZERS = ("adamw", "adamw8bit")
SCHEDULES = ("trapezoid", "constant", "linear", "cosine")
LossFunction = Callable[[int, torch.Generator], Tensor | Iterable[Tensor]]
"""(step, generator) -> the batch's scalar loss; or parts of it to be added up, each freed before the next is asked for.
Of several processes each gives its own share, and the sum over all is the loss."""
AfterStep = Callable[[int, float], None]
"""(step, loss), after each step. It may raise to end the run, whose state is saved then."""


class Diverged(InputError):
    """A loss or gradient that is not finite. The message is for the command line; a host says it in its own words.

    Args:
        what: what became what.
        step: the step.
        path: of the saved state.
        saved_step: the step to which that goes back.
    """

    def __init__(self, what: str, step: int, path: Path, saved_step: int) -> None:
        super().__init__(
            f"the {what} at step {step}; {path} keeps the last good state, of step {saved_step}: "
            "lower the learning rate with --learning-rate, and the same command goes on from there, or with --back-to "
            "from an earlier checkpoint; or look for broken pictures in the data"
        )
        self.what, self.step, self.saved_step = what, step, saved_step


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for everything random in one step."""
    # The multiplier keeps the streams of neighbouring seeds apart; a generator hashes its seed anyway.
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """The learning rate of a step: a linear warm-up, then what `lr_schedule` says.

    Both are bounds, so that a warm-up longer than the run still ends at zero where the schedule does.
    """
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = min(1.0, (config.steps - step) / max(1, config.steps - config.warmup_steps))
    if config.lr_schedule == "constant":
        return config.learning_rate * rise
    if config.lr_schedule == "linear":
        return config.learning_rate * min(rise, left)
    if config.lr_schedule == "cosine":
        return config.learning_rate * min(rise, (1 - math.cos(math.pi * left)) / 2)
    fall = (config.steps - step) / max(1.0, config.cooldown * config.steps)
    return config.learning_rate * min(rise, fall)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, over the parameters that `model` trains."""
    averaged = dict(ema.named_parameters())
    pairs = [(own_part(averaged[name]), own_part(p)) for name, p in model.named_parameters() if p.requires_grad]
    torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1.0 - decay)


def train(
    model: nn.Module,
    loss_fn: LossFunction,
    config: LoopConfig,
    folder: Path,
    ema: nn.Module | None = None,
    callback: AfterStep | None = None,
    processes: Processes | None = None,
    critic: nn.Module | None = None,
    scales_loss: bool = False,
) -> None:
    """Train the parameters of `model` that require gradients, from the last saved state in `folder` to `config.steps`.

    The state is saved every `config.save_every` seconds, at the end, on Ctrl-C and SIGTERM (once the step is done), and
    when `loss_fn` or `callback` raises.

    Args:
        model: holds the trained parameters; `loss_fn` calls it.
        loss_fn: the loss of one step's batch; see `LossFunction`.
        config: how long and how fast.
        folder: holds `state.safetensors` and `log.jsonl`; running again with the same folder continues there.
        ema: a copy of `model` that follows it as a moving average.
        callback: called after each step, in the main process.
        processes: those that share the work; None for this one alone.
        critic: a second module that is trained beside it, with gradients clipped by themselves. Of the two, one that
            has no part in a step's loss rests.
        scales_loss: for gradients in float16: multiply the loss by a factor that falls when they overflow, in which
            case the step is left out, and rises when they have not for long.

    Raises:
        Diverged: the loss is not finite; the last good state stays on disk.
        InputError: the state is of another model.
        KeyboardInterrupt: stopped by a signal; the state is saved.
    """
    processes = processes or Processes()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = list(parameters.values())
    critics = {} if critic is None else {f"critic.{name}": p for name, p in critic.named_parameters()}
    device = next(iter(parameters.values())).device
    optimizer = make_optimizer([list(group.values()) for group in (parameters, critics) if group], config)
    parameters |= critics
    gradients = Gradients([model] if critic is None else [model, critic], processes, config.accumulation)
    scaler = torch.amp.GradScaler(device.type, enabled=scales_loss)
    state = State(folder, parameters, optimizer, ema, processes.is_main, scaler)
    first = state.load()
    with (
        torch.inference_mode(False),  # in which some hosts run everything
        torch.enable_grad(),
        stop_requests() as stopping,
        state.saved_on_exit(),
        show_progress(config, first, folder, processes) as show,
    ):
        for step in range(first, config.steps):
            started = time.monotonic()
            stop = float(stopping())
            losses = loss_fn(step, step_generator(config.seed, step))
            own = gradients.add([losses] if isinstance(losses, Tensor) else losses, scaler)
            due = float(processes.is_main and state.age() > config.save_every)
            loss, stop, due = processes.total([own, stop, due])  # all processes save at once, or none
            state.updating = True
            moved = any(p.grad is not None for p in trained)  # a critic may have the step to itself
            _update(step, loss, config, optimizer, state, scaler)
            if ema is not None and moved:
                update_ema(ema, model, min(config.ema_decay, (1 + step) / (10 + step)))
            log = Log(step, loss, learning_rate_at(step, config), time.monotonic() - started, peak_memory(device))
            state.record(log)
            show(log)
            if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
                state.save()
            if callback is not None and processes.is_main:
                callback(step, loss)
            if stop:
                state.save()
                raise KeyboardInterrupt
            if due:
                state.save()


def make_optimizer(groups: list[list[nn.Parameter]], config: LoopConfig) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with moments of 8 bits, over groups of parameters.

    Raises:
        InputError: unknown, or not installed.
    """
    parameters = [{"params": group} for group in groups]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (0.9, config.adam_beta2),
        "weight_decay": config.weight_decay,
    }
    check_optimizer(config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings, fused=True)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return optimizer


def check_optimizer(config: LoopConfig) -> None:
    """Refuse an optimiser that is not here, and a schedule of the learning rate that there is not.

    Raises:
        InputError: unknown, or not installed.
    """
    check_choices(config, {"optimizer": OPTIMIZERS, "lr_schedule": SCHEDULES})
    if config.optimizer == "adamw8bit":
        try:
            import bitsandbytes.optim  # noqa: F401
        except ImportError as error:
            raise InputError("optimizer adamw8bit needs bitsandbytes; install it, or choose adamw") from error


def _clip(parameters: list[nn.Parameter], config: LoopConfig) -> float:
    """Limit the norm of the gradients. Returns what it was, 0 where there are none."""
    if all(parameter.grad is None for parameter in parameters):
        return 0.0
    return float(whole(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))


def _update(
    step: int,
    loss: float,
    config: LoopConfig,
    optimizer: torch.optim.Optimizer,
    state: State,
    scaler: torch.amp.GradScaler,
) -> None:
    """One optimiser step from the gradients at hand."""
    groups = [group["params"] for group in optimizer.param_groups]
    scaler.unscale_(optimizer)
    norm = max(_clip(parameters, config) for parameters in groups)
    # a scaled loss may overflow, for which its scale is made smaller; but not below what plain gradients are
    may_overflow = scaler.is_enabled() and scaler.get_scale() > 1
    if not (math.isfinite(loss) and math.isfinite(norm)) and not may_overflow:
        what = f"loss became {loss}" if not math.isfinite(loss) else f"gradient became {norm}"
        raise Diverged(what, step, state.path, state.saved_step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
