"""What a run shows while it goes on: a progress bar, and curves for TensorBoard and other trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from trainer.config import LoopConfig
from trainer.distributed import Processes
from trainer.state import Log


@contextmanager
def show_progress(
    config: LoopConfig, first: int, folder: Path, processes: Processes
) -> Iterator[Callable[[Log], None]]:
    """A function to be called after each step. Only the main process shows anything."""
    if not processes.is_main:
        yield lambda log: None
        return
    from tqdm import tqdm

    trackers = _open_trackers(config, folder, first) if first < config.steps else []
    with tqdm(total=config.steps, initial=first, desc=folder.name, mininterval=5.0, dynamic_ncols=True) as bar:
        loss: float | None = None
        seconds = 0.0

        def show(log: Log) -> None:
            nonlocal loss, seconds
            loss = log.loss if loss is None else 0.99 * loss + 0.01 * log.loss  # about the last hundred steps
            seconds = log.seconds if not seconds else 0.95 * seconds + 0.05 * log.seconds
            speed, memory = config.batch_size / max(seconds, 1e-9), log.peak_memory / 1e9
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:.3g} images/s, peak {memory:.2f} GB", refresh=False)
            bar.update()
            for tracker in trackers:
                tracker.log({"loss": log.loss, "learning_rate": log.learning_rate, "images/s": speed}, step=log.step)

        try:
            yield show
        finally:
            for tracker in trackers:
                tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not here.

    Raises:
        InputError: unknown, or not installed.
    """
    if not names:
        return
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError as error:
        raise InputError("trackers need accelerate; install it, or leave them out") from error
    here = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"unknown tracker {name!r}; choose from {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in here:
            raise InputError(f"tracker {name} is not installed; pip install {name}, or leave it out")


def _open_trackers(config: LoopConfig, folder: Path, first: int) -> list[Any]:
    trackers: list[Any] = [_TensorBoard(folder, first)] if config.tensorboard and _has_tensorboard() else []
    if config.trackers:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in config.trackers:
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        tracker = kind(folder.resolve().parent.name, **place)
        tracker.start()
        trackers.append(tracker)
    return trackers


def _has_tensorboard() -> bool:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


class _TensorBoard:
    """Curves without a step twice where a run was continued from an earlier state, which accelerate's cannot."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()
