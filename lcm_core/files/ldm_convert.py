"""State dicts of single files (the ldm layout) to diffusers' layout and back, bit for bit, for SD 1.x, SD 2.x and SDXL.

Nothing is cast, dropped or made up: what one direction splits, transposes or reshapes, the other puts back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files import ldm_keys
from lcm_core.files.ldm_keys import UNetTopology, count, inverted, rename

State = dict[str, Tensor]
_OPENCLIP_SAME = {"positional_embedding": "text_model.embeddings.position_embedding.weight"}
_CLIP_NAMES = ("text_model.", "text_projection.", "logit_scale")
_VAE_ATTENTION_LINEAR = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")


def ldm_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, State]:
    """Split a single file into its networks, each in diffusers' layout.

    Returns:
        Those of `unet`, `vae`, `text_encoder`, `text_encoder_2` that the file holds.

    Raises:
        InputError: a network holds a weight that this architecture does not have.
    """
    found = {"unet": _below(state, ldm_keys.UNET_PREFIX), "vae": _below(state, ldm_keys.VAE_PREFIX)}
    components = {"unet": unet_to_diffusers(found["unet"]), "vae": vae_to_diffusers(found["vae"])}
    for name, prefixes in ldm_keys.CLIP_PREFIXES.items():
        for prefix in prefixes:
            components[name] = components.get(name) or clip_to_diffusers(_below(state, prefix))
    for name, prefixes in ldm_keys.OPENCLIP_PREFIXES.items():
        for prefix in prefixes:
            components[name] = components.get(name) or openclip_to_diffusers(_below(state, prefix))
    return {name: tensors for name, tensors in components.items() if tensors}


def diffusers_to_ldm(components: Mapping[str, Mapping[str, Tensor]], family: str) -> State:
    """Join networks in diffusers' layout into one state dict in the ldm layout.

    Args:
        components: any of `unet`, `vae`, `text_encoder`, `text_encoder_2`.
        family: "sd1", "sd2" or "sdxl"; it decides where the text encoders go and how they are written.
    """
    state: State = {}
    if "unet" in components:
        state |= _above(unet_to_ldm(components["unet"]), ldm_keys.UNET_PREFIX)
    if "vae" in components:
        state |= _above(vae_to_ldm(components["vae"]), ldm_keys.VAE_PREFIX)
    if "text_encoder" in components and family == "sd2":
        state |= _above(openclip_to_ldm(components["text_encoder"]), "cond_stage_model.model.")
    elif "text_encoder" in components:
        prefix = "cond_stage_model.transformer." if family == "sd1" else "conditioner.embedders.0.transformer."
        state |= _above(clip_to_diffusers(components["text_encoder"]), prefix)
    if "text_encoder_2" in components:
        state |= _above(openclip_to_ldm(components["text_encoder_2"]), "conditioner.embedders.1.model.")
    return state


def is_openclip(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether a single file holds the text encoder `name` in OpenCLIP's layout."""
    return any(key.startswith(ldm_keys.OPENCLIP_PREFIXES.get(name, ())) for key in state)


def unknown_keys(state: Mapping[str, Tensor]) -> list[str]:
    """Keys of a single file that belong to no network and are not known to be mere training state."""
    prefixes = [ldm_keys.UNET_PREFIX, ldm_keys.VAE_PREFIX]
    for group in (ldm_keys.CLIP_PREFIXES, ldm_keys.OPENCLIP_PREFIXES):
        prefixes += [prefix for names in group.values() for prefix in names]
    return [key for key in state if not key.startswith(tuple(prefixes)) and not ldm_keys.IGNORED.match(key)]


def unet_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """An ldm U-Net without its prefix, in diffusers' layout."""
    return _renamed(state, ldm_keys.unet_map(UNetTopology.from_ldm(state)), "unet")


def unet_to_ldm(state: Mapping[str, Tensor]) -> State:
    """A diffusers U-Net in the ldm layout, without the prefix."""
    return _renamed(state, inverted(ldm_keys.unet_map(UNetTopology.from_diffusers(state))), "unet")


def vae_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """An ldm AutoencoderKL without its prefix, in diffusers' layout: the attention's 1x1 convolutions become linear."""
    kept = {k: v for k, v in state.items() if not k.startswith(("loss.", "model_ema."))}
    levels, layers = count(kept, r"encoder\.down\.(\d+)\."), count(kept, r"encoder\.down\.0\.block\.(\d+)\.")
    renamed = _renamed(kept, ldm_keys.vae_map(levels, layers), "vae")
    return {k: v.flatten(1) if _is_vae_attention(k) else v for k, v in renamed.items()}


