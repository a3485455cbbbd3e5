"""Finding a model by name or path, and loading all that a pipeline needs of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.process import VariancePreserving
from lcm_core.diffusion.schedule import get_alphas_cumprod, rescale_zero_terminal_snr
from lcm_core.errors import InputError
from lcm_core.files.architecture import SAMPLE_SIZES
from lcm_core.files.checkpoint import ModelInfo
from lcm_core.files.lora import Lora, check_parts, merge, read_lora
from lcm_core.files.lora_keys import Part
from lcm_core.files.recommended import FEW_STEP_SAMPLERS, Recommended
from lcm_core.files.safetensors import PathLike
from lcm_core.networks.cpu.optimise import optimise_unet, optimise_vae
from lcm_core.networks.device import choose_device
from lcm_core.networks.text_encoder import TextEncoder, load_text
from lcm_core.networks.unet import UNet, load_unet
from lcm_core.networks.vae import VAE, load_vae
from lcm_core.pipeline.options import PictureOptions
from lcm_core.pipeline.settings import Settings
from lcm_core.pipeline.sources import Source, find_lora, find_source, recommended_for

Loras = Sequence[tuple[PathLike, float]]

_SCHEDULES = {"squaredcos_cap_v2": "cosine"}  # diffusers' name for it
_SDXL_SCALING_FACTOR = 0.13025
_TEACHER_USUAL = (25, 7.5)  # steps and guidance scale of the samplers for plain models


@dataclass
class Model:
    """Networks, noise process, and how they want to be sampled."""

    name: str
    """As the user gave it."""
    unet: UNet
    vae: VAE
    text: TextEncoder
    diffusion: Diffusion
    resolution: int
    """Pixels, along each side, that the model was trained at."""
    recommended: Recommended = field(default_factory=Recommended)
    """How its files say that it wants to be sampled."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What to give to `load_model` to get it again."""

    @property
    def device(self) -> torch.device:
        """Where the U-Net is; latents and conditioning belong there too."""
        return self.unet.device

    @property
    def guidance_embedding_dim(self) -> int | None:
        """Width of the guidance embedding of a full LCM; None for a model that wants classifier-free guidance."""
        return self.unet.guidance_embedding_dim

    @property
    def size_multiple(self) -> int:
        """Pixels that the sides of a picture must be multiples of, so that each level of the U-Net halves evenly."""
        return self.vae.scale * 2 ** (len(self.unet.model.config.block_out_channels) - 1)

    @property
    def title(self) -> str:
        """The name, and which of its networks runs."""
        unet = self.origin.get("unet")
        return f"{self.name} ({unet})" if unet else self.name

    def settings(self, sampler: str | None = None) -> Settings:
        """What a picture is painted with where the user says nothing.

        Args:
            sampler: one of `SAMPLERS`; None takes the model's. Steps and guidance depend on its kind.
        """
        said = self.recommended
        sampler = sampler or said.sampler or Settings.sampler
        if sampler in FEW_STEP_SAMPLERS:
            usual = Settings.num_inference_steps, Settings.guidance_scale
            steps, guidance = said.steps, said.guidance_scale
        else:
            usual, steps, guidance = _TEACHER_USUAL, said.teacher_steps, said.teacher_guidance_scale
        return Settings(
            sampler=sampler,
            num_inference_steps=usual[0] if steps is None else steps,
            guidance_scale=usual[1] if guidance is None else guidance,
            width=self.resolution,
            height=self.resolution,
            **said.grid,
        )

    def encode(self, prompts: Sequence[str], width: int, height: int) -> dict[str, Any]:
        """Conditioning of prompts for a picture of this size."""
        return self.text.encode(prompts, size=(height, width))

    def describe(self) -> PictureOptions:
        """Which model this is, and how it runs."""
        return PictureOptions(
            **self.origin,
            threads=torch.get_num_threads() if self.device.type == "cpu" else None,
            model=self.name,
            device=str(self.device),
            dtype=str(self.unet.dtype).removeprefix("torch."),
            vae_dtype=str(self.vae.dtype).removeprefix("torch."),
        )


