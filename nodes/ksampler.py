"""LCM KSampler: all in one, right by default."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs
from .host import say, schema
from .sampling import AUTO, Painter, choose_settings, noise_of, read_latent, reporter


class LCMKSampler(io.ComfyNode):
    """Samples a LATENT from MODEL, conditioning and LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="LCMKSampler",
            display_name="LCM KSampler",
            aliases=["ksampler lcm", "latent consistency", "tcd", "few steps", "turbo"],
            description="Paints in 1 to 8 steps with settings that are right for the model: timesteps, guidance and "
            "noise. Text to image, image to image, and inpainting with a latent noise mask.",
            inputs=[
                inputs.model("A full LCM, or a model with an LCM-LoRA. LCM Apply is not needed."),
                inputs.positive(),
                io.Latent.Input("latent_image", tooltip="An empty latent, or an encoded image to paint over."),
                inputs.seed(),
                inputs.steps(),
                inputs.guidance_scale(),
                inputs.model_sampler(),
                inputs.strength(),
                inputs.negative(),
                inputs.gamma(),
                inputs.original_steps(),
                inputs.timesteps(),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The painted latents, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        latent_image: dict[str, Any],
        seed: int = 0,
        steps: int = 4,
        guidance_scale: float = 0.0,
        sampler: str = AUTO,
        strength: float = 1.0,
        negative: Any = None,
        gamma: float = 0.3,
        original_steps: int = 50,
        timesteps: str = "",
    ) -> io.NodeOutput:
        """Sample once."""
        settings, facts = choose_settings(
            model,
            guidance_scale,
            num_inference_steps=steps,
            sampler=sampler,
            strength=strength,
            gamma=gamma,
            original_steps=original_steps,
            timesteps=tuple(inputs.read_list(timesteps, int, "timesteps")) or None,
        )
        latent = read_latent(model, latent_image)
        painter = Painter(model, settings, positive, negative)
        decided = f"guidance {settings.guidance_scale:g}, {settings.sampler}, {painter.steps} steps"
        say(cls, f"{decided}; {facts.describe()}")
        samples = painter.paint(latent, noise_of(latent, seed), reporter(model, painter.steps)(0))
        return io.NodeOutput(latent | {"samples": samples})
