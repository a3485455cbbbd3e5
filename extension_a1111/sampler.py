"""The two samplers as the host knows them: the grid, guidance and noise of `lcm_core` in its own denoising loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from modules.sd_samplers_kdiffusion import CFGDenoiserKDiffusion, KDiffusionSampler
from torch import Tensor

from extension_a1111 import host
from extension_a1111.architecture import check_loras, network_width
from extension_a1111.denoising import PositiveRows, consistency
from extension_a1111.guidance_embedding import GuidanceHook, no_embedding, read_cond_proj
from extension_a1111.loras import find_loras
from extension_a1111.options import LCM_SAMPLER, TCD_SAMPLER, Options
from extension_a1111.schedules import fit_remarks, fit_steps, fit_strength, get_sigmas_padded
from lcm_core.diffusion.guidance import Model
from lcm_core.diffusion.process import RectifiedFlow, VariancePreserving
from lcm_core.diffusion.samplers import sample_lcm, sample_tcd

SCHEDULE = ("lcm_skip", "LCM Skip")


class SuiteDenoiser(CFGDenoiserKDiffusion):
    """The host's guided denoiser, at whole timesteps, with the guidance embedding and without an idle negative pass."""

    def __init__(self, sampler: SuiteSampler) -> None:
        super().__init__(sampler)
        self.hook = GuidanceHook()
        self.rows = PositiveRows()

    @property
    def inner_model(self) -> Any:
        """The network's denoiser; asked for in every step, after the host may have changed the model (refiner)."""
        is_new = self.model_wrap is None
        model_wrap = super().inner_model
        if is_new:
            host.prepare_denoiser(model_wrap, self.rows)
        if self.hook.is_wanted:
            self.hook.attach(host.unet().get_submodule("time_embed"), read_cond_proj(host.checkpoint_file()))
        return model_wrap

    def forward(
        self, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, cond_scale: float, *args: Any, **kw: Any
    ) -> Any:
        """The network's x0, of the shape of x."""
        self.rows.begin(host.positive_rows(self, x, cond, cond_scale))
        with host.at_scale(self.p, cond_scale):
            return super().forward(x, sigma, uncond, cond, cond_scale, *args, **kw)


class SuiteSampler(KDiffusionSampler):
    """`LCM Suite` and `TCD Suite`.

    Raises:
        InputError: the loaded model is none that LCM or TCD can sample from.
    """

    @host.told()
    def __init__(self, name: str, sd_model: Any) -> None:
        host.check_supported()
        super().__init__(self.run, sd_model)
        self.name = name
        self.model_wrap_cfg = SuiteDenoiser(self)
        self.model_wrap = self.model_wrap_cfg.inner_model
        self.suite = Options()
        self.count = 0
        self.strength = 1.0

    def get_sigmas(self, p: Any, steps: int) -> Tensor:
        """The skipping grid, whatever schedule is chosen: it is the one that these models know."""
        process = host.noise_process(self.model_wrap)
        return get_sigmas_padded(process, self.count or steps, steps, self.suite.original_steps, self.strength)

    @host.told()
    def sample(self, p: Any, x: Tensor, *args: Any, steps: int | None = None, **kwargs: Any) -> Tensor:
        """A new picture from noise `x`."""
        self._begin(p, steps, 1.0)
        if not host.scales_noise_itself():
            # The host multiplies by sigma; unit variance for the network can take another factor.
            sigma = self.get_sigmas(p, self.count)[0]
            x = x * (host.noise_process(self.model_wrap).initial_scale(sigma) / sigma).item()
        return super().sample(p, x, *args, steps=self.count, **kwargs)

    @host.told()
    def sample_img2img(
        self, p: Any, x: Tensor, noise: Tensor, *args: Any, steps: int | None = None, **kwargs: Any
    ) -> Tensor:
        """A picture from latents `x`, all steps at exactly the strength that was asked for; 0 changes nothing."""
        if p.denoising_strength <= 0:
            return x
        self._begin(p, steps, p.denoising_strength)
        # With its steps named, the host uses all of them and not strength * steps.
        return super().sample_img2img(p, x, noise, *args, steps=self.count, **kwargs)

    def launch_sampling(self, steps: int, func: Callable[[], Tensor]) -> Tensor:
        """Run the loop, and leave the network as it was."""
        try:
            return super().launch_sampling(steps, func)
        finally:
            self.model_wrap_cfg.hook.detach()

    def run(
        self,
        model: Model,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """The sampler function that the host calls."""
        process = host.noise_process(self.model_wrap)
        guided, extra_args = self._guided(model, dict(extra_args or {}))
        if self.name == LCM_SAMPLER:
            model = consistency(guided, process) if isinstance(process, VariancePreserving) else guided
            return sample_lcm(model, x, sigmas, extra_args, callback, disable, self._noise, process)
        return sample_tcd(guided, x, sigmas, extra_args, callback, disable, self._noise, process, self.suite.gamma)

    def initialize(self, p: Any) -> dict[str, Any]:
        """Does what the host's does, without eta, which this sampler has not: at 0 its infotext would leave out
        ENSD."""
        extra = super().initialize(p)
        self.eta = None
        return extra

    def _noise(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return self.p.rng.next()  # each picture's noise from that picture's own seed

    def _begin(self, p: Any, steps: int | None, strength: float) -> None:
        read_options = getattr(p, "lcm_suite", Options)
        self.suite = read_options()
        self._fit(p, steps or p.steps, strength)
        if self.suite.guidance is not None:  # the infotext must name what was in force
            p.cfg_scale = self.suite.guidance
            if hasattr(p, "hr_cfg"):
                p.hr_cfg = self.suite.guidance
        p.extra_generation_params.update({**host.unnamed_settings(), **self.suite.infotext(self.name)})
        loras = find_loras(host.prompts_of(p))
        check_loras({lora.name: host.lora_file(lora.name) for lora in loras}, network_width(host.unet()))

    def _fit(self, p: Any, steps: int, strength: float) -> None:
        """Take as many steps as the grid has at this strength; hires fix would else end after its first pass."""
        self.strength, self.count = strength, steps
        if isinstance(host.noise_process(self.model_wrap), RectifiedFlow):
            return  # any strength has any number of steps
        grid = self.suite.original_steps
        self.strength = fit_strength(grid, strength)
        self.count = fit_steps(steps, grid, self.strength)
        for remark in fit_remarks(steps, self.count, strength, self.strength, host.say()):
            p.comment(f"LCM Suite: {remark}")

    def _guided(self, model: Model, extra_args: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
        """A full LCM takes the guidance as an embedding, and the host runs the positive prompt alone."""
        cond_proj = read_cond_proj(host.checkpoint_file())
        scale = host.cfg_scale(self.p) if self.suite.guidance is None else self.suite.guidance
        if cond_proj is None:
            if self.suite.guidance is not None:
                raise no_embedding(host.checkpoint_file())
            return model, extra_args | {"cond_scale": scale}
        guided = self.model_wrap_cfg.hook.guide(model, scale, cond_proj.shape[1])
        return guided, extra_args | {"cond_scale": 1.0}


def register() -> None:
    """Put samplers and schedule into the host's lists; again and again if need be."""
    host.register_schedule(*SCHEDULE)
    host.register_samplers(
        [
            (LCM_SAMPLER, functools.partial(SuiteSampler, LCM_SAMPLER), ["lcm_suite"]),
            (TCD_SAMPLER, functools.partial(SuiteSampler, TCD_SAMPLER), ["tcd_suite"]),
        ]
    )
