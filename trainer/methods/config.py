"""The settings of each method: a class for each, which has what that method reads and nothing else.

A value that cannot be meant is refused when the settings are made, and a setting that the method does not read is none
of its class. This file loads no other library, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lcm_core.errors import InputError
from trainer.ranges import check_choices, check_ranges

SOLVERS = ("ddim", "dpmpp_2s")
"""The solvers of `lcm_core.diffusion.solver`, which loads torch."""
DISTANCES = ("l2", "huber", "cauchy")
WEIGHTINGS = ("none", "min_snr", "truncated_snr")
TIMESTEP_SAMPLINGS = ("uniform", "lognormal")


@dataclass(frozen=True)
class MethodConfig:
    """What every method reads.

    Raises:
        InputError: a value out of its range, or a w range the wrong way round.
    """

    kind: str = field(default="", init=False)
    """lcd (latent consistency distillation), finetune (the same without a teacher), tcd (trajectory consistency),
    segmented (each phase of the trajectory by itself), flowmap (tcd for a full student that is told where a jump
    ends), dmd2 (distribution matching; begin with a student of lcd) or tdm (the same along a deterministic trajectory,
    for an Euler sampler)."""
    original_steps: int = 50
    """Timesteps on the student's grid; the skip is the distance between two of them, k = T // original_steps. Under tcd
    and segmented, fewer are better where the teacher itself paints well in as few steps."""
    w_min: float = 2.0
    """Smallest guidance w = guidance_scale - 1 that the student learns."""
    w_max: float = 14.0
    """Largest guidance w; equal to w_min for one fixed guidance, as a LoRA needs, which cannot read w."""
    noise_offset: float = 0.0
    """Spread of one more noise number for each whole channel; 0.05 to 0.1 teaches very dark and bright pictures."""

    def __post_init__(self) -> None:
        # the noise schedule of the teacher sets the real limit of original_steps, in `draw_timesteps`
        check_ranges(self, {"original_steps": (1, 100_000), "noise_offset": (0, 1e30)})
        if not 0 <= self.w_min <= self.w_max < float("inf"):
            raise InputError(f"w_min={self.w_min:g}, w_max={self.w_max:g} is no range; use 0 <= w_min <= w_max")


@dataclass(frozen=True)
class ConsistencyConfig(MethodConfig):
    """What all methods read that compare two predictions."""

    loss: str = "huber"
    """Distance between the two predictions: l2, huber or cauchy."""
    huber_c: float = 0.001
    """The c of the Huber and Cauchy distances; 0 takes one that suits the grid (arXiv 2502.01441)."""
    pair_noise: bool = False
    """Give each sample the noise, of all in its batch, that lies nearest; needs scipy."""
    weighting: str = "none"
    """Weight of each timestep's loss by its signal-to-noise ratio: none, min_snr (at most snr_gamma), or
    truncated_snr (at least 1)."""
    snr_gamma: float = 5.0
    """Largest weight under min_snr."""
    timestep_sampling: str = "uniform"
    """Which timesteps are drawn: uniform, or lognormal (noise levels around sigma = 1/3 more often)."""
    grid_jitter: bool = False
    """Shift each sample's timesteps by less than one skip, so that the student also knows those between the grid's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"huber_c": (0, 1e6), "snr_gamma": (1e-6, 1e6)})
        check_choices(self, {"loss": DISTANCES, "weighting": WEIGHTINGS, "timestep_sampling": TIMESTEP_SAMPLINGS})


@dataclass(frozen=True)
class TeacherJumpConfig(ConsistencyConfig):
    """What the methods read whose two predictions are a teacher's jump apart."""

    solver: str = "ddim"
    """The teacher's solver: ddim, or dpmpp_2s (second order, twice the teacher's time)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"solver": SOLVERS})


@dataclass(frozen=True)
class LcdConfig(TeacherJumpConfig):
    """Latent consistency distillation, `trainer.methods.lcd`."""

    kind: str = field(default="lcd", init=False)


@dataclass(frozen=True)
class FinetuneConfig(ConsistencyConfig):
    """Latent consistency fine-tuning, `trainer.methods.finetune`."""

    kind: str = field(default="finetune", init=False)
    diffusion_weight: float = 0.0
    """Weight of the plain denoising loss on the least noisy quarter of the timesteps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"diffusion_weight": (0, 1e6)})


