"""`export`: a model, with its LoRAs merged if any are given, in a layout or a place where other programs read it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.cli.common import add_command, check_output, parse_lora
from lcm_core.errors import InputError

if TYPE_CHECKING:
    from lcm_core.files.checkpoint import Component
    from lcm_core.files.lora_keys import Part
    from lcm_core.files.recommended import Recommended
    from lcm_core.pipeline.sources import ModelSource

HOSTS = {"comfyui": "ComfyUI", "a1111": "A1111", "forge": "Forge"}
"""Programs with a module of their own in `lcm_core.export`, and their names."""
_CLIP_WORDS = 49408  # a tokenizer of another size is the model's own and must travel with it


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "export",
        "Write a model as a diffusers folder, as one .safetensors file, or into another program's folders.",
        "export --to comfyui --path ~/ComfyUI",
    )
    parser.set_defaults(run=run)
    layouts = ("diffusers", "single-file", *HOSTS)
    parser.add_argument("--to", required=True, choices=layouts, help="layout, or program")
    parser.add_argument("--path", required=True, type=Path, help="new folder, .safetensors file, or program's folder")
    parser.add_argument(
        "--model", default="emoji", help="'emoji' (default), a diffusers folder, or a .safetensors file"
    )
    parser.add_argument(
        "--unet",
        choices=("lcm", "teacher"),
        help="which network of the embedded model (default lcm; for a program both, and the LCM-LoRA)",
    )
    parser.add_argument(
        "--lora", action="append", type=parse_lora, metavar="PATH[:STRENGTH]", help="LoRA to merge; may be repeated"
    )
    parser.add_argument(
        "--flow",
        action="store_true",
        help="for ComfyUI: the embedded model as a flow model with the same pictures, by a change of variables "
        "(default network: teacher)",
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")


def run(args: argparse.Namespace) -> None:
    """Read, merge, cast, write."""
    if args.flow:
        _check_flow(args)
    if args.to in HOSTS:
        _to_host(args)
    else:
        _to_layout(args)


def _check_flow(args: argparse.Namespace) -> None:
    """Refuse, before any work, `--flow` where there is no flow model to be had; choose the teacher."""
    from lcm_core.pipeline.sources import find_source

    source = find_source(args.model)
    if args.to != "comfyui" or not source.is_shipped or source.info.prediction_type != "v_prediction":
        raise InputError(
            f"--flow makes a flow model of the embedded model for '--to comfyui', not of {args.model} for '--to "
            f"{args.to}'; leave it out"
        )
    args.unet = args.unet or "teacher"


def _to_layout(args: argparse.Namespace) -> None:
    from lcm_core.files.atomic import new_folder
    from lcm_core.files.checkpoint import save_diffusers, save_single_file
    from lcm_core.pipeline.sources import find_source

    if args.to == "single-file" and args.path.suffix != ".safetensors":
        raise InputError(f"--path {args.path} should end in .safetensors for a single file")
    check_output(args.path, folder=args.to == "diffusers")
    source = find_source(args.model, args.unet)
    components = _components(source, args.lora or (), args.dtype)
    recommended = _recommended(source, components, args.lora or ())
    if args.to == "single-file":
        save_single_file(args.path, components, source.info, _own_words(source, components), recommended.metadata())
    else:
        with new_folder(args.path) as folder:
            save_diffusers(folder, components, source.info, recommended)
            for name, files in source.read_tokenizers().items():
                (folder / name).mkdir()
                for file, text in files.items():
                    (folder / name / file).write_text(text, encoding="utf-8")
    print(f"{args.path}: {args.model} with {', '.join(components)}")


def _to_host(args: argparse.Namespace) -> None:
    """Put a model where a program looks for it; of a shipped one, when nothing is chosen, all that there is."""
    from lcm_core.pipeline.sources import SHIPPED_UNETS, find_source

    host = importlib.import_module(f"lcm_core.export.{args.to}")
    host.check_host(args.path)
    source = find_source(args.model, args.unet)
    if source.chosen is None or args.unet is not None or args.lora:
        written = _checkpoint_to_host(args, host, source)
    else:
        written = [
            file for unet in SHIPPED_UNETS for file in _checkpoint_to_host(args, host, find_source(args.model, unet))
        ]
        for file in sorted((source.root / "lora").glob("*.safetensors")):
            written += host.export_lora(args.path, file, f"{source.root.name}_{file.stem}")
        if hasattr(host, "export_extras"):
            written += host.export_extras(args.path, source.root, source.recommended.resolution or 512)
    print("\n".join(f"{HOSTS[args.to]}: {file}" for file in written))


def _checkpoint_to_host(args: argparse.Namespace, host: Any, source: ModelSource) -> list[Path]:
    from lcm_core.files.checkpoint import AS_FLOW

    components = _components(source, args.lora or (), args.dtype)
    name = f"{source.root.stem}_{source.chosen}" if source.chosen else source.root.stem
    recommended = _recommended(source, components, args.lora or ())
    words = _own_words(source, components)
    given = (components, source.info, words, recommended.metadata())
    if args.flow:
        return host.export_checkpoint(args.path, f"{name}_flow", *given, marks=[AS_FLOW])
    return host.export_checkpoint(args.path, name, *given)


def _recommended(source: ModelSource, components: Mapping[str, Component], loras: Any) -> Recommended:
    """How the copy wants to be sampled: like the model itself."""
    from lcm_core.pipeline.sources import find_lora, recommended_for

    is_full = components["unet"].config.get("time_cond_proj_dim") is not None
    return recommended_for(source, is_full, [find_lora(path, source.root) for path, _ in loras])


def _own_words(source: ModelSource, components: Mapping[str, Component]) -> dict[str, str] | None:
    """The tokenizer's files of a model whose vocabulary is not CLIP's."""
    own = components["text_encoder"].config.get("vocab_size") != _CLIP_WORDS
    return source.read_tokenizers().get("tokenizer") if own else None


def _components(source: ModelSource, loras: Any, dtype: str | None) -> dict[str, Component]:
    """All networks of a model, as stored, but with `loras` merged and cast to `dtype`."""
    from lcm_core.files.checkpoint import read_component

    places = {"unet": source.unet, "vae": source.vae, "text_encoder": source.text}
    if source.info.family == "sdxl":
        places["text_encoder_2"] = source.text
    components = {name: read_component(source.opened or place, name) for name, place in places.items()}
    if loras:
        _merge(source, components, loras)
    if dtype is not None:
        _cast(components, dtype)
    return components


def _merge(source: ModelSource, components: dict[str, Component], loras: Any) -> None:
    """Put the LoRAs into the components' weights, in the number format that these are stored in."""
    import torch

    from lcm_core.files.lora import check_parts, merge, read_lora
    from lcm_core.networks.text_encoder import load_text
    from lcm_core.networks.unet import load_unet
    from lcm_core.pipeline.sources import find_lora

    files = [(read_lora(find_lora(path, source.root)), strength) for path, strength in loras]
    parts: tuple[Part, ...] = ("text_encoder", "text_encoder_2")
    for lora, _ in files:
        check_parts(lora, ("unet", *(part for part in parts if part in components)))
    unet = components["unet"]
    stored = next(iter(unet.tensors.values())).dtype
    network = load_unet(unet, "cpu", stored, torch.contiguous_format)
    merge(network, files)
    unet.tensors.update(network.state_dict())
    if not any(part != "unet" for lora, _ in files for part in lora.layers):
        return
    stored = next(iter(components["text_encoder"].tensors.values())).dtype
    for part, encoder in zip(parts, load_text(source.text, "cpu", stored).encoders, strict=False):
        merge(encoder.model, files, part)
        merged = encoder.model.state_dict()
        tensors = components[part].tensors
        for key in tensors:  # transformers' own names come with and without this prefix
            name = key if key in merged else key.removeprefix("text_model.")
            tensors[key] = merged.get(name, tensors[key])


def _cast(components: Mapping[str, Component], dtype: str) -> None:
    from lcm_core.networks.device import choose_dtype

    number = choose_dtype("cpu", dtype)
    for component in components.values():
        for key, tensor in component.tensors.items():
            if tensor.is_floating_point():
                component.tensors[key] = tensor.to(number)