def vae_to_ldm(state: Mapping[str, Tensor]) -> State:
    """A diffusers AutoencoderKL in the ldm layout, without the prefix: linear attention becomes 1x1 convolutions."""
    state = modern_vae(state)
    levels = count(state, r"encoder\.down_blocks\.(\d+)\.")
    layers = count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    convolutions = {k: v[..., None, None] if _is_vae_attention(k) else v for k, v in state.items()}
    return _renamed(convolutions, inverted(ldm_keys.vae_map(levels, layers)), "vae")


def modern_vae(state: Mapping[str, Tensor]) -> State:
    """A diffusers AutoencoderKL with today's names and linear attention, whichever version wrote it."""
    modern: State = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        parent, _, name = module.rpartition(".")
        if parent.endswith("mid_block.attentions.0"):
            key = f"{parent}.{ldm_keys.VAE_ATTENTION_OLD.get(name, name)}.{leaf}"
        modern[key] = value.flatten(1) if _is_vae_attention(key) else value
    return modern


def clip_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """A CLIP text encoder under the names that files use; some writers leave out `text_model.`."""
    return {k if k.startswith(_CLIP_NAMES) else f"text_model.{k}": v for k, v in state.items()}


def openclip_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """OpenCLIP's text tower as a CLIP text encoder: the joint input projection is split into q, k and v."""
    converted: State = {}
    for key, value in state.items():
        block, joint, leaf = key.partition(".attn.in_proj_")
        if joint:
            target = block.replace("transformer.resblocks", "text_model.encoder.layers")
            for name, part in zip("qkv", value.chunk(3), strict=True):
                converted[f"{target}.self_attn.{name}_proj.{leaf}"] = part
        elif key == "text_projection":  # OpenCLIP multiplies by it from the right, a linear layer from the left
            converted["text_projection.weight"] = value.T.contiguous()
        else:
            converted[_OPENCLIP_SAME.get(key, key)] = value
    layers = count(state, r"transformer\.resblocks\.(\d+)\.")
    return _renamed(converted, ldm_keys.openclip_map(layers), "text encoder", keep=_CLIP_NAMES)


def openclip_to_ldm(state: Mapping[str, Tensor]) -> State:
    """A CLIP text encoder in OpenCLIP's layout: q, k and v are joined into one input projection."""
    names = inverted(_OPENCLIP_SAME)
    source = {k: v for k, v in clip_to_diffusers(state).items() if not k.endswith(".position_ids")}
    converted: State = {}
    for key, value in source.items():
        block, query, leaf = key.partition(".self_attn.q_proj.")
        if query:
            target = block.replace("text_model.encoder.layers", "transformer.resblocks")
            parts = [source[f"{block}.self_attn.{name}_proj.{leaf}"] for name in "qkv"]
            converted[f"{target}.attn.in_proj_{leaf}"] = torch.cat(parts)
        elif key == "text_projection.weight":
            converted["text_projection"] = value.T.contiguous()
        elif ".self_attn.k_proj." not in key and ".self_attn.v_proj." not in key:
            converted[names.get(key, key)] = value
    layers = count(source, r"text_model\.encoder\.layers\.(\d+)\.")
    keep = ("transformer.resblocks.", "positional_embedding", "text_projection", "logit_scale")
    return _renamed(converted, inverted(ldm_keys.openclip_map(layers)), "text encoder", keep=keep)


def _renamed(state: Mapping[str, Tensor], prefixes: Mapping[str, str], what: str, keep: tuple[str, ...] = ()) -> State:
    """Rename every key; those that start with one of `keep` have their new name already."""
    names = {key: key if key.startswith(keep) else rename(key, prefixes) for key in state}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise InputError(
            f"unknown architecture: the {what} holds {len(unknown)} weights that SD 1.x, SD 2.x and SDXL lack "
            f"(first: '{unknown[0]}'); give a checkpoint of one of these"
        )
    return {str(names[key]): value for key, value in state.items()}


def _is_vae_attention(key: str) -> bool:
    return ".mid_block.attentions.0." in key and key.endswith(_VAE_ATTENTION_LINEAR)


def _below(state: Mapping[str, Tensor], prefix: str) -> State:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _above(state: Mapping[str, Tensor], prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}
