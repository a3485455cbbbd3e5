"""Latents without images: the teacher paints the prompts; and the shipped drawings, whose latents are there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.consistency import Denoiser
from lcm_core.diffusion.grids import get_sigmas_trailing
from lcm_core.diffusion.samplers import initial_latents, initial_noise, sample_dpmpp_2m
from lcm_core.errors import InputError
from lcm_core.pipeline.model import load_model
from lcm_core.pipeline.settings import check_size
from trainer.data.hashing import hash_json, hash_tensors
from trainer.data.items import Skipped
from trainer.data.rows import Rows
from trainer.data.settings import DataConfig
from trainer.data.shards import FORMAT, Contents, Maker
from trainer.data.sources import read_prompts
from trainer.data.teacher import Teacher


class Prompts:
    """Pictures that the teacher paints: DPM-Solver++ 2M under guidance, each from a seed of its own.

    Raises:
        InputError: the prompts or the resolution cannot be used.
    """

    def __init__(self, config: DataConfig, teacher: Teacher, prediction_type: str = "") -> None:
        self.config, self.teacher, self.prediction_type = config, teacher, prediction_type
        self.side = config.resolution or teacher.resolution
        check_size(self.side, self.side, teacher.multiple)
        self.captions = [prompt for prompt in read_prompts(Path(config.prompts)) for _ in range(config.variant_count)]
        self.repeats: Sequence[int] = ()
        self.skipped: Skipped = []

    def identity(self) -> dict[str, Any]:
        """Prompts, all of the teacher but its VAE, and how it paints."""
        return {"prompts": hash_json(self.captions), **self._made_by()}

    def contents(self) -> Contents:
        """The prompt, and the number, which seeds the noise."""
        keys = [f"{number} {prompt}" for number, prompt in enumerate(self.captions)]
        return Contents({"latents": self._made_by(), "format": FORMAT}, lambda: keys)

    def _made_by(self) -> dict[str, Any]:
        config = self.config
        return {
            "text": self.teacher.hash_text(),
            "unet": self.teacher.hash_unet(self.prediction_type),
            "painting": [self.side, config.teacher_steps, config.teacher_guidance, config.teacher_seed],
        }

    def load(self, device: torch.device) -> Maker:
        """Load the teacher."""
        config, source = self.config, self.teacher.source
        words: dict[str, Any] = {"tokenizer": self.teacher.tokenizer, "clip_skip": self.teacher.clip_skip}
        model = load_model(
            self.teacher.name, device, lora=self.teacher.lora_files, vae=self.teacher.vae, unet=source.chosen, **words
        )
        prediction_type = self.prediction_type or model.diffusion.prediction_type
        diffusion = replace(model.diffusion, prediction_type=prediction_type)
        usual = model.settings("dpmpp_2m")
        denoiser, steps = Denoiser(model.unet, diffusion), config.teacher_steps or usual.num_inference_steps
        shape = model.latent_shape(self.side, self.side)
        process = model.process_for(shape, steps)
        sigmas = get_sigmas_trailing(process, steps, terminal=model.terminal)
        scale = config.teacher_guidance or usual.guidance_scale
        time_ids = (self.side, self.side, 0, 0, self.side, self.side)

        @torch.inference_mode()
        def paint(numbers: Sequence[int]) -> Tensor:
            captions = [self.captions[number] for number in numbers]
            cond, uncond = (model.encode(words, self.side, self.side) for words in (captions, [""] * len(captions)))
            guided = model.guided(denoiser, cond, uncond, scale)
            noise = initial_noise([config.teacher_seed + number for number in numbers], shape, model.device)
            x = initial_latents(noise, sigmas[0], process=process)
            return sample_dpmpp_2m(guided, x, sigmas, disable=True, process=process).cpu()

        def make(numbers: Sequence[int]) -> dict[str, Tensor]:
            rows = Rows()
            for start in range(0, len(numbers), config.cache_batch):
                part = numbers[start : start + config.cache_batch]
                rows.add(paint(part).clone(), part, [time_ids] * len(part))
            return rows.tensors([])

        return make


class Shipped:
    """The drawings that the embedded model learnt from, as the latents of its own VAE.

    Raises:
        InputError: the teacher has another VAE.
    """

    def __init__(self, teacher: Teacher) -> None:
        from trainer.recipes.emoji.data import load_entries, load_shipped

        self.teacher = teacher
        self.latents, self.captions = load_shipped()
        if teacher.labels is not None:
            self.captions = [entry.group for entry in load_entries()]
        self.repeats: Sequence[int] = ()
        self.skipped: Skipped = []
        if teacher.hash_vae() != Teacher("emoji").hash_vae():
            raise InputError(f"data emoji goes with teacher emoji alone; give images of your own for {teacher.name}")

    def identity(self) -> dict[str, Any]:
        """The drawings, and the VAE that their latents belong to."""
        return {"shipped": hash_json(self.captions), "latents": hash_tensors({"latents": self.latents})}

    def contents(self) -> None:
        """Nothing is encoded, so that nothing is to be saved."""

    def load(self, device: torch.device) -> Maker:
        """Nothing to load."""
        side = self.teacher.resolution

        def make(numbers: Sequence[int]) -> dict[str, Tensor]:
            rows = Rows(exact=True)
            part = self.latents[list(numbers)]
            rows.add(part, numbers, [(side, side, 0, 0, side, side)] * len(numbers))
            return rows.tensors([])

        return make
