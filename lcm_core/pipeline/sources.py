"""Finding a model by name or path, and what its files say about how it wants to be sampled."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from lcm_core.files.architecture import check_scheduler
from lcm_core.files.checkpoint import ModelInfo, read_info
from lcm_core.files.lora import find_lora_file
from lcm_core.files.recommended import (
    FOLDER_KEY,
    GUIDANCE_KEY,
    SAMPLING_KEY,
    Stated,
    check_sampling,
    read_sampling,
    read_stated,
)
from lcm_core.files.safetensors import PathLike, read_json, read_metadata
from lcm_core.networks.tokenizer import read_tokenizer_files, read_tokenizer_folder

MODELS = Path(__file__).parents[1] / "models"
"""Models that are shipped with the package; each folder has a model.json."""
CARD = "model.json"
SHIPPED_UNETS = ("lcm", "teacher")
_FEW_STEP_SCHEDULERS = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}
_PAPER_GUIDANCE = 8.0  # of the tables in arXiv 2310.04378
_CARD_NAMES = {"schedule": "beta_schedule"}


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
    names = {item.name for item in fields(ModelInfo)}
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
        return path.parent if path.name == "model_index.json" else path
    check_hub_name(name)
    near = sorted(p.name for p in path.parent.glob("*.safetensors"))[:5] if path.parent.is_dir() else []
    known = ", ".join([*(f"'{model}'" for model in embedded), *near]) or "none"
    raise InputError(
        f"unknown model {os.fspath(name)!r}; give the path of a diffusers folder or a .safetensors file (here: {known})"
    )


def check_hub_name(name: PathLike) -> None:
    """Refuse what is no path here but looks like a name on a model hub, and say how to get it.

    Raises:
        InputError: it is such a name.
    """
    path = Path(name)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", os.fspath(name)) and not path.suffix and not path.parent.exists():
        raise InputError(
            f"there is no folder {os.fspath(name)}; if that is a name on Hugging Face, get it first: "
            f"hf download {os.fspath(name)} --local-dir FOLDER, then give the FOLDER"
        )


def find_lora(path: PathLike, root: Path) -> Path:
    """The file of a LoRA: given by its path, by its folder, or by its name beside the model at `root`.

    Raises:
        InputError: there is none.
    """
    own = root / "lora"
    named = own / f"{os.fspath(path)}.safetensors"
    if Path(path).exists():
        return find_lora_file(path)
    if named.is_file():
        return named
    check_hub_name(path)
    known = ", ".join(file.stem for file in sorted(own.glob("*.safetensors")))
    raise InputError(
        f"LoRA {os.fspath(path)!r} does not exist; check the path" + (f" (this model's own: {known})" if known else "")
    )


def stated_metadata(source: Source, guidance_embedding: bool, loras: Sequence[Path] = ()) -> dict[str, str]:
    """What to write into a copy of a model, with `loras` merged, so that it is sampled like the model itself.

    Args:
        source: the model.
        guidance_embedding: whether its U-Net is a full LCM.
        loras: files.
    """
    sampling = read_sampling_defaults(source, guidance_embedding, loras)
    metadata = {SAMPLING_KEY: json.dumps(sampling)}
    if guidance_embedding:
        metadata[GUIDANCE_KEY] = str(sampling["guidance_scale"])
    for path in (source.root, *loras):
        stated = _read_stated(path)
        metadata |= {} if stated is None else stated.metadata()
    return metadata


def read_sampling_defaults(source: Source, guidance_embedding: bool, loras: Sequence[Path]) -> dict[str, Any]:
    """What the model's own files, and those of its LoRAs, say about how to use it, by the names of `SAMPLING`."""
    card = check_sampling(source.card, f"{source.root / CARD}")
    guidance = card.pop("guidance_scale", _PAPER_GUIDANCE)
    values = card
    if guidance_embedding:
        values["guidance_scale"] = values["teacher_guidance_scale"] = guidance
    elif loras:
        values |= {"sampler": "lcm", "is_distilled": True}
    else:
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
