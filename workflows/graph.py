"""A workflow in ComfyUI's API format that grows node by node, with the nodes that most examples begin and end with."""

from __future__ import annotations

from typing import Any

Link = list[Any]  # [node id, number of its output]
Prompt = dict[str, dict[str, Any]]
SIZE = 128  # pixels that the embedded model was trained at
FULL_LCM = "emoji (shipped with LCM Suite)"
TEACHER = "emoji teacher (shipped with LCM Suite)"
FLOW = "emoji teacher as a flow model (shipped with LCM Suite)"
LCM_LORA = "emoji LCM-LoRA (shipped with LCM Suite)"
SKETCH = "lcm_suite_sketch.png"
HOLE = "lcm_suite_hole.png"
CONTROL = "emoji_canny.safetensors"


class Graph:
    """A workflow in API format that grows node by node."""

    def __init__(self) -> None:
        self.prompt: Prompt = {}

    def add(self, kind: str, title: str = "", **inputs: Any) -> list[Link]:
        """Add a node; returns links to its outputs (more than it has: the node decides)."""
        number = str(len(self.prompt) + 1)
        self.prompt[number] = {"inputs": inputs, "class_type": kind, "_meta": {"title": title or kind}}
        return [[number, slot] for slot in range(5)]

    def full_lcm(self) -> list[Link]:
        """MODEL, CLIP, VAE of the full LCM."""
        return self.add("LCMCheckpointLoader", "LCM Checkpoint Loader", ckpt_name=FULL_LCM)

    def teacher_with_lora(self, checkpoint: str = TEACHER) -> list[Link]:
        """MODEL, CLIP, VAE of an ordinary checkpoint, the MODEL with an LCM-LoRA."""
        model, clip, vae, *_ = self.any_checkpoint(checkpoint)
        settings = {"lora_name": LCM_LORA, "strength_model": 1.0, "strength_clip": 1.0, "save_as": ""}
        return [self.add("LCMLoraConvert", "LCM-LoRA", model=model, **settings)[0], clip, vae]

    def any_checkpoint(self, checkpoint: str = TEACHER) -> list[Link]:
        """MODEL, CLIP, VAE of an ordinary checkpoint."""
        return self.add("LCMCheckpointLoader", "Any checkpoint", ckpt_name=checkpoint)

    def text(self, clip: Link, text: str, title: str = "Prompt") -> Link:
        """CONDITIONING of a prompt."""
        return self.add("CLIPTextEncode", title, text=text, clip=clip)[0]

    def canvas(self, batch_size: int = 4, size: int = SIZE) -> Link:
        """An empty LATENT."""
        return self.add("EmptyLatentImage", "Size", width=size, height=size, batch_size=batch_size)[0]

    def picture(self, file: str) -> list[Link]:
        """IMAGE and MASK of an input picture."""
        return self.add("LoadImage", "Your picture", image=file)

    def paint(self, model: Link, positive: Link, latent: Link, title: str = "LCM KSampler", **settings: Any) -> Link:
        """LATENT painted by LCM KSampler."""
        usual = {"seed": 1, "steps": 4, "guidance_scale": 0.0, "sampler": "lcm", "strength": 1.0}
        rest = {"gamma": 0.3, "original_steps": 50, "timesteps": ""}
        links = {"model": model, "positive": positive, "latent_image": latent}
        return self.add("LCMKSampler", title, **(usual | rest | settings), **links)[0]

    def scaled(self, image: Link) -> Link:
        """IMAGE in the embedded model's size."""
        settings = {"upscale_method": "area", "width": SIZE, "height": SIZE, "crop": "center"}
        return self.add("ImageScale", "Scale", image=image, **settings)[0]

    def save(self, latent: Link, vae: Link, name: str) -> None:
        """Decode and save."""
        images = self.add("VAEDecode", "VAE Decode", samples=latent, vae=vae)[0]
        self.add("SaveImage", "Save", filename_prefix=f"LCM Suite/{name}", images=images)
