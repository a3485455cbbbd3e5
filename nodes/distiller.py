"""LCM Distiller: turns the MODEL in the graph into an LCM-LoRA, without touching the MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io

from lcm_core.errors import InputError

from . import inputs
from .attachments import attach_recommended
from .host import say, schema
from .lora import lora_file
from .model_patches import inspect_model
from .panel import send

if TYPE_CHECKING:  # the trainer is loaded when a run begins, so that the host starts without it
    from .training_data import TrainingData


class LCMDistiller(io.ComfyNode):
    """Trains an LCM-LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="LCMDistiller",
            display_name="LCM Distiller",
            aliases=["train lora", "distillation", "TrainLoraNode", "LCM-LoRA"],
            description="Distils a MODEL into an LCM-LoRA that paints in 1 to 8 steps. Learns from a folder of "
            "pictures with captions, or from latents with prompts. Interrupt it at any time: what was learnt is saved, "
            "and queueing the same node again goes on.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to make fast. It is not changed. LoRAs on it are learnt too."
                ),
                io.String.Input(
                    "output_name",
                    default="my_lcm_lora",
                    tooltip="The file in models/loras; also the name to resume by.",
                ),
                io.Int.Input(
                    "steps", default=1000, min=1, max=1000000, tooltip="Training steps in all. Raise to go on."
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=1024,
                    tooltip="Pictures in each step. Lower it if memory runs out.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    round=False,
                    tooltip="1e-4 is safe for large models; small ones take 1e-3.",
                ),
                io.Int.Input("rank", default=64, min=1, max=512, tooltip="Width of the LoRA: 64 is usual, 8 is small."),
                io.Float.Input(
                    "w",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance that the student learns to do without: the teacher's guidance scale minus 1.",
                ),
                io.Combo.Input(
                    "method",
                    options=["lcd", "tcd", "segmented", "dmd2", "finetune"],
                    default="lcd",
                    tooltip="lcd: LCM-LoRA. tcd: for the tcd sampler. segmented: in 4 phases. dmd2: "
                    "matches distributions, with a critic; twice the time. finetune: no teacher.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=50,
                    min=1,
                    max=100000,
                    tooltip="Training steps between two preview pictures.",
                ),
                inputs.seed(),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Pictures with .txt captions, in ComfyUI's input folder or anywhere. Needs clip and vae.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Side of the folder's pictures, in pixels.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the captions of the folder."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the folder's pictures and decodes the previews."),
                io.Latent.Input("latents", optional=True, tooltip="In place of a folder: a batch of encoded pictures."),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="Prompts of the latents: one, or one for each."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The empty prompt, where no clip is connected."
                ),
                io.Combo.Input(
                    "if_exists",
                    options=list(inputs.IF_EXISTS),
                    default=inputs.ASK,
                    optional=True,
                    tooltip="What to do if the run of this name was begun with other data, captions, w, learning rate, "
                    "batch size or seed. ask: stop and say so. continue: go on with the new ones. start anew: replace "
                    "it. The same run always goes on.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the new LoRA, for LCM KSampler."),
                io.LoraModel.Output(display_name="LORA_MODEL", tooltip="The LoRA, for the stock Load LoRA Model."),
                io.String.Output(display_name="lora_name", tooltip="The file in models/loras."),
                io.Image.Output(display_name="previews", tooltip="The same prompt as training went on."),
                io.Image.Output(display_name="loss", tooltip="The loss of every step."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        output_name: str = "my_lcm_lora",
        steps: int = 1000,
        batch_size: int = 4,
        learning_rate: float = 1e-4,
        rank: int = 64,
        w: float = 7.5,
        method: str = "lcd",
        preview_every: int = 50,
        seed: int = 0,
        folder: str = "",
        resolution: int = 512,
        clip: Any = None,
        vae: Any = None,
        latents: dict[str, Any] | None = None,
        positive: Any = None,
        negative: Any = None,
        if_exists: str = inputs.ASK,
    ) -> io.NodeOutput:
        """Gather the data, train a copy, save, and put the result on the MODEL."""
        from trainer.config import LoopConfig
        from trainer.methods.config import method_config
        from trainer.methods.method import sampling_of

        from .training_run import Run

        facts = inspect_model(model)
        if facts.guidance is not None:
            raise InputError("this MODEL is a full LCM already; connect the plain model that you want to make fast")
        if facts.recommended.is_distilled and method != "finetune":  # which needs no teacher
            raise InputError(
                f"this MODEL is made for few steps already ({facts.recommended}); connect the plain model that you "
                "want to make fast, without an LCM-LoRA on it"
            )
        target = lora_file(output_name, "output_name")
        home = Path(folder_paths.get_output_directory(), "lcm_suite", target.stem)
        with torch.inference_mode(False), torch.enable_grad():
            data = _gather(cls, model, clip, vae, folder.strip(), resolution, latents, positive, negative)
            how = method_config(method, w_min=w, w_max=w)
            warmup = min(200, steps // 10)
            loop = LoopConfig(
                steps, batch_size, learning_rate, warmup, seed=seed % 2**31, save_every=60.0, tensorboard=False
            )
            run = Run(
                model=model,
                facts=facts,
                data=data,
                vae=vae,
                home=home,
                target=target,
                rank=rank,
                preview_every=preview_every,
                if_exists=if_exists,
                tell=lambda text: say(cls, text, log=False),
                show=lambda told: send(cls.hidden.unique_id if cls.hidden else None, told),
            )
            state = run.train(how, loop)
        say(cls, f"{run.summary()}; {target.name}")
        model, _ = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0.0)
        attach_recommended(model, sampling_of(how))
        return io.NodeOutput(model, state, target.name, run.previews(), run.loss_picture())


def _gather(
    node: type[io.ComfyNode],
    model: Any,
    clip: Any,
    vae: Any,
    folder: str,
    resolution: int,
    latents: dict[str, Any] | None,
    positive: Any,
    negative: Any,
) -> TrainingData:
    from .training_data import encode_prompts, from_folder, from_latents

    if folder:
        if clip is None or vae is None:
            raise InputError(f"folder {folder} needs clip and vae to be encoded; connect both")
        place = Path(folder_paths.get_input_directory(), folder)  # an absolute path stays what it is
        return from_folder(model, clip, vae, place, resolution, lambda text: say(node, text, log=False))
    if latents is None or positive is None:
        raise InputError("there is nothing to learn from; give a folder of pictures, or connect latents and positive")
    if negative is None and clip is None:
        raise InputError("the empty prompt is missing; connect clip, or an encoded empty prompt as negative")
    null = encode_prompts(clip, [""]) if negative is None else negative
    return from_latents(model, latents, positive, null)
