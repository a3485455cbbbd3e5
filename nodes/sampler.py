"""LCM Scheduler and LCM Sampler: the two halves for the host's SamplerCustom and SamplerCustomAdvanced."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from lcm_core.diffusion.grids import get_sigmas_lcm

from . import inputs
from .host import schema
from .model_patches import inspect_model
from .sampling import make_sampler


class LCMScheduler(io.ComfyNode):
    """SIGMAS for few steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="LCMScheduler",
            display_name="LCM Scheduler",
            aliases=["sigmas", "timesteps", "strength", "denoise"],
            description="The noise levels of LCMScheduler for any number of steps, with exact strength for image to "
            "image.",
            inputs=[
                io.Model.Input("model", tooltip="The model whose noise schedule is used."),
                inputs.steps(),
                inputs.strength(),
                inputs.original_steps(),
                inputs.timesteps(),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, model: Any, steps: int = 4, strength: float = 1.0, original_steps: int = 50, timesteps: str = ""
    ) -> io.NodeOutput:
        """Ask lcm_core for the grid."""
        own = inputs.read_list(timesteps, int, "timesteps")
        process = inspect_model(model).diffusion.process
        return io.NodeOutput(get_sigmas_lcm(process, None if own else steps, original_steps, strength, own or None))


class LCMSampler(io.ComfyNode):
    """A SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="LCMSampler",
            display_name="LCM Sampler",
            aliases=["tcd", "consistency sampler", "gamma", "eta"],
            description="The lcm or tcd sampler for SamplerCustom. Each picture's noise depends on its own seed alone.",
            inputs=[inputs.sampler(), inputs.gamma()],
            outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, sampler: str = "lcm", gamma: float = 0.3) -> io.NodeOutput:
        """Wrap lcm_core's function for the host."""
        return io.NodeOutput(make_sampler(sampler, gamma))
