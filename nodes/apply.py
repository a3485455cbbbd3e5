"""LCM Apply: makes any MODEL sample as a latent consistency model, with the host's own samplers too."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs
from .attachments import with_guidance
from .host import say, schema
from .model_patches import inspect_model, with_sampling


class LCMApply(io.ComfyNode):
    """Sampling and guidance on a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="LCMApply",
            display_name="LCM Apply",
            aliases=["ModelSamplingDiscrete lcm", "latent consistency", "fast sampling"],
            description="Makes a MODEL sample as a latent consistency model: with LCM KSampler, or with the stock "
            "KSampler (sampler lcm, scheduler simple). Finds out what the model is and says so; flow "
            "models stay as they are.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="A full LCM (from the LCM Checkpoint Loader), or any model with an LCM-LoRA."
                ),
                inputs.guidance_scale(),
                inputs.original_steps(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="For any sampler node. Use cfg 1 there for a full LCM."),
                io.String.Output(display_name="info", tooltip="What was found out about the model."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, guidance_scale: float = 0.0, original_steps: int = 50) -> io.NodeOutput:
        """Patch a clone."""
        facts = inspect_model(model)
        is_flow = facts.diffusion.prediction_type == "flow"  # whose grid is continuous
        decided = "its own sampling" if is_flow else f"{original_steps} original steps"
        if facts.guidance is not None:
            scale = guidance_scale or facts.guidance_scale
            model = with_guidance(model, scale)
            decided = f"guidance {scale:g} applied, {decided}"
        elif guidance_scale > 1:
            decided += f"; guidance {guidance_scale:g} is for the sampler's cfg, this model has no place for it"
        info = f"{decided}; {facts.describe()}"
        say(cls, info)
        return io.NodeOutput(with_sampling(model, facts, original_steps), info)
