"""The ways to distil: each file in `trainer.methods` draws where its jumps end and gives the loss of one sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lcm_core.errors import InputError
from trainer.config import MethodConfig
from trainer.data.cache import Batch
from trainer.methods import finetune, lcd, segmented, tcd
from trainer.methods.shared import Networks, Sample, draw_guidance, draw_noise, draw_timesteps


class Method(NamedTuple):
    """What sets one method apart."""

    draw_end: Callable[[Tensor, Tensor, MethodConfig, int, torch.Generator], Tensor]
    """(t, s, config, T, generator) -> the timestep (B,) at which the two predictions are compared."""
    loss: Callable[[Networks, Sample, Tensor, MethodConfig, str], Tensor]
    """(networks, sample, alphas_cumprod (T,), config, prediction_type) -> (B,)."""
    needs_teacher: bool = True


METHODS = {
    "lcd": Method(lcd.draw_end, lcd.loss),
    "finetune": Method(lcd.draw_end, finetune.loss, needs_teacher=False),
    "tcd": Method(tcd.draw_end, tcd.loss),
    "segmented": Method(segmented.draw_end, tcd.loss),
}


def get_method(config: MethodConfig) -> Method:
    """The method that `config.kind` names.

    Raises:
        InputError: there is none of this name.
    """
    if config.kind not in METHODS:
        raise InputError(f"unknown method {config.kind!r}; choose {', '.join(METHODS)}")
    return METHODS[config.kind]


def make_sample(
    batch: Batch,
    config: MethodConfig,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    batch_size: int | None = None,
    first: int = 0,
) -> Sample:
    """A batch with everything random that its loss needs.

    Of several processes each has its own rows of the whole batch. All draw the same numbers for all rows, so that what
    a row gets does not depend on how many processes there are.

    Args:
        batch: this process's rows, on the CPU.
        config: the method.
        alphas_cumprod: (T,).
        generator: on the CPU.
        batch_size: rows of the whole batch; None where `batch` is all of it.
        first: number of this process's first row.
    """
    latents = batch.latents
    total, rows = batch_size or len(latents), slice(first, first + len(latents))
    t, s = draw_timesteps(total, config, alphas_cumprod, generator)
    end = get_method(config).draw_end(t, s, config, len(alphas_cumprod), generator)
    w = draw_guidance(total, config, generator)
    eps = draw_noise(torch.Size((total, *latents.shape[1:])), config, generator)
    s = torch.maximum(s, end)  # a jump from a shifted grid must not leave its phase
    conditioning, null = batch.conditioning, batch.null_conditioning
    return Sample(latents, eps[rows], t[rows], s[rows], end[rows], w[rows], conditioning, null)
