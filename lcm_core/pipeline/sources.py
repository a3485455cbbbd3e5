"""Finding a model by name or path, and what its files say about how it wants to be sampled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from lcm_core.families.family import Family, Scheduler
from lcm_core.families.known import find_family
from lcm_core.files.checkpoint import Checkpoint, ModelInfo, info_from_configs, read_info
from lcm_core.files.configurations import check_scheduler
from lcm_core.files.lora import find_lora_file
from lcm_core.files.recommended import (
    FULL_LCM_GUIDANCE,
    Recommended,
    parse_recommended,
    read_recommended,
    recommended_in,
)
from lcm_core.files.safetensors import PathLike, read_json
from lcm_core.networks.tokenizer import read_tokenizer_files, read_tokenizer_folder

MODELS = Path(__file__).parents[1] / "models"
"""Models that are shipped with the package; each folder has a model.json."""
CARD = "model.json"
SHIPPED_UNETS = ("lcm", "teacher")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CARD_NAMES = {"schedule": "beta_schedule"}


@dataclass(frozen=True)
class ModelSource:
    """Where the parts of a model lie; `unet`, `vae` and `text` are the model itself unless it is a shipped one."""

    root: Path
    unet: Path
    vae: Path
    text: Path
    info: ModelInfo
    chosen: str | None = None
    """Which U-Net of a shipped model."""
    recommended: Recommended = field(default_factory=Recommended)
    """How its own files say that it wants to be sampled."""
    opened: Checkpoint | None = field(default=None, compare=False, repr=False)
    """A single file, so that loading all of it opens it once."""
    family: Family | None = None
    """None for Stable Diffusion 1.x, 2.x, XL."""
    scheduler: Scheduler = field(default_factory=dict)
    """What a flow model's folder states of noise levels."""

    @property
    def is_shipped(self) -> bool:
        """Whether it comes with this package."""
        return self.chosen is not None

    def read_tokenizers(self) -> dict[str, dict[str, str]]:
        """The tokenizers in the model's folder, or in the metadata of its file: name to file name to text."""
        if self.root.is_file():
            files = read_tokenizer_files(self.opened or self.root)
            return {"tokenizer": files} if files else {}
        return {
            name: read_tokenizer_folder(self.root / name)
            for name in ("tokenizer", "tokenizer_2")
            if (self.root / name).is_dir()
        }


def find_source(name: PathLike, unet: str | None = None) -> ModelSource:
    """Find a model by name or path, without loading it.

    Raises:
        InputError: an unknown model, or `unet` given for one that has no choice.
    """
    root = find_model(name)
    if not (root / CARD).is_file():
        if unet is not None:
            raise InputError(f"{name} has one U-Net only; leave out unet '{unet}', which is for shipped models")
        if (family := find_family(root)) is not None:
            return _family_source(root, family)
        if root.is_dir():
            return ModelSource(root, root, root, root, read_info(root), recommended=read_recommended(root))
        opened = Checkpoint(root)
        said = recommended_in(opened.metadata, str(root))
        return ModelSource(root, root, root, root, read_info(opened), recommended=said, opened=opened)
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
    return ModelSource(
        root, folder, root / "vae", root / "text_encoder", info, chosen, _of_card(card, chosen, root / CARD)
    )


def _family_source(root: Path, family: Family) -> ModelSource:
    file = root / "scheduler" / "scheduler_config.json"
    scheduler = read_json(file) if file.is_file() else {}
    if family.is_flow:
        steps = scheduler.get("num_train_timesteps") or ModelInfo.num_train_timesteps
        check_scheduler({"num_train_timesteps": steps}, file)
        info = ModelInfo(family.name, "flow", num_train_timesteps=steps)
    else:
        info = replace(info_from_configs({}, scheduler, file), family=family.name)
    said = Recommended("euler", teacher_steps=family.steps, teacher_guidance_scale=family.guidance_scale)
    said |= read_recommended(root)
    network, vae = root / family.folder, root / "vae"
    return ModelSource(root, network, vae, root, info, recommended=said, family=family, scheduler=scheduler)


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
    if (cached := find_in_hub_cache(name)) is not None:
        return cached
    check_hub_name(name)
    near = sorted(p.name for p in path.parent.glob("*.safetensors"))[:5] if path.parent.is_dir() else []
    known = ", ".join([*(f"'{model}'" for model in embedded), *near]) or "none"
    raise InputError(
        f"unknown model {os.fspath(name)!r}; give the path of a diffusers folder or a .safetensors file (here: {known})"
    )


def find_in_hub_cache(name: PathLike) -> Path | None:
    """The folder of a model on a hub, by its name, where Hugging Face's libraries have left it on this machine; nothing
    is asked of the network."""
    if not _HUB_NAME.fullmatch(os.fspath(name)):
        return None
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(snapshot_download(os.fspath(name), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


def check_hub_name(name: PathLike) -> None:
    """Refuse what is no path here but looks like a name on a model hub, and say how to get it.

    Raises:
        InputError: it is such a name.
    """
    path = Path(name)
    if _HUB_NAME.fullmatch(os.fspath(name)) and not path.suffix and not path.parent.exists():
        raise InputError(
            f"there is no folder {os.fspath(name)}, nor such a model in Hugging Face's cache here; get it first: "
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


def find_vae(path: PathLike, root: Path) -> Path:
    """Another VAE: by its path, or by its name beside the model at `root`: "tiny" is the folder `vae_tiny` there.

    A path of which there is nothing is returned as it is; whoever reads it says so.
    """
    named = root / f"vae_{os.fspath(path)}"
    return named if named.is_dir() and not Path(path).exists() else Path(path)


def find_control(name: str, model: PathLike) -> Path:
    """A T2I-Adapter or ControlNet: by its path, or by the end of its name in the folder `control` of a model.

    Raises:
        InputError: there is none.
    """
    if Path(name).exists():
        return Path(name)
    root = MODELS / os.fspath(model) if (MODELS / os.fspath(model)).is_dir() else Path(model)
    own = sorted((root / "control").glob("*.safetensors"))
    for file in own:
        if name in (file.stem, file.stem.rpartition("_")[2]):
            return file
    check_hub_name(name)
    known = ", ".join(file.stem.rpartition("_")[2] for file in own) or "none"
    raise InputError(f"control {name!r:.200} does not exist; give a path, or one of this model's own ({known})")


def recommended_for(source: ModelSource, guidance_embedding: bool, loras: Sequence[Path] = ()) -> Recommended:
    """How a model with `loras` merged wants to be sampled, by what the files of both say.

    Args:
        source: the model.
        guidance_embedding: whether its U-Net is a full LCM.
        loras: files. They decide how the model is sampled, and any of them may be the one for few steps.
    """
    said = source.recommended
    if guidance_embedding:
        guidance = FULL_LCM_GUIDANCE if said.guidance_scale is None else said.guidance_scale
        said = Recommended(sampler="lcm", guidance_scale=guidance, teacher_guidance_scale=guidance) | said
    elif loras and not said.is_distilled and source.family is None:
        said = replace(said, sampler="lcm")
    for path in loras:
        said |= read_recommended(path)
    return said


def _of_card(card: Mapping[str, Any], chosen: str, file: Path) -> Recommended:
    """What a shipped model's card says of one of its U-Nets."""
    said = parse_recommended(card, str(file))
    if chosen == "teacher":
        return replace(said, sampler="dpmpp_2m", guidance_scale=None)
    # the embedded guidance is what the network reads, whatever the sampler
    return replace(said, sampler="lcm", teacher_guidance_scale=said.guidance_scale)
