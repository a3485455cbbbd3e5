"""Finding a model by name or path, and loading all that a pipeline needs of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.process import VariancePreserving
from lcm_core.diffusion.schedule import get_alphas_cumprod, rescale_zero_terminal_snr
from lcm_core.errors import InputError
from lcm_core.files.architecture import SAMPLE_SIZES, check_scheduler
from lcm_core.files.checkpoint import ModelInfo, list_components, read_info
from lcm_core.files.lora import merge, read_lora
from lcm_core.files.lora_keys import Part
from lcm_core.files.recommended import (
    FOLDER_KEY,
    GUIDANCE_KEY,
    SAMPLING_KEY,
    Stated,
    check_sampling,
    read_sampling,
    read_stated,
)
from lcm_core.files.safetensors import read_json, read_metadata
from lcm_core.networks.cpu.optimise import optimise_unet, optimise_vae
from lcm_core.networks.device import choose_device
from lcm_core.networks.text_encoder import TextEncoder, load_text
from lcm_core.networks.tokenizer import read_tokenizer_files, read_tokenizer_folder
from lcm_core.networks.unet import UNet, load_unet
from lcm_core.networks.vae import VAE, load_vae

PathLike = str | os.PathLike[str]
Loras = Sequence[tuple[PathLike, float]]

MODELS = Path(__file__).parents[1] / "models"
"""Models that are shipped with the package; each folder has a model.json."""
CARD = "model.json"
SHIPPED_UNETS = ("lcm", "teacher")
_FEW_STEP_SCHEDULERS = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}
_PAPER_GUIDANCE = 8.0  # of the tables in arXiv 2310.04378
_SCHEDULES = {"squaredcos_cap_v2": "cosine"}  # diffusers' name for it
_CARD_NAMES = {"schedule": "beta_schedule"}
_SDXL_SCALING_FACTOR = 0.13025


@dataclass
class Model:
    """Networks, noise schedule, and what to use where the user says nothing."""

    name: str
    """As the user gave it."""
    unet: UNet
    vae: VAE
    text: TextEncoder
    diffusion: Diffusion
    resolution: int
    """Pixels, along each side, that the model was trained at."""
    sampler: str = "lcm"
    steps: int = 4
    """For the few-step samplers."""
    gamma: float = 0.3
    """Tcd's share of fresh noise in each step."""
    guidance_scale: float = 1.0
    """For the few-step samplers."""
    teacher_guidance_scale: float = 7.5
    teacher_steps: int = 25
    original_steps: int = 50
    is_distilled: bool = True
    """False when nothing says that the model can do with few steps."""
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

    def follow(self, stated: Stated) -> None:
        """Take over what a file states of how to sample."""
        for name, value in stated.sampling.items():
            setattr(self, name, value)

    def encode(self, prompts: Sequence[str], width: int, height: int) -> dict[str, Any]:
        """Conditioning of prompts for a picture of this size."""
        return self.text.encode(prompts, size=(height, width))

    def describe(self) -> dict[str, Any]:
        """Plain JSON values that say which model this is and how it runs."""
        threads = {"threads": torch.get_num_threads()} if self.device.type == "cpu" else {}
        return {
            **self.origin,
            **threads,
            "model": self.name,
            "device": str(self.device),
            "dtype": str(self.unet.dtype).removeprefix("torch."),
            "vae_dtype": str(self.vae.dtype).removeprefix("torch."),
        }


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
    if vae is None and source.vae.is_file() and "vae" not in list_components(source.vae):
        raise InputError(f"{source.vae} has no VAE; give one with --vae PATH (vae=), e.g. that of the model it is from")
    # what is often missing comes first, before seconds of loading
    text = load_text(source.text, place, None if place.type == "cpu" else dtype, tokenizer)
    loaded_vae = _load_vae(vae or source.vae, place, vae_dtype or dtype, memory_format, source.info, own=vae is None)
    network = UNet(load_unet(source.unet, place, dtype, memory_format))
    _check_channels(source.root, network, loaded_vae)
    merge_loras(network, text, files)
    if network.dtype == torch.bfloat16:  # large networks; small ones run in float32, where packing gains nothing
        optimise_unet(network.model)
        optimise_vae(loaded_vae.model)
    origin: dict[str, Any] = {"unet": source.chosen, "vae": vae, "tokenizer": tokenizer}
    model = Model(
        name=os.fspath(name),
        unet=network,
        vae=loaded_vae,
        text=text,
        diffusion=diffusion_of(source.info),
        resolution=_own_size(network, source.info) * loaded_vae.scale,
        origin={key: os.fspath(value) for key, value in origin.items() if value is not None},
    )
    if lora:
        model.origin["lora"] = [[os.fspath(path), float(strength)] for path, strength in lora]
    defaults = _sampling(source, network.guidance_embedding_dim is not None, [path for path, _ in files])
    for key, value in defaults.items():
        setattr(model, key, value)
    return model


