"""`export`: a model, with its LoRAs merged if any are given, in a layout that other programs read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.commands.common import add_command, check_output, parse_lora
from lcm_core.errors import InputError

if TYPE_CHECKING:
    from lcm_core.checkpoint import Component
    from lcm_core.loading import Source
    from lcm_core.lora_keys import Part

_CLIP_WORDS = 49408  # a tokenizer of another size is the model's own and must travel with it


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "export",
        "Write a model as a diffusers folder or as one .safetensors file.",
        "export --model emoji --to single-file --path emoji.safetensors",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--to", required=True, choices=("diffusers", "single-file"), help="layout")
    parser.add_argument("--path", required=True, type=Path, help="new folder, or .safetensors file")
    parser.add_argument(
        "--model", default="emoji", help="'emoji' (default), a diffusers folder, or a .safetensors file"
    )
    parser.add_argument("--unet", choices=("lcm", "teacher"), help="which network of the embedded model (default lcm)")
    parser.add_argument(
        "--lora", action="append", type=parse_lora, metavar="PATH[:STRENGTH]", help="LoRA to merge; may be repeated"
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")


def run(args: argparse.Namespace) -> None:
    """Read, merge, cast, write."""
    from lcm_core.checkpoint import save_diffusers, save_single_file
    from lcm_core.files import new_folder
    from lcm_core.loading import find_source

    if args.to == "single-file" and args.path.suffix != ".safetensors":
        raise InputError(f"--path {args.path} should end in .safetensors for a single file")
    check_output(args.path, folder=args.to == "diffusers")
    source = find_source(args.model, args.unet)
    components = _components(source, args.lora or (), args.dtype)
    if args.to == "single-file":
        own_words = components["text_encoder"].config.get("vocab_size") != _CLIP_WORDS
        words = _tokenizers(source).get("tokenizer") if own_words else None
        save_single_file(args.path, components, source.info, words)
    else:
        with new_folder(args.path) as folder:
            save_diffusers(folder, components, source.info)
            for name, files in _tokenizers(source).items():
                (folder / name).mkdir()
                for file, text in files.items():
                    (folder / name / file).write_text(text, encoding="utf-8")
    print(f"{args.path}: {args.model} with {', '.join(components)}")


def _components(source: Source, loras: Any, dtype: str | None) -> dict[str, Component]:
    """All networks of a model, as stored, but with `loras` merged and cast to `dtype`."""
    from lcm_core.checkpoint import read_component

    components = {
        "unet": read_component(source.unet, "unet"),
        "vae": read_component(source.vae, "vae"),
        "text_encoder": read_component(source.text, "text_encoder"),
    }
    if source.info.family == "sdxl":
        components["text_encoder_2"] = read_component(source.text, "text_encoder_2")
    if loras:
        _merge(source, components, loras)
    if dtype is not None:
        _cast(components, dtype)
    return components


def _merge(source: Source, components: dict[str, Component], loras: Any) -> None:
    """Put the LoRAs into the components' weights, in the number format that these are stored in."""
    import torch

    from lcm_core.loading import find_lora
    from lcm_core.lora import merge, read_lora
    from lcm_core.text import load_text
    from lcm_core.unet import load_unet

    files = [(read_lora(find_lora(path, source.root)), strength) for path, strength in loras]
    unet = components["unet"]
    stored = next(iter(unet.tensors.values())).dtype
    network = load_unet(unet, "cpu", stored, torch.contiguous_format)
    merge(network, files)
    unet.tensors.update(network.state_dict())
    if not any(part != "unet" for lora, _ in files for part in lora.layers):
        return
    parts: tuple[Part, ...] = ("text_encoder", "text_encoder_2")
    for part, encoder in zip(parts, load_text(source.text, "cpu", stored).encoders, strict=False):
        merge(encoder.model, files, part)
        merged = encoder.model.state_dict()
        tensors = components[part].tensors
        for key in tensors:  # transformers' own names come with and without this prefix
            name = key if key in merged else key.removeprefix("text_model.")
            tensors[key] = merged.get(name, tensors[key])


def _cast(components: Mapping[str, Component], dtype: str) -> None:
    from lcm_core.networks import choose_dtype

    number = choose_dtype("cpu", dtype)
    for component in components.values():
        for key, tensor in component.tensors.items():
            if tensor.is_floating_point():
                component.tensors[key] = tensor.to(number)


def _tokenizers(source: Source) -> dict[str, dict[str, str]]:
    """The tokenizers in the model's folder, or in the metadata of its file: name to file name to text."""
    from lcm_core.checkpoint import read_tokenizer_files

    if source.root.is_file():
        files = read_tokenizer_files(source.root)
        return {"tokenizer": files} if files else {}
    return {
        folder.name: {file.name: file.read_text(encoding="utf-8") for file in sorted(folder.iterdir())}
        for folder in sorted(source.root.glob("tokenizer*"))
    }
