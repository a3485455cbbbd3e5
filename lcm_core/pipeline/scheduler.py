"""This suite's samplers as a scheduler for diffusers' own pipelines: Stable Diffusion, XL, SD3, Flux and their kin.

>>> pipe.scheduler = LCMSuiteScheduler.from_config(pipe.scheduler.config)  # doctest: +SKIP
>>> pipe("a red apple", num_inference_steps=4, guidance_scale=1.0)  # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_sigmas_lcm, get_sigmas_trailing
from lcm_core.diffusion.process import Process, RectifiedFlow
from lcm_core.diffusion.samplers import sample_euler, sample_lcm, sample_tcd
from lcm_core.errors import InputError
from lcm_core.files.components import ModelInfo
from lcm_core.files.recommended import FEW_STEP_SAMPLERS
from lcm_core.pipeline.model import diffusion_of

SAMPLERS = {"lcm": sample_lcm, "tcd": sample_tcd, "euler": sample_euler}
"""The samplers whose steps need nothing of the step before."""
_FLOW_NAMES = ("flow", "flow_prediction")


class LCMSuiteScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Samples a consistency model, or any other, in one to a few steps; a drop-in for diffusers' schedulers.

    `from_config` takes the configuration of any scheduler of diffusers: what it says of the noise schedule and of the
    prediction is kept; of a flow-matching one, its shift.

    Args:
        prediction_type: epsilon, v_prediction, sample, or flow (flow_prediction).
        shift: of a flow's timesteps; see `RectifiedFlow`.
        use_dynamic_shifting: the pipeline computes a flow's shift from the picture's size, and gives it as mu.
        sampler: lcm, tcd or euler (deterministic).
        original_inference_steps: points of the grid that the distillation knew.
        gamma: of tcd: share of fresh randomness, "eta" in diffusers.
        timestep_scaling: of lcm's boundary scalings.

    Raises:
        InputError: an unknown sampler, prediction type or schedule.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        sampler: str = "lcm",
        original_inference_steps: int = 50,
        gamma: float = 0.3,
        timestep_scaling: float = 10.0,
    ) -> None:
        if sampler not in SAMPLERS:
            raise InputError(f"unknown sampler {sampler!r}; choose {', '.join(SAMPLERS)}")
        self.diffusion = self._diffusion(shift)
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self._begin_index: int | None = None
        self._step_index: int | None = None

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> LCMSuiteScheduler | tuple[LCMSuiteScheduler, dict[str, Any]]:
        """The scheduler for the model that another scheduler's configuration describes."""
        # diffusers' schedulers of flows state a shift and no betas, and do not state a prediction
        if isinstance(config, Mapping) and "shift" in config and "beta_start" not in config:
            kwargs.setdefault("prediction_type", "flow")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        """Training timesteps."""
        return int(self._settings.num_train_timesteps)

    @property
    def _settings(self) -> Any:
        """The configuration, whose names no type checker sees."""
        return self.config

    @property
    def is_flow(self) -> bool:
        """Whether the model is a rectified flow."""
        return self._settings.prediction_type in _FLOW_NAMES

    @property
    def step_index(self) -> int | None:
        """Number of the step that comes next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the step that a pipeline begins with; None for that of the first timestep it asks with."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Tell which step comes first; image to image leaves out the noisiest."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the grid: the skipping grid of latent consistency models, the trailing one for euler, or your own.

        Args:
            timesteps: falling; see `get_sigmas_lcm`, and `get_sigmas_trailing` for euler without these.
            sigmas: of a flow, falling in (0, 1], before the shift; what Flux's pipeline gives is the even grid.
            mu: log of the shift, from pipelines that compute it from the picture's size.
            strength: share of the grid's noisy end that is left out is 1 - strength.

        Raises:
            InputError: a grid out of order or range, or `sigmas` for a model that is no flow.
        """
        self.diffusion = self._diffusion(self._settings.shift if mu is None else math.exp(mu))
        process = self.diffusion.process
        if sigmas is not None:
            timesteps = self._shifted(sigmas, process)
        if timesteps is None and self._settings.sampler not in FEW_STEP_SAMPLERS:
            self.sigmas = get_sigmas_trailing(process, num_inference_steps or 0, strength).double()
        else:
            points = original_inference_steps or self._settings.original_inference_steps
            steps = None if timesteps is not None else num_inference_steps
            self.sigmas = get_sigmas_lcm(process, steps, points, strength, timesteps).double()
        grid = process.sigma_to_t(self.sigmas[:-1])
        self.timesteps = (grid.float() if self.is_flow else grid.round().long()).to(device or "cpu")
        self._step_index = None
        self._begin_index = None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample, like it: it is in the network's own scale already."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = a x0 + b eps at timesteps (B,), like original_samples."""
        t = timesteps.to(original_samples.device)
        t = t.float() if self.is_flow else t.long()
        return self.diffusion.noise(original_samples, noise, t.reshape(-1)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, by the name that pipelines of flows call it."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step of the sampler, from `sample` at `timestep` to the next one of the grid.

        Args:
            model_output: the network's, (B, ...).
            sample: what the network saw, (B, ...).
            generator: of lcm's and tcd's noise.

        Raises:
            InputError: `set_timesteps` was not called, or the timestep is none of the grid's.
        """
        index = self._index(timestep)
        pair = self.sigmas[index : index + 2].to(torch.float64 if sample.dtype == torch.float64 else torch.float32)
        process, x_t = self.diffusion.process, sample.to(pair.dtype)
        t = process.sigma_to_t(pair[:1].to(sample.device)).expand(len(sample))
        denoise = self.diffusion.f if self._settings.sampler == "lcm" else self.diffusion.x0
        denoised = denoise(model_output.to(x_t.dtype), x_t, t if self.is_flow else t.round().long())

        def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
            return randn_tensor(sample.shape, generator, sample.device, model_output.dtype).to(x_t.dtype)

        run = SAMPLERS[self._settings.sampler]
        if self._settings.sampler == "tcd":
            run = partial(sample_tcd, gamma=self._settings.gamma)
        before, after = (float(scale) for scale in self._scale(pair))
        x = run(lambda x, sigma: denoised, x_t / before, pair, disable=True, noise_sampler=noise, process=process)
        self._step_index = index + 1
        moved = (x * after).to(sample.dtype)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _diffusion(self, shift: float) -> Diffusion:
        said = self._settings
        info = ModelInfo(
            "sd1",
            prediction_type="flow" if self.is_flow else said.prediction_type,
            zero_terminal_snr=said.rescale_betas_zero_snr,
            beta_schedule=said.beta_schedule,
            beta_start=said.beta_start,
            beta_end=said.beta_end,
            num_train_timesteps=said.num_train_timesteps,
            trained_betas=None if said.trained_betas is None else tuple(said.trained_betas),
            shift=shift,
        )
        steps, scaling = said.original_inference_steps, said.timestep_scaling
        return replace(diffusion_of(info), original_steps=steps, timestep_scaling=scaling)

    def _shifted(self, sigmas: Sequence[float], process: Process) -> Tensor:
        if not isinstance(process, RectifiedFlow):
            raise InputError("sigmas were given, but the model is no flow; give timesteps")
        return process.num_train_timesteps * process.shifted(torch.as_tensor(sigmas, dtype=torch.float64))

    def _scale(self, sigmas: Tensor) -> Tensor:
        """What a sampler's x is multiplied by to become what the network sees, like sigmas."""
        process = self.diffusion.process
        return torch.ones_like(sigmas) if process.reaches_pure_noise else process.network_scales(sigmas)[0]

    def _index(self, timestep: Tensor | float) -> int:
        if not len(self.timesteps):
            raise InputError("set_timesteps was not called; call it before the first step")
        if self._step_index is not None and self._step_index < len(self.timesteps):
            return self._step_index
        if self._begin_index is not None:
            return self._begin_index
        found = (self.timesteps.cpu().double() - float(timestep)).abs().argmin()
        if abs(float(self.timesteps[found]) - float(timestep)) > 0.5:
            raise InputError(f"timestep {float(timestep):g} is none of the grid's: {self.timesteps.tolist()}")
        return int(found)
