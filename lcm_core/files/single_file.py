"""Single-file checkpoints in the ldm layout of the web UIs, or with one bare network: opened once, and written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.flow_map import END_KEY
from lcm_core.errors import InputError
from lcm_core.files import architecture, ldm_convert
from lcm_core.files.architecture import Family
from lcm_core.files.components import COMPONENTS, Component, ModelInfo
from lcm_core.files.configurations import check_config
from lcm_core.files.folder import scheduler_config
from lcm_core.files.reading import parse_json
from lcm_core.files.safetensors import PathLike, check_checksum, read_safetensors, write_safetensors

CONFIG_KEY = "lcm_suite.config"
"""Safetensors metadata: JSON of each network's configuration, for what shapes cannot tell (heads, groups, scaling)."""
TOKENIZER_KEY = "lcm_suite.tokenizer"
"""Safetensors metadata: JSON of the tokenizer's files, name to text, for models with a vocabulary of their own."""
AS_FLOW = "lcm_suite.as_flow"
"""Empty weight of a v-prediction model that ComfyUI is to load as a flow model (`lcm_core.diffusion.as_flow`)."""
# Spread of a norm's bias above which an SD 2.x U-Net was trained for v-prediction; ComfyUI's rule of thumb.
_V_PREDICTION_SPREAD = 0.09
_MODELSPEC = {"epsilon": "epsilon", "v_prediction": "v"}
_checked: set[tuple[str, int, int]] = set()


