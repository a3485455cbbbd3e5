"""What the cache has to know of a teacher without loading it: sizes that it can take, and hashes of its networks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lcm_core.cli.common import parse_lora
from lcm_core.errors import InputError
from lcm_core.families.family import Family
from lcm_core.families.labels import ClassLabels
from lcm_core.files.architecture import SAMPLE_SIZES
from lcm_core.files.checkpoint import Component, list_components, read_component
from lcm_core.files.lora import Lora, check_parts, fitting, read_lora
from lcm_core.files.lora_keys import flat_names
from lcm_core.files.safetensors import PathLike, read_safetensors
from lcm_core.networks.ip_adapter import IPAdapter, find_image_encoder, is_ip_adapter, load_ip_adapter
from lcm_core.networks.tokenizer import find_tokenizer
from lcm_core.networks.vae import VAE
from lcm_core.pipeline.loras import merge_into_text
from lcm_core.pipeline.parts import Text, check_clip_skip, check_has_vae, open_labels, open_text, open_vae
from lcm_core.pipeline.sources import CARD, ModelSource, find_control, find_lora, find_model, find_source
from trainer.data.hashing import hash_folder, hash_json, hash_tensors

_FEW_STEPS = 4


def find_teacher(name: PathLike) -> ModelSource:
    """The parts of a model that is to teach; of a shipped one, with its teacher's U-Net.

    Raises:
        InputError: an unknown model.
    """
    return find_source(name, "teacher" if (find_model(name) / CARD).is_file() else None)


def _folders(family: Family) -> list[str]:
    """Text encoders and their tokenizers."""
    return [part for name in family.text_encoders for part in (name, name.replace("text_encoder", "tokenizer"))]


@dataclass(frozen=True)
class Teacher:
    """A teacher, by name or path, and what is used of it in another way than its files say."""

    name: PathLike
    tokenizer: PathLike | None = None
    """Folder of its tokenizer, where it has none of its own."""
    vae: PathLike | None = None
    """Another VAE than its own."""
    clip_skip: int = 0
    """Last layers of its CLIP text encoder that are left out."""
    control: str = ""
    """A ControlNet, T2I-Adapter or IP-Adapter that it is asked with, by path or name."""
    lora: tuple[str, ...] = ()
    """LoRAs that are merged into it, as `PATH` or `PATH:STRENGTH`."""

    @cached_property
    def source(self) -> ModelSource:
        """Where its networks lie."""
        return find_teacher(self.name)

    @property
    def scale(self) -> int:
        """Pixels per latent pixel, along one side."""
        config = self._vae.config
        if self.source.family is not None:
            return self.source.family.latents(config)[1]
        channels = config.get("block_out_channels") or config["encoder_block_out_channels"]
        return int(2 ** (len(channels) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        if self.source.family is not None:
            return self.source.family.latents(self._vae.config)[0]
        return int(self._vae.config.get("latent_channels", 4))

    @property
    def multiple(self) -> int:
        """Pixels that the sides of a picture must be multiples of."""
        if self.source.family is not None:
            return self.scale * self.source.family.multiple(self._unet.config)
        return self.scale * int(2 ** (len(self._unet.config["block_out_channels"]) - 1))

    @property
    def resolution(self) -> int:
        """Pixels, along each side, that it was trained at."""
        family, side = self.source.family, self._unet.config.get("sample_size")
        usual = SAMPLE_SIZES[self.source.info.family] if family is None else family.sample_size
        side = max(side) if isinstance(side, list) and side else side or usual
        return self.source.recommended.resolution or int(side) * self.scale

    @property
    def takes_any_shape(self) -> bool:
        """Whether its pictures need not be squares."""
        return self.source.family is None or not self.source.family.is_square

    @property
    def labels(self) -> ClassLabels | None:
        """The labels of a class-conditional teacher: the names of its classes, which pictures have for captions."""
        family = self.source.family
        return None if family is None or family.count_labels is None else open_labels(self.source, torch.device("cpu"))

    def shift(self, resolution: int = 0) -> float:
        """The shift of a flow model's noise levels, at pictures of this side and the few steps of a student; 0 takes
        its own."""
        family = self.source.family
        if family is None or not family.is_flow:
            return 1.0
        tokens = ((resolution or self.resolution) // self.multiple) ** 2
        return family.shift(self.source.scheduler, tokens, _FEW_STEPS)

    def hash_vae(self) -> str:
        """The hash of its VAE: another one makes other latents."""
        config = {key: self._vae.config.get(key) for key in ("scaling_factor", "shift_factor")}
        return hash_json([hash_tensors(self._vae.tensors), config])

    def hash_encoders(self) -> dict[str, Any]:
        """The networks that a finished cache belongs to."""
        return {"vae": self.hash_vae(), "text": self.hash_text()}

    def hash_text(self) -> list[str]:
        """The hash of its text encoders with their words, and how they are asked."""
        skipped = [f"clip_skip {self.clip_skip}"] if self.clip_skip else []
        changed = any(part != "unet" for lora, _ in self.loras for part in lora.layers)
        return self._hash_texts() + skipped + ([hash_json(self._hash_loras())] if changed else [])

    def _hash_texts(self) -> list[str]:
        family = self.source.family
        if family is not None:
            if (labels := self.labels) is not None:
                return [hash_json([labels.names, labels.null])]
            folders = [self.source.root / name for name in _folders(family)]
            return [hash_folder(folder) for folder in folders if folder.is_dir()]
        return [self._hash_encoder(name) for name in self._encoders()]

    def open_vae(self, device: torch.device, dtype: torch.dtype | None = None) -> VAE:
        """Its VAE, or the other one."""
        return open_vae(self.source, device, dtype, path=self.vae)

    @cached_property
    def ip_adapter(self) -> Path | None:
        """The file of its control, if that is an IP-Adapter.

        Raises:
            InputError: the control is not there.
        """
        file = find_control(self.control, self.source.root) if self.control else None
        if file is None or not file.is_file():
            return None
        return file if is_ip_adapter(read_safetensors(file)[0]) else None

    def open_ip_adapter(self, device: torch.device) -> IPAdapter | None:
        """Its IP-Adapter with the image encoder, in float32, which pictures are seen with once."""
        if (file := self.ip_adapter) is None:
            return None
        encoder = find_image_encoder(file, self.source.root)
        return load_ip_adapter(read_safetensors(file)[0], file, encoder, device, torch.float32)

    def hash_ip_adapter(self) -> str:
        """The hash of its IP-Adapter with the image encoder, which see pictures in their own way; empty without."""
        if (file := self.ip_adapter) is None:
            return ""
        encoder = find_image_encoder(file, self.source.root)
        return hash_json([hash_tensors(read_safetensors(file)[0]), hash_folder(encoder)])

    def open_text(self, device: torch.device, dtype: torch.dtype | None = None) -> Text:
        """Its text encoders, with its LoRAs."""
        text = open_text(self.source, device, dtype, self.tokenizer, self.clip_skip)
        merge_into_text(text, self.loras)
        return text

    @cached_property
    def lora_files(self) -> list[tuple[Path, float]]:
        """Files and strengths of its LoRAs.

        Raises:
            InputError: one is not there.
        """
        return [(find_lora(path, self.source.root), strength) for path, strength in map(parse_lora, self.lora)]

    @cached_property
    def loras(self) -> list[tuple[Lora, float]]:
        """Its LoRAs.

        Raises:
            InputError: one cannot be read.
        """
        return [(read_lora(file), strength) for file, strength in self.lora_files]

    def _hash_loras(self) -> list[Any]:
        return [[hash_tensors(read_safetensors(file)[0]), strength] for file, strength in self.lora_files]

    def check_parts(self) -> None:
        """Refuse a teacher whose words cannot be found, or read, or whose VAE is missing or belongs to another model.

        Raises:
            InputError: says where they were looked for.
        """
        check_has_vae(self.source, self.vae)
        check_clip_skip(self.source, self.clip_skip)
        self._check_loras()
        if self.source.family is not None:
            _ = self.labels  # are read and checked
            return  # text encoders are folders of transformers' own, read where they are loaded
        if self.latent_channels != (taken := self._unet.config["in_channels"]):
            raise InputError(
                f"the VAE of {self.vae or self.name} gives {self.latent_channels} channels, but the U-Net of "
                f"{self.name} takes {taken}; give a VAE of its family"
            )
        for name in self._encoders():
            self._tokenizer(name)

    def hash_unet(self, prediction_type: str) -> str:
        """The hash of its U-Net, and of how it is asked."""
        info = asdict(self.source.info) | {"prediction_type": prediction_type or self.source.info.prediction_type}
        return hash_json([hash_tensors(self._unet.tensors), info, *self._hash_loras()])

    def _hash_encoder(self, name: str) -> str:
        part = read_component(self.source.text, name)
        words = self._tokenizer(name)
        stated = {key: part.config.get(key) for key in ("hidden_act", "num_hidden_layers", "num_attention_heads")}
        return hash_json([hash_tensors(part.tensors), stated, words.get_vocab()])

    def _encoders(self) -> list[str]:
        names = [name for name in list_components(self.source.text) if name.startswith("text_encoder")]
        return names or ["text_encoder"]

    def _tokenizer(self, encoder: str) -> Any:
        return find_tokenizer(self.source.text, self.tokenizer, encoder.replace("text_encoder", "tokenizer"))

    def _check_loras(self) -> None:
        family = self.source.family
        encoders: list[Any] = [] if family is not None else self._encoders()
        others = None if family is None else family.lora_names
        for lora, _ in self.loras:
            check_parts(lora, ("unet", *encoders))
            shapes = {
                key.removesuffix(".weight"): tensor.shape
                for key, tensor in self._unet.tensors.items()
                if key.endswith(".weight") and tensor.ndim > 1
            }
            fitting(lora, "unet", flat_names(shapes, "unet", others), shapes)

    @cached_property
    def _unet(self) -> Component:
        return read_component(self.source.unet, "unet")

    @cached_property
    def _vae(self) -> Component:
        return read_component(self.source.vae if self.vae is None else Path(self.vae), "vae")