@dataclass(frozen=True)
class Source:
    """Where the parts of a model lie; `unet`, `vae` and `text` are the model itself unless it is a shipped one."""

    root: Path
    unet: Path
    vae: Path
    text: Path
    info: ModelInfo
    chosen: str | None = None
    """Which U-Net of a shipped model."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """What its model.json says."""

    def read_tokenizers(self) -> dict[str, dict[str, str]]:
        """The tokenizers in the model's folder, or in the metadata of its file: name to file name to text."""
        if self.root.is_file():
            files = read_tokenizer_files(self.root)
            return {"tokenizer": files} if files else {}
        return {
            name: read_tokenizer_folder(self.root / name)
            for name in ("tokenizer", "tokenizer_2")
            if (self.root / name).is_dir()
        }


def find_source(name: PathLike, unet: str | None = None) -> Source:
    """Find a model by name or path, without loading it.

    Raises:
        InputError: an unknown model, or `unet` given for one that has no choice.
    """
    root = find_model(name)
    if not (root / CARD).is_file():
        if unet is not None:
            raise InputError(f"{name} has one U-Net only; leave out unet '{unet}', which is for shipped models")
        return Source(root, root, root, root, read_info(root))
    chosen = unet or "lcm"
    if chosen not in SHIPPED_UNETS:
        raise InputError(f"unknown unet {unet!r}; choose {' or '.join(SHIPPED_UNETS)}")
    card = read_json(root / CARD)
    folder = root / f"unet_{chosen}"
    schedule = card.get("schedule")
    if not isinstance(schedule, dict) or "prediction_type" not in card:
        raise InputError(f"{root / CARD} has no schedule or prediction_type; get the model again")
    stated: dict[str, Any] = {_CARD_NAMES.get(str(key), str(key)): value for key, value in schedule.items()}
    stated["prediction_type"] = card["prediction_type"]
    check_scheduler(stated, root / CARD)
    names = {field.name for field in fields(ModelInfo)}
    info = replace(read_info(folder), **{name: value for name, value in stated.items() if name in names})
    return Source(root, folder, root / "vae", root / "text_encoder", info, chosen, card)


def find_model(name: PathLike) -> Path:
    """The folder or file that a name stands for.

    Raises:
        InputError: there is none; the message says which there are.
    """
    path = Path(name)
    embedded = {card.parent.name: card.parent for card in sorted(MODELS.glob(f"*/{CARD}"))}
    if os.fspath(name) in embedded:
        return embedded[os.fspath(name)]
    if path.exists():
        return path
    near = sorted(p.name for p in path.parent.glob("*.safetensors"))[:5] if path.parent.is_dir() else []
    known = ", ".join([*(f"'{model}'" for model in embedded), *near]) or "none"
    raise InputError(
        f"unknown model {os.fspath(name)!r}; give the path of a diffusers folder or a .safetensors file (here: {known})"
    )


