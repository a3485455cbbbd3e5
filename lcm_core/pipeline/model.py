"""Finding a model by name or path, and loading all that a pipeline needs of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.guidance import Model as Denoise
from lcm_core.diffusion.guidance import guide
from lcm_core.diffusion.process import Process, RectifiedFlow, VariancePreserving
from lcm_core.diffusion.schedule import get_alphas_cumprod, rescale_zero_terminal_snr
from lcm_core.errors import InputError
from lcm_core.families.labels import ClassLabels
from lcm_core.families.network import FamilyNetwork
from lcm_core.files.architecture import SAMPLE_SIZES
from lcm_core.files.checkpoint import ModelInfo
from lcm_core.files.lora import check_strengths, read_lora
from lcm_core.files.recommended import FEW_STEP_SAMPLERS, Recommended
from lcm_core.files.safetensors import PathLike
from lcm_core.networks.conditioning import flatten, pad_alike, repeat_alike
from lcm_core.networks.control import Control, load_control
from lcm_core.networks.cpu.optimise import optimise_unet, optimise_vae
from lcm_core.networks.device import choose_device, is_large
from lcm_core.networks.ip_adapter import IPAdapter
from lcm_core.networks.unet import UNet
from lcm_core.networks.vae import VAE
from lcm_core.pipeline.loras import merge_loras
from lcm_core.pipeline.options import PictureOptions
from lcm_core.pipeline.parts import DenoisingNetwork, Text, check_has_vae, open_network, open_text, open_vae
from lcm_core.pipeline.settings import Settings
from lcm_core.pipeline.sources import find_control, find_lora, find_source, recommended_for

Loras = Sequence[tuple[PathLike, float]]
Conditioning = dict[str, Any]

_SCHEDULES = {"squaredcos_cap_v2": "cosine"}  # diffusers' name for it
_TEACHER_USUAL = (25, 7.5)  # steps and guidance scale of the samplers for plain models


@dataclass
class Model:
    """Networks, noise process, and how they want to be sampled."""

    name: str
    """The name that the user gave."""
    unet: DenoisingNetwork
    vae: VAE
    text: Text
    diffusion: Diffusion
    resolution: int
    """Pixels, along each side, that the model was trained at."""
    recommended: Recommended = field(default_factory=Recommended)
    """How its files say that it wants to be sampled."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What to give to `load_model` to get it again."""
    _controls: dict[str, Control | IPAdapter] = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes that it paints; None for a model that reads text."""
        return tuple(self.text.names) if isinstance(self.text, ClassLabels) else None

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
        """Pixels that the sides of a picture must be multiples of: each level of a U-Net halves evenly, a transformer
        takes whole patches."""
        return self.vae.scale * self.unet.multiple

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """(C, h, w) of a picture's latents; of a video model (C, 1, h, w)."""
        frames = (1,) if isinstance(self.unet, FamilyNetwork) and self.unet.family.is_video else ()
        return (self.vae.latent_channels, *frames, height // self.vae.scale, width // self.vae.scale)

    @property
    def is_flow(self) -> bool:
        """Whether noise levels have a shift."""
        return isinstance(self.diffusion.process, RectifiedFlow)

    @property
    def terminal(self) -> float | None:
        """The end of the plain samplers' grid, see `get_sigmas_trailing`."""
        return self.unet.terminal if isinstance(self.unet, FamilyNetwork) else None

    def process_for(self, shape: Sequence[int], steps: int, shift: float | None = None) -> Process:
        """The noise process, of a flow with `shift`, the model's, or what suits latents of this shape and the steps."""
        process = self.diffusion.process
        if not isinstance(process, RectifiedFlow) or not isinstance(self.unet, FamilyNetwork):
            return process
        return replace(process, shift=shift or self.recommended.shift or self.unet.shift(shape, steps))

    @property
    def reads_guidance(self) -> bool:
        """Whether guidance is an input of the network, so that there is no negative pass."""
        return self.unet.reads_guidance or self.guidance_embedding_dim is not None

    def guided(self, denoiser: Denoise, cond: dict[str, Any], uncond: dict[str, Any] | None, scale: float) -> Denoise:
        """A denoiser with its conditioning and guidance, in the way that the network wants it: as an input of its own,
        or by a negative pass."""
        if self.unet.reads_guidance:
            batch = len(next(iter(flatten(cond).values())))
            return guide(denoiser, {**cond, "guidance": torch.full((batch,), scale, device=self.device)}, None)
        if uncond is not None and self.guidance_embedding_dim is None:
            alike = pad_alike if isinstance(self.unet, FamilyNetwork) else repeat_alike
            cond, uncond = alike(cond, uncond)
        return guide(denoiser, cond, uncond, scale, self.guidance_embedding_dim)

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
            if guidance is None and self.unet.reads_guidance:  # a LoRA for few steps has learnt with the usual one
                guidance = said.teacher_guidance_scale
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

    def encode(self, prompts: Sequence[str], width: int, height: int, weighted: bool = False) -> Conditioning:
        """Conditioning of prompts for a picture of this size; `weighted` as in `TextEncoder.encode`."""
        return self.text.encode(prompts, size=(height, width), weighted=weighted)

    def control(self, name: str) -> Control | IPAdapter:
        """A T2I-Adapter, ControlNet or IP-Adapter, by path or by its name beside the model; loaded when first used.

        Raises:
            InputError: there is none of that name, it is broken, or this model takes none.
        """
        if not isinstance(self.unet, UNet):
            raise InputError(f"control {name!r} was given, but {self.name} is no Stable Diffusion model; leave it out")
        if name not in self._controls:
            path = find_control(name, self.name)
            self._controls[name] = load_control(path, self.unet, self.name, self.vae.scale)
        return self._controls[name]

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
    clip_skip: int = 0,
    embedding: Sequence[PathLike] = (),
) -> Model:
    """Load a model.

    Args:
        name: "emoji" (shipped with this package), a diffusers folder, or a single .safetensors file.
        device, dtype, memory_format: None chooses the fastest that this machine has. CLIP always encodes text in
            float32 on a CPU.
        lora: files with their strengths, merged into the weights together; a model's own are known by their names.
        vae: another VAE than the model's own, e.g. a tiny one; "tiny" is the embedded model's.
        unet: which U-Net of a shipped model: "lcm" (default) or "teacher".
        tokenizer: folder with CLIP's vocab.json and merges.txt, for single files that have none beside them.
        vae_dtype: the VAE's number format; None takes `dtype`, or, when that is None too, chooses.
        clip_skip: last layers of a CLIP text encoder to leave out.
        embedding: files of textual inversions; a prompt names one by its file's name without suffix.

    Raises:
        InputError: an unknown model, or one with a file that is missing, broken or of another kind.
    """
    source = find_source(name, unet)
    place = choose_device(device)
    files = [(find_lora(path, source.root), strength) for path, strength in lora]
    loras = [(read_lora(path), strength) for path, strength in files]
    check_strengths(loras)
    check_has_vae(source, vae)
    # what is often missing or unfit comes first, before seconds of loading
    text = open_text(source, place, dtype, tokenizer, clip_skip, embedding)
    loaded_vae = open_vae(source, place, vae_dtype or dtype, memory_format, vae)
    network = open_network(source, place, dtype, memory_format)
    _check_channels(source.root, network, loaded_vae)
    merge_loras(network, text, loras)
    # packing gains nothing in small U-Nets, which run in float32
    if isinstance(network, UNet) and (network.dtype == torch.bfloat16 or is_large(network.model)):
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
        resolution=said.resolution or (network.sample_size or SAMPLE_SIZES[source.info.family]) * loaded_vae.scale,
        recommended=said,
        origin={key: os.fspath(value) for key, value in origin.items() if value is not None},
    )
    if embedding:
        model.origin["embedding"] = [os.fspath(path) for path in embedding]
    if lora:
        model.origin["lora"] = [[os.fspath(path), float(strength)] for path, strength in lora]
    return model


def _check_channels(root: Path, unet: DenoisingNetwork, vae: VAE) -> None:
    if isinstance(unet, UNet) and unet.in_channels != vae.latent_channels:
        raise InputError(
            f"the U-Net of {root} takes {unet.in_channels} channels but the VAE gives {vae.latent_channels}; "
            "give a text-to-image model (not an inpainting one) and a VAE of its family"
        )


def diffusion_of(info: ModelInfo) -> Diffusion:
    """The noise process that a model was trained with, and what it predicts."""
    if info.prediction_type == "flow":
        return Diffusion(RectifiedFlow(info.shift, info.num_train_timesteps), "flow")
    if info.trained_betas is not None:
        abar = torch.cumprod(1 - torch.tensor(info.trained_betas, dtype=torch.float64), dim=0)
        abar = rescale_zero_terminal_snr(abar) if info.zero_terminal_snr else abar
        return Diffusion(VariancePreserving(abar), info.prediction_type)
    name = _SCHEDULES.get(info.beta_schedule, info.beta_schedule)
    steps, start, end = info.num_train_timesteps, info.beta_start, info.beta_end
    process = VariancePreserving(get_alphas_cumprod(name, steps, start, end, info.zero_terminal_snr))
    return Diffusion(process, info.prediction_type)
