"""One training run of the LCM Distiller: the trainer in the host's process, with what the user sees of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import numpy
import torch
from PIL import Image
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.recommended import Recommended
from lcm_core.files.safetensors import read_json, write_json
from trainer.config import LoopConfig, StudentConfig
from trainer.distill import distill, for_method
from trainer.loop import Diverged
from trainer.methods.config import MethodConfig
from trainer.methods.method import get_method, sampling_of
from trainer.students import Student, lora_student

from .frozen import weights_of
from .inputs import ASK, CONTINUE, START_ANEW
from .lora import save_lora_file
from .loss_plot import draw_loss
from .memory import describe_memory
from .model_patches import Facts, is_unet
from .network import PROMPT, HostNetwork
from .panel import SAVE, STOP, Panel, Show
from .preview import paint_preview
from .student import copy_model, fingerprint, lora_of, name_layers, target_modules
from .training_data import TrainingData

_FAMILIES = {"SD 1.x": "sd1", "SD 2.x": "sd2", "SDXL": "sdxl"}
_TELL_SECONDS = 2.0
_CAPTION_DROPOUT = 0.1
_NO_GRADIENT = "no autograd formula"  # what torch says of an operation of a host's own that has no backward pass


@dataclass
class Run:
    """A run that can be interrupted and continued."""

    model: Any
    """The MODEL to distil; never changed."""
    facts: Facts
    """What is known about it."""
    data: TrainingData
    """What it learns from."""
    vae: Any
    """Decodes previews; None shows rough ones."""
    home: Path
    """Folder of the state, the log and the previews; running again with it goes on."""
    target: Path
    """The LoRA file, written at the end and when the run is interrupted."""
    rank: int
    """The rank of the LoRA."""
    preview_every: int
    """Steps between two previews."""
    if_exists: str
    """What to do with an earlier run of this name that was another one; of `inputs.IF_EXISTS`."""
    tell: Callable[[str], None]
    """Shows a line of text."""
    show: Show = lambda told: None
    """Shows what the page's panel is told."""
    steps: int = 0
    """Asked for, in all."""
    losses: list[float] = field(default_factory=list)
    """The losses of all steps, those before an interruption too."""
    learnt: bool = False
    """Whether there is anything new to keep."""
    before: int = 0
    """Steps that earlier starts had done."""
    told: float = 0.0
    memory: str = ""
    """What the run will take of it."""

    def train(self, method: MethodConfig, loop: LoopConfig) -> dict[str, Tensor]:
        """Train to the last step; returns the LoRA in kohya's layout.

        Raises:
            InputError: the run of this name was another one, memory runs out, the loss is not finite, or the host
                cannot train such a MODEL.
        """
        self.steps = loop.steps
        student, names = self._student(method, loop)
        recommended = sampling_of(method)
        self.losses = self._logged()
        self.before = len(self.losses)
        bar, panel = comfy.utils.ProgressBar(loop.steps), Panel(self.show, loop.steps, self.before)
        picture = self._paint(student, recommended)
        panel.tell(self.losses, before=picture, after=picture)

        def save() -> dict[str, Tensor]:
            state = self._save(student, names, recommended)
            panel.saved = len(self.losses)
            return state

        def callback(step: int, loss: float) -> None:
            self.losses.append(loss)
            self.learnt = True
            sheet = None
            if (step + 1) % self.preview_every == 0 or step + 1 == loop.steps:
                preview = self._preview(student, recommended, step + 1)
                panel.tell(self.losses, after=preview)
                sheet = ("JPEG", self._sheet(preview, loop.steps), None)
            bar.update_absolute(step + 1, loop.steps, sheet)
            if self._tell(step, loop):
                panel.tell(self.losses)
            if panel.wants(SAVE):
                save()
                panel.tell(self.losses)
            if panel.wants(STOP):
                raise comfy.model_management.InterruptProcessingException
            comfy.model_management.throw_exception_if_processing_interrupted()

        try:
            with _own_arithmetic(self.model):
                distill(
                    student,
                    self.data.latents,
                    self.facts.diffusion,
                    method,
                    loop,
                    self.home,
                    _CAPTION_DROPOUT,
                    callback,
                )
        except (comfy.model_management.InterruptProcessingException, comfy.model_management.OOM_EXCEPTION) as error:
            if self.learnt:
                save()
            if isinstance(error, comfy.model_management.OOM_EXCEPTION):
                raise InputError(_out_of_memory(loop, self.rank)) from error
            raise
        except Diverged as error:
            raise InputError(_diverged(error, loop)) from error
        except RuntimeError as error:
            if _NO_GRADIENT not in str(error):
                raise
            raise InputError(
                f"this ComfyUI cannot train {self.facts.family}: a part of it has no gradient here ({error}); try "
                "another version of ComfyUI, or another model"
            ) from error
        else:
            return save()
        finally:
            panel.tell(self.losses, running=False)

    def _student(self, method: MethodConfig, loop: LoopConfig) -> tuple[Student, dict[str, str]]:
        """What learns, ready to, and the names that its layers have in a LoRA file; says what memory it will take."""
        base = copy_model(self.model)
        unet = base.diffusion_model
        self._identify(fingerprint(weights_of(unet)), method, loop)
        names = name_layers(self.model, unet)
        torch.manual_seed(loop.seed)  # of the adapters' first weights
        config = StudentConfig(rank=self.rank, target_modules=target_modules(self.model, unet))
        data, device = self.data, comfy.model_management.get_torch_device()
        diffusion = for_method(self.facts.diffusion, method)
        network = HostNetwork(base, self.model, diffusion, data.prompts, data.shape, device)
        student = lora_student(unet, network, config, loop.ema_decay > 0, with_critic=get_method(method).needs_critic)
        unet.to(device)  # the adapters, where the frozen weights are elsewhere
        rows = data.latents.conditioning[PROMPT][:1].expand(loop.batch_size)
        self.memory = describe_memory(student, {PROMPT: rows}, data.shape, device)
        self.tell(self.memory)
        return student, names

    def summary(self) -> str:
        """What was done, in a line."""
        done = len(self.losses)
        mean = f"loss {sum(self.losses[-50:]) / max(len(self.losses[-50:]), 1):.4g}"
        if self.learnt:
            return f"{done} steps, {mean}"
        return f"nothing to do: {done} of {self.steps} steps were done before, {mean}; raise steps to go on"

    def previews(self) -> Tensor:
        """All previews so far, oldest first, as the host's pictures (N, H, W, 3)."""
        pictures = [Image.open(file) for file in self._previews()]
        size = pictures[-1].size  # earlier ones may have been made without a VAE
        return torch.cat([_as_image(picture.resize(size)) for picture in pictures])

    def loss_picture(self) -> Tensor:
        """The loss plot as the host's picture (1, H, W, 3)."""
        return _as_image(draw_loss(self.losses, len(self.losses)))

    def _identify(self, model: str, method: MethodConfig, loop: LoopConfig) -> None:
        """Note what makes this run what it is, and see whether an earlier one of its name is the same.

        The same run goes on. Another one is asked about, continued with what is new, or replaced. `steps` may be
        raised in any run.
        """
        fixed = {"model": model, "rank": self.rank, "method": method.kind}  # else the learnt weights mean nothing
        data, captions = fingerprint([self.data.latents.latents]), fingerprint(self.data.tensors)
        taught = {"data": data, "captions": captions, "w": method.w_min}
        own = fixed | taught | {"learning rate": loop.learning_rate, "batch size": loop.batch_size, "seed": loop.seed}
        file = self.home / "run.json"
        begun = read_json(file) if file.exists() else own
        changed = [name for name in own if begun.get(name) != own[name]]
        if changed and self.if_exists == START_ANEW:
            self._forget()
        elif changed and (self.if_exists == ASK or not fixed.keys().isdisjoint(changed)):
            raise InputError(self._another(changed, not fixed.keys().isdisjoint(changed)))
        write_json(file, own)

    def _another(self, changed: list[str], other_weights: bool) -> str:
        choices = f"'{START_ANEW}'" if other_weights else f"'{CONTINUE}' or '{START_ANEW}'"
        return (
            f"the run '{self.home.name}' was begun with another {' and '.join(changed)}; set if_exists to {choices}, "
            "choose another output_name, or go back to what it was begun with"
        )

    def _forget(self) -> None:
        """Remove what an earlier run of this name left; the LoRA stays until the new one is written."""
        for left in (*(self.home / name for name in ("state.safetensors", "log.jsonl")), *self._previews()):
            left.unlink(missing_ok=True)

    def _previews(self) -> list[Path]:
        return sorted((self.home / "previews").glob("step-*.png"))

    def _logged(self) -> list[float]:
        file = self.home / "log.jsonl"
        return [json.loads(line)["loss"] for line in file.read_text().splitlines()] if file.exists() else []

    def _tell(self, step: int, loop: LoopConfig) -> bool:
        """Say how far it is, if it is time to; whether it was."""
        now = time.monotonic()
        if now - self.told < _TELL_SECONDS and step + 1 < loop.steps:
            return False
        mean = sum(self.losses[-50:]) / len(self.losses[-50:])
        self.tell(f"step {step + 1} of {loop.steps}, loss {mean:.4g}")
        self.told = now
        return True

    def _save(self, student: Student, names: dict[str, str], recommended: Recommended) -> dict[str, Tensor]:
        state = lora_of(student, names)
        save_lora_file(self.target, state, recommended, _FAMILIES.get(self.facts.family))
        return state

    def _paint(self, student: Student, recommended: Recommended) -> Image.Image:
        return paint_preview(student, recommended, self.data.latents, self.facts.diffusion, self.model, self.vae)

    def _preview(self, student: Student, recommended: Recommended, step: int) -> Image.Image:
        """The same prompt and noise every time; kept in a file."""
        picture = self._paint(student, recommended)
        with atomic_write(self.home / "previews" / f"step-{step:06d}.png") as temporary:
            picture.save(temporary)
        return picture

    def _sheet(self, picture: Image.Image, steps: int) -> Image.Image:
        """A picture beside the loss plot."""
        plot = draw_loss(self.losses, steps)
        side = plot.height
        sheet = Image.new("RGB", (side + plot.width, side), "white")
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (0, 0))
        sheet.paste(plot, (side, 0))
        return sheet