def merge_loras(unet: UNet, text: TextEncoder, files: Sequence[tuple[Path, float]]) -> None:
    """Merge LoRA files into the U-Net and the text encoders, for good.

    Raises:
        InputError: a file is no LoRA, or one for another architecture.
    """
    if not files:
        return
    loras = [(read_lora(path), strength) for path, strength in files]
    merge(unet.model, loras, keep_originals=False)
    parts: tuple[Part, ...] = ("text_encoder", "text_encoder_2")
    for part, encoder in zip(parts, text.encoders, strict=False):
        merge(encoder.model, loras, part, keep_originals=False)
    text.clear_cache()


def _load_vae(
    path: PathLike,
    device: torch.device,
    dtype: str | torch.dtype | None,
    memory_format: torch.memory_format | None,
    info: ModelInfo,
    own: bool,
) -> VAE:
    vae = load_vae(path, device, dtype, memory_format)
    if not own and info.family == "sdxl" and Path(path).is_file() and "block_out_channels" in vae.model.config:
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


def find_lora(path: PathLike, root: Path) -> Path:
    own = root / "lora"
    named = own / f"{os.fspath(path)}.safetensors"
    if Path(path).exists():
        return Path(path)
    if named.is_file():
        return named
    known = ", ".join(file.stem for file in sorted(own.glob("*.safetensors")))
    raise InputError(
        f"LoRA {os.fspath(path)!r} does not exist; check the path" + (f" (this model's own: {known})" if known else "")
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


def stated_metadata(source: Source, guidance_embedding: bool, loras: Sequence[Path] = ()) -> dict[str, str]:
    """What to write into a copy of a model, with `loras` merged, so that it is sampled like the model itself.

    Args:
        source: the model.
        guidance_embedding: whether its U-Net is a full LCM.
        loras: files.
    """
    sampling = _sampling(source, guidance_embedding, loras)
    metadata = {SAMPLING_KEY: json.dumps(sampling)}
    if guidance_embedding:
        metadata[GUIDANCE_KEY] = str(sampling["guidance_scale"])
    for path in (source.root, *loras):
        stated = _read_stated(path)
        metadata |= {} if stated is None else stated.metadata()
    return metadata


def _sampling(source: Source, guidance_embedding: bool, loras: Sequence[Path]) -> dict[str, Any]:
    """What the model's own files, and those of its LoRAs, say about how to use it, by the names of `SAMPLING`."""
    card = check_sampling(source.card, f"{source.root / CARD}")
    guidance = card.pop("guidance_scale", _PAPER_GUIDANCE)
    values = card
    if guidance_embedding:
        values["guidance_scale"] = values["teacher_guidance_scale"] = guidance
    elif not loras:
        values["is_distilled"] = _read_stated(source.root) is not None
        if source.chosen == "teacher":
            values["sampler"] = "dpmpp_2m"
    own = read_sampling(_read_own(source.root), str(source.root))
    if loras:  # they decide how the model is sampled, and whether in few steps
        own = {name: value for name, value in own.items() if name not in ("sampler", "is_distilled")}
    values |= own
    for path in (source.root, *loras):
        if (stated := _read_stated(path)) is not None:
            values |= stated.sampling
    return values


def _read_own(path: Path) -> dict[str, str]:
    """The metadata of this suite in a file, or in a diffusers folder's scheduler configuration."""
    if path.is_file():
        return read_metadata(path)
    own = _read_scheduler(path).get(FOLDER_KEY, {})
    if not isinstance(own, dict):
        raise InputError(f"{path}: {FOLDER_KEY} of its scheduler holds no JSON object; get the model again")
    return {key: str(value) for key, value in own.items()}


def _read_stated(path: Path) -> Stated | None:
    """What a file or a diffusers folder states; None where it names no few-step sampler."""
    if path.is_file():
        return read_stated(read_metadata(path), str(path))
    content = _read_scheduler(path)
    sampler = _FEW_STEP_SCHEDULERS.get(str(content.get("_class_name")))
    steps = content.get("original_inference_steps")
    usual = {} if sampler is None else Stated(sampler, original_steps=steps).metadata()
    return read_stated(usual | _read_own(path), str(path))


def _read_scheduler(root: Path) -> dict[str, Any]:
    file = root / "scheduler" / "scheduler_config.json"
    return read_json(file) if file.exists() else {}