@dataclass(frozen=True)
class TcdConfig(TeacherJumpConfig):
    """Trajectory consistency distillation, `trainer.methods.tcd`."""

    kind: str = field(default="tcd", init=False)
    clean_share: float = 0.0
    """Share of the samples that lead to the clean picture, as all do under lcd; the others end anywhere between."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"clean_share": (0, 1)})


@dataclass(frozen=True)
class FlowMapConfig(TcdConfig):
    """Distillation of a flow map, `trainer.methods.flowmap`."""

    kind: str = field(default="flowmap", init=False)
    clean_share: float = 0.5


@dataclass(frozen=True)
class SegmentedConfig(TeacherJumpConfig):
    """Segmented consistency distillation, `trainer.methods.segmented`."""

    kind: str = field(default="segmented", init=False)
    phases: int = 4
    """Steps that the student will be sampled with: the phases that the trajectory is cut into, or under dmd2 and tdm
    the most steps that it trains for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_phases(self.phases, self.original_steps)


@dataclass(frozen=True)
class DistributionConfig(MethodConfig):
    """What the methods read that compare distributions."""

    phases: int = 4
    """The most steps that the student will be sampled with."""
    critic_updates: int = 5
    """Steps of the critic for each one of the student."""
    consistency_share: float = 0.0
    """Share of the student's loss that is lcd's, which keeps its pictures different from each other: 0 for none, 0.1 to
    0.5 where seeds look alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_phases(self.phases, self.original_steps)
        check_ranges(self, {"critic_updates": (1, 1000), "consistency_share": (0, 1)})

    def consistency(self) -> LcdConfig:
        """The settings of the share that is lcd's."""
        return LcdConfig(self.original_steps, self.w_min, self.w_max, self.noise_offset)


@dataclass(frozen=True)
class Dmd2Config(DistributionConfig):
    """Distribution matching distillation, `trainer.methods.dmd2`."""

    kind: str = field(default="dmd2", init=False)
    gan_weight: float = 0.0
    """Weight of the GAN term in the student's loss, which also looks at real pictures, for U-Nets: 0 for none; the
    paper's authors take 0.001 (SD 1.5), 0.003 (ImageNet) and 0.005 (SDXL)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"gan_weight": (0, 1e6)})


@dataclass(frozen=True)
class TdmConfig(DistributionConfig):
    """Trajectory distribution matching, `trainer.methods.tdm`."""

    kind: str = field(default="tdm", init=False)
    critic_updates: int = 1


METHOD_CONFIGS: dict[str, type[MethodConfig]] = {
    kind.kind: kind
    for kind in (LcdConfig, FinetuneConfig, TcdConfig, SegmentedConfig, FlowMapConfig, Dmd2Config, TdmConfig)
}
"""Name of a method -> the class of its settings."""


def method_config(kind: str, **settings: Any) -> MethodConfig:
    """The settings of a method by its name.

    Raises:
        InputError: an unknown method, a setting that it does not read, or a value out of its range.
    """
    known = config_class(kind)
    for name in settings:
        check_is_read(known, name)
    return known(**settings)


def config_class(kind: str) -> type[MethodConfig]:
    """The class of a method's settings.

    Raises:
        InputError: there is no method of this name.
    """
    if kind not in METHOD_CONFIGS:
        raise InputError(f"unknown method {kind!r}; choose {', '.join(METHOD_CONFIGS)}")
    return METHOD_CONFIGS[kind]


def check_is_read(config: type[MethodConfig], name: str, origin: str = "") -> None:
    """Refuse a setting that a method does not read, if another does.

    Args:
        config: the method's class.
        name: of the setting.
        origin: where it was given, with a colon; begins the message.

    Raises:
        InputError: names the setting, and the methods that read it.
    """
    readers = methods_that_read(name)
    if readers and config.kind not in readers:
        raise InputError(
            f"{origin}{name} is not read by method {config.kind}, but by {', '.join(readers)}; leave it out, or "
            "choose another method"
        )


def methods_that_read(name: str) -> list[str]:
    """Names of the methods that have a setting of this name."""
    return [kind for kind, config in METHOD_CONFIGS.items() if name in defaults_of(config)]


def defaults_of(config: type[MethodConfig]) -> Mapping[str, Any]:
    """What a method reads, with the values where nothing is given."""
    return {entry.name: entry.default for entry in fields(config) if entry.init}


def _check_phases(phases: int, original_steps: int) -> None:
    if not 1 <= phases <= original_steps:
        raise InputError(f"phases={phases} must be 1 to original_steps={original_steps}")
