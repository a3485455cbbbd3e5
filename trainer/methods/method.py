"""The ways to distil: each file in `trainer.methods` draws its timesteps and gives the loss of each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.files.recommended import Recommended
from trainer.data.cache import Batch
from trainer.methods import dmd2, finetune, flowmap, lcd, segmented, tcd, tdm
from trainer.methods.config import (
    ConsistencyConfig,
    DistributionConfig,
    FlowMapConfig,
    MethodConfig,
    SegmentedConfig,
    TdmConfig,
    config_class,
)
from trainer.methods.shared import Networks, Sample, draw_guidance, draw_noise, each, pair_noise


class Method(NamedTuple):
    """What sets one method apart."""

    draw: Callable[..., Any]
    """(B, the method's own config, diffusion, generator) -> the timesteps of a batch, a record of its own; dmd2 and tdm
    draw noise too and are told a sample's shape."""
    loss: Callable[[Networks, Sample, Diffusion, Any], Tensor]
    """(networks, sample, diffusion, config) -> (B,)."""
    needs_teacher: bool = True
    needs_critic: bool = False
    """Whether a second network is trained beside the student."""
    needs_end: bool = False
    """Whether the student is told where a jump ends."""


TRAJECTORY_METHODS = ("tcd", "segmented", "flowmap", "tdm")
METHODS = {
    "lcd": Method(lcd.draw, lcd.loss),
    "finetune": Method(lcd.draw, finetune.loss, needs_teacher=False),
    "tcd": Method(tcd.draw, tcd.loss),
    "segmented": Method(segmented.draw, tcd.loss),
    "flowmap": Method(tcd.draw, flowmap.loss, needs_end=True),
    "dmd2": Method(dmd2.draw, dmd2.loss, needs_critic=True),
    "tdm": Method(tdm.draw, tdm.loss, needs_critic=True),
}


def get_method(config: MethodConfig) -> Method:
    """The method that `config.kind` names.

    Raises:
        InputError: there is none of this name.
    """
    return METHODS[config_class(config.kind).kind]


def sampling_of(config: MethodConfig) -> Recommended:
    """How a student wants to be sampled: one of phases, or of a deterministic path, without fresh noise. The usual grid
    needs no mention."""
    grid = None if config.original_steps == MethodConfig.original_steps else config.original_steps
    if config.kind not in TRAJECTORY_METHODS:
        return Recommended("lcm", 4, original_steps=grid)
    steps = config.phases if isinstance(config, (SegmentedConfig, TdmConfig)) else 4
    gamma = 0.0 if isinstance(config, (SegmentedConfig, TdmConfig, FlowMapConfig)) else 0.3
    return Recommended("tcd", steps, gamma, grid)


def make_sample(
    batch: Batch,
    config: MethodConfig,
    diffusion: Diffusion,
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
        diffusion: the teacher's, with the method's `original_steps`.
        generator: on the CPU.
        batch_size: rows of the whole batch; None where `batch` is all of it.
        first: number of this process's first row.
        step: of the training, which decides whose turn it is.
    """
    latents = batch.latents
    total, rows = batch_size or len(latents), slice(first, first + len(latents))
    shape = {"shape": latents.shape[1:]} if isinstance(config, DistributionConfig) else {}
    student_every = config.critic_updates if isinstance(config, DistributionConfig) else 1
    points = get_method(config).draw(total, config, diffusion, generator, **shape)
    w = draw_guidance(total, config, generator)
    eps = draw_noise(torch.Size((total, *latents.shape[1:])), config, generator)
    paired = isinstance(config, ConsistencyConfig) and config.pair_noise
    return Sample(
        x0=latents,
        eps=pair_noise(latents, eps[rows]) if paired else eps[rows],
        points=each(points, lambda drawn: _narrow(drawn[rows])),
        w=w[rows],
        conditioning=batch.conditioning,
        null_conditioning=batch.null_conditioning,
        student_turn=step % student_every == 0,
    )


def _narrow(drawn: Tensor) -> Tensor:
    # drawn in double precision, so that a flow's timesteps are even; not every device has it
    return drawn.float() if drawn.dtype == torch.float64 else drawn