class Checkpoint:
    """A single file, opened and brought into diffusers' layout once, however many networks are taken from it.

    Attributes:
        path: the file.
        metadata: its safetensors metadata.

    Raises:
        InputError: it cannot be read.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._state, self.metadata = read_safetensors(self.path)
        self._taken: set[str] = set()

    @cached_property
    def _networks(self) -> dict[str, dict[str, Tensor]]:
        return self._named(_split, self._state)

    @property
    def keys(self) -> list[str]:
        """Names of its weights, as the file has them."""
        return list(self._state)

    @property
    def names(self) -> list[str]:
        """The networks that it holds."""
        return [name for name in COMPONENTS if name in self._networks]

    @cached_property
    def family(self) -> Family:
        """The family of its U-Net.

        Raises:
            InputError: it has none, or one of an unknown kind.
        """
        return self._named(_family, self._state, self._networks)

    def scheduler(self) -> dict[str, Any]:
        """What it says of the noise schedule and the prediction type, by diffusers' names."""
        if unknown := ldm_convert.unknown_keys(self._state):
            warnings.warn(f"{self.path}: {len(unknown)} weights are not used (first: '{unknown[0]}')", stacklevel=3)
        if stated := self._stated("scheduler"):
            return stated
        prediction, zero_snr = _prediction(self._state, self._networks, self.metadata)
        return {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}

    def take(self, name: str) -> Component:
        """One network. Whoever takes it may change its weights: it is read again for the next one who asks.

        Raises:
            InputError: the file has no such network, is damaged, or says of it what no network can be.
        """
        if name in self._taken:
            return Checkpoint(self.path).take(name)
        self._check_once()
        if name not in self._networks:
            held = ", ".join(self.names) or f"no known network; first weight '{next(iter(self._state), 'nothing')}'"
            raise InputError(f"{self.path} has no {name} (it has: {held}); give a model that has one")
        config = self._named(_infer_config, self._networks, name, ldm_convert.is_openclip(self._state, name))
        config |= self._stated(name)
        check_config(config, f"{self.path} ({name})")
        self._taken.add(name)
        return Component(self._networks[name], config, str(self.path))

    def _named(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function`, putting the file's name before its complaint."""
        try:
            return function(*args)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    def _stated(self, name: str) -> dict[str, Any]:
        """The configuration that one of our own files states for a network, or for the scheduler."""
        where = f"the metadata '{CONFIG_KEY}' of {self.path}"
        stated = parse_json(self.metadata.get(CONFIG_KEY, "{}"), where, "export it again").get(name, {})
        if not isinstance(stated, dict):
            raise InputError(f"{where} holds no JSON object for {name}; export it again")
        return stated

    def _check_once(self) -> None:
        """Check the checksum the first time that this process takes weights of the file."""
        known = self.path.stat()
        key = (str(self.path.absolute()), known.st_size, known.st_mtime_ns)
        if key not in _checked:
            check_checksum(self.path, self._state, self.metadata)
            _checked.add(key)


def detect_architecture(state: Mapping[str, Tensor]) -> Family:
    """The family of a whole checkpoint or of a bare U-Net, in the ldm or diffusers layout.

    Raises:
        InputError: it is none of SD 1.x, SD 2.x, SDXL.
    """
    return _family(state, _split(state))


def _family(state: Mapping[str, Tensor], networks: Mapping[str, Mapping[str, Tensor]]) -> Family:
    unet = networks.get("unet")
    if unet is None:
        raise InputError(
            f"unknown architecture: no U-Net found (first weight: '{next(iter(state), 'nothing')}'); "
            "give an SD 1.x, SD 2.x or SDXL model"
        )
    return architecture.unet_family(unet)


def detect_prediction(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, bool]:
    """What a single file says about its prediction type and zero terminal SNR.

    In this order: the marker key `v_pred`; the metadata `modelspec.prediction_type`; for SD 2.x the spread of
    one norm's bias, which is wider after v-prediction training. Else epsilon. Zero terminal SNR has the marker `ztsnr`.

    Returns:
        (prediction type, zero terminal SNR).
    """
    return _prediction(state, _split(state), metadata)


def _prediction(
    state: Mapping[str, Tensor], networks: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]
) -> tuple[str, bool]:
    zero_snr = "ztsnr" in state
    stated = "v" if "v_pred" in state else metadata.get("modelspec.prediction_type", "")
    if stated:
        return ("v_prediction" if stated.startswith("v") else "epsilon"), zero_snr
    unet = networks.get("unet", {})
    last = unet.get("up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias")
    wide = last is not None and architecture.unet_family(unet) == "sd2" and last.float().std() > _V_PREDICTION_SPREAD
    return ("v_prediction" if wide else "epsilon"), zero_snr


def save_single_file(
    path: PathLike,
    components: Mapping[str, Component],
    info: ModelInfo,
    tokenizer_files: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    marks: Collection[str] = (),
) -> None:
    """Write networks as one checkpoint in the ldm layout that the web UIs read.

    Args:
        path: the file to write.
        components: networks by name; what is left out is left out of the file.
        info: family and schedule; v-prediction and zero terminal SNR are marked as hosts expect (`v_pred`, `ztsnr`).
        tokenizer_files: name to text; only for a model with a vocabulary of its own.
        metadata: more safetensors metadata.
        marks: names of empty weights that tell a host more, such as `AS_FLOW`.

    Raises:
        InputError: a flow map, which no program that reads such files could run.
    """
    if any(END_KEY in component.config for component in components.values()):
        raise InputError(
            "a flow map has to be told where each step ends, which no host does; paint with python -m lcm_core "
            "generate, or distil with --method tcd or segmented"
        )
    state = ldm_convert.diffusers_to_ldm({name: part.tensors for name, part in components.items()}, info.family)
    known = {"v_pred": info.prediction_type == "v_prediction", "ztsnr": info.zero_terminal_snr}
    state |= {name: torch.tensor([]) for name in (*(name for name, marked in known.items() if marked), *marks)}
    stated = {name: part.config for name, part in components.items()} | {"scheduler": scheduler_config(info)}
    extra = {CONFIG_KEY: json.dumps(stated)}
    if info.prediction_type in _MODELSPEC:
        extra["modelspec.prediction_type"] = _MODELSPEC[info.prediction_type]
    if tokenizer_files:
        extra[TOKENIZER_KEY] = json.dumps(dict(tokenizer_files))
    write_safetensors(path, state, {**extra, **(metadata or {})})


def _split(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The networks of a file in diffusers' layout, whether it is a whole checkpoint or one bare network."""
    if components := ldm_convert.ldm_to_diffusers(state):
        return components
    if "input_blocks.0.0.weight" in state:
        return {"unet": ldm_convert.unet_to_diffusers(state)}
    if "encoder.mid.block_1.conv1.weight" in state:
        return {"vae": ldm_convert.vae_to_diffusers(state)}
    bare = {
        "unet": "conv_in.weight",
        "vae": "encoder.mid_block.resnets.0.conv1.weight",
        "text_encoder": "text_model.embeddings.token_embedding.weight",
    }
    tiny = {"vae"} if "encoder.layers.0.weight" in state and "decoder.layers.0.weight" in state else set()
    found = {name for name, key in bare.items() if key in state} | tiny
    return {name: modern(name, state) for name in found}


def modern(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Today's names for weights that an older version of diffusers or transformers wrote."""
    if name == "unet":
        return dict(state)
    return ldm_convert.modern_vae(state) if name == "vae" else ldm_convert.clip_to_diffusers(state)


def _infer_config(components: Mapping[str, Mapping[str, Tensor]], name: str, openclip: bool) -> dict[str, Any]:
    family = architecture.unet_family(components["unet"]) if "unet" in components else None
    if name == "unet":
        return architecture.unet_config(components["unet"])
    if name == "vae":
        return architecture.vae_config(components["vae"], family)
    return architecture.text_config(components[name], openclip, projected=name == "text_encoder_2")
