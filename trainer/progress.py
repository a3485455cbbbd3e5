"""What a run shows while it goes on: a progress bar, and curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

    curves = _tensorboard(folder, first) if config.tensorboard and first < config.steps else None
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
            if curves is not None:
                for name, value in {"loss": log.loss, "learning_rate": log.learning_rate, "images/s": speed}.items():
                    curves.add_scalar(name, value, log.step)

        try:
            yield show
        finally:
            if curves is not None:
                curves.close()


def _tensorboard(folder: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first)
