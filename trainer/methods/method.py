"""The ways to distil: each file in `trainer.methods` draws its timesteps and gives the loss of each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_core.files.recommended import Stated
from trainer.data.cache import Batch
from trainer.methods import dmd2, finetune, lcd, segmented, tcd
from trainer.methods.config import ConsistencyConfig, Dmd2Config, MethodConfig, SegmentedConfig, config_class
from trainer.methods.shared import Networks, Points, Sample, draw_guidance, draw_noise, pair


class Method(NamedTuple):
    """What sets one method apart."""

    draw: Callable[[int, Any, Tensor, torch.Generator], Points]
    """(B, the method's own config, alphas_cumprod (T,), generator) -> the timesteps of a batch."""
    loss: Callable[[Networks, Sample, Tensor, Any, str], Tensor]
    """(networks, sample, alphas_cumprod (T,), config, prediction_type) -> (B,)."""
    needs_teacher: bool = True
    needs_critic: bool = False
    """Whether a second network learns beside the student."""


TRAJECTORY_METHODS = ("tcd", "segmented")
METHODS = {
    "lcd": Method(lcd.draw, lcd.loss),
    "finetune": Method(lcd.draw, finetune.loss, needs_teacher=False),
    "tcd": Method(tcd.draw, tcd.loss),
    "segmented": Method(segmented.draw, tcd.loss),
    "dmd2": Method(dmd2.draw, dmd2.loss, needs_critic=True),
}


def get_method(config: MethodConfig) -> Method:
    """The method that `config.kind` names.

    Raises:
        InputError: there is none of this name.
    """
    return METHODS[config_class(config.kind).kind]


def sampling_of(config: MethodConfig) -> Stated:
    """How a student wants to be sampled: one of phases from edge to edge, without fresh noise. The usual grid needs no
    mention."""
    grid = None if config.original_steps == MethodConfig.original_steps else config.original_steps
    if config.kind not in TRAJECTORY_METHODS:
        return Stated("lcm", 4, original_steps=grid)
    steps, gamma = (config.phases, 0.0) if isinstance(config, SegmentedConfig) else (4, 0.3)
    return Stated("tcd", steps, gamma, grid)


def make_sample(
    batch: Batch,
    config: MethodConfig,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    batch_size: int | None = None,
    first: int = 0,
    step: int = 0,
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
        step: of the training, which decides whose turn it is.
    """
    latents = batch.latents
    total, rows = batch_size or len(latents), slice(first, first + len(latents))
    points = get_method(config).draw(total, config, alphas_cumprod, generator)
    w = draw_guidance(total, config, generator)
    eps = draw_noise(torch.Size((total, *latents.shape[1:])), config, generator)
    paired = isinstance(config, ConsistencyConfig) and config.pair_noise
    own = pair(latents, eps[rows]) if paired else eps[rows]
    noises = torch.randn(total, points.noises, *latents.shape[1:], generator=generator)
    return Sample(
        x0=latents,
        eps=own,
        t=points.t[rows],
        s=points.s[rows],
        end=points.end[rows],
        w=w[rows],
        conditioning=batch.conditioning,
        null_conditioning=batch.null_conditioning,
        noises=noises[rows],
        path=points.path,
        student_turn=not isinstance(config, Dmd2Config) or step % config.critic_updates == 0,
    )