def _own_arithmetic(model: Any) -> AbstractContextManager[object]:
    """Where a host's network may be trained whatever it computes in place: what the backward pass needs is copied
    first. A U-Net does nothing of the kind, and is spared the time."""
    return nullcontext() if is_unet(model) else torch.autograd.graph.allow_mutation_on_saved_tensors()


def _out_of_memory(loop: LoopConfig, rank: int) -> str:
    smaller = f"batch_size {max(loop.batch_size // 2, 1)}" if loop.batch_size > 1 else f"rank {max(rank // 2, 1)}"
    return (
        f"out of memory with batch_size {loop.batch_size} and rank {rank}; use {smaller} or smaller pictures, and "
        "close other programs that use the GPU. What was learnt is kept: queue again to go on"
    )


def _diverged(error: Diverged, loop: LoopConfig) -> str:
    kept = f"'{CONTINUE}', which goes on from step {error.saved_step}, or " if error.saved_step else ""
    return (
        f"the {error.what} at step {error.step}: learning_rate {loop.learning_rate:g} is too high for this MODEL, or "
        f"the data has a broken picture; lower it, and set if_exists to {kept}'{START_ANEW}'"
    )


def _as_image(picture: Image.Image) -> Tensor:
    return torch.from_numpy(numpy.array(picture.convert("RGB"))).float()[None] / 255