def load_model(
    name: PathLike = "emoji",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    lora: Loras = (),
    vae: PathLike | None = None,
    unet: str | None = None,
    tokenizer: PathLike | None = None,
    vae_dtype: str | torch.dtype | None = None,
) -> Model:
    """Load a model.

    Args:
        name: "emoji" (shipped with this package), a diffusers folder, or a single .safetensors file.
        device, dtype, memory_format: None chooses the fastest that this machine has. Text is always encoded in float32
            on a CPU.
        lora: files with their strengths, merged into the weights together; a model's own are known by their names.
        vae: another VAE than the model's own, e.g. a tiny one.
        unet: which U-Net of a shipped model: "lcm" (default) or "teacher".
        tokenizer: folder with CLIP's vocab.json and merges.txt, for single files that have none beside them.
        vae_dtype: the VAE's number format; None takes `dtype`, or, when that is None too, chooses.

    Raises:
        InputError: an unknown model, or one with a file that is missing, broken or of another kind.
    """
    source = find_source(name, unet)
    place = choose_device(device)
    files = [(find_lora(path, source.root), strength) for path, strength in lora]
    loras = [(read_lora(path), strength) for path, strength in files]
    opened = source.opened
    if vae is None and opened is not None and "vae" not in opened.names:
        raise InputError(f"{source.vae} has no VAE; give one with --vae PATH (vae=), e.g. that of the model it is from")
    # what is often missing or unfit comes first, before seconds of loading
    text = load_text(opened or source.text, place, None if place.type == "cpu" else dtype, tokenizer)
    loaded_vae = _load_vae(vae, source, place, vae_dtype or dtype, memory_format)
    network = UNet(load_unet(opened or source.unet, place, dtype, memory_format))
    _check_channels(source.root, network, loaded_vae)
    merge_loras(network, text, loras)
    if network.dtype == torch.bfloat16:  # large networks; small ones run in float32, where packing gains nothing
        optimise_unet(network.model)
        optimise_vae(loaded_vae.model)
    said = recommended_for(source, network.guidance_embedding_dim is not None, [path for path, _ in files])
    origin: dict[str, Any] = {"unet": source.chosen, "vae": vae, "tokenizer": tokenizer}
    model = Model(
        name=os.fspath(name),
        unet=network,
        vae=loaded_vae,
        text=text,
        diffusion=diffusion_of(source.info),
        resolution=said.resolution or _own_size(network, source.info) * loaded_vae.scale,
        recommended=said,
        origin={key: os.fspath(value) for key, value in origin.items() if value is not None},
    )
    if lora:
        model.origin["lora"] = [[os.fspath(path), float(strength)] for path, strength in lora]
    return model


def merge_loras(unet: UNet, text: TextEncoder, loras: Sequence[tuple[Lora, float]]) -> None:
    """Merge LoRAs into the U-Net and the text encoders, for good.

    Raises:
        InputError: one is for another architecture.
    """
    if not loras:
        return
    parts: tuple[Part, ...] = ("text_encoder", "text_encoder_2")
    for lora, _ in loras:
        check_parts(lora, ("unet", *parts[: len(text.encoders)]))
    merge(unet.model, loras, keep_originals=False)
    for part, encoder in zip(parts, text.encoders, strict=False):
        merge(encoder.model, loras, part, keep_originals=False)
    text.clear_cache()


def _load_vae(
    given: PathLike | None,
    source: Source,
    device: torch.device,
    dtype: str | torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> VAE:
    vae = load_vae(given or source.opened or source.vae, device, dtype, memory_format)
    if given is None or source.info.family != "sdxl":
        return vae
    if Path(given).is_file() and "block_out_channels" in vae.model.config:
        vae.scaling_factor = _SDXL_SCALING_FACTOR  # a bare file cannot say it, and looks like one of SD 1.x
    return vae


def _own_size(unet: UNet, info: ModelInfo) -> int:
    """Latent pixels along each side that a U-Net was trained at; a configuration may give two sides, or none."""
    size = unet.model.config.sample_size or SAMPLE_SIZES[info.family]
    return size if isinstance(size, int) else max(size)


def _check_channels(root: Path, unet: UNet, vae: VAE) -> None:
    if unet.in_channels != vae.latent_channels:
        raise InputError(
            f"the U-Net of {root} takes {unet.in_channels} channels but the VAE gives {vae.latent_channels}; "
            "give a text-to-image model (not an inpainting one) and a VAE of its family"
        )


def diffusion_of(info: ModelInfo) -> Diffusion:
    """The noise process that a model was trained with, and what it predicts."""
    if info.trained_betas is not None:
        abar = torch.cumprod(1 - torch.tensor(info.trained_betas, dtype=torch.float64), dim=0)
        abar = rescale_zero_terminal_snr(abar) if info.zero_terminal_snr else abar
        return Diffusion(VariancePreserving(abar), info.prediction_type)
    name = _SCHEDULES.get(info.beta_schedule, info.beta_schedule)
    steps, start, end = info.num_train_timesteps, info.beta_start, info.beta_end
    process = VariancePreserving(get_alphas_cumprod(name, steps, start, end, info.zero_terminal_snr))
    return Diffusion(process, info.prediction_type)
