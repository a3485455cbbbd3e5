"""`info`: the settings inside a picture, or what a model or LoRA file is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.cli.common import add_command

if TYPE_CHECKING:
    from torch import Tensor

    from lcm_core.files.checkpoint import Checkpoint

_LONGEST = 200  # characters of one metadata value; some trainers store whole word lists


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "info", "Show a picture's settings, or what a model or LoRA file is.", "info panda.png"
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", help="picture, .safetensors file, model folder, or 'emoji'")


def run(args: argparse.Namespace) -> None:
    """Print one `name: value` line for each thing known."""
    from lcm_core.pipeline.image import IMAGE_SUFFIXES, read_settings

    if Path(args.file).suffix.lower() in IMAGE_SUFFIXES:
        lines = iter(read_settings(args.file).items())
    else:
        lines = _describe_model(args.file)
    for name, value in lines:
        print(_visible(f"{name}: {value}"))


def _visible(text: str) -> str:
    """Text from a file without what a terminal would take for commands."""
    return "".join(c if c in "\n\t" or ord(c) >= 160 or 32 <= ord(c) < 127 else f"\\x{ord(c):02x}" for c in text)


def _describe_model(name: str) -> Iterator[tuple[str, object]]:
    from lcm_core.files.checkpoint import Checkpoint
    from lcm_core.files.lora_keys import is_adapter_key
    from lcm_core.pipeline.sources import find_model

    root = find_model(name)
    if root.is_dir():
        yield from _describe_folder(root)
        return
    file = Checkpoint(root)
    yield from _describe_lora(root) if any(map(is_adapter_key, file.keys)) else _describe_checkpoint(file)
    for key, value in sorted(file.metadata.items()):
        yield key, value if len(value) <= _LONGEST else f"{value[:_LONGEST]}... ({len(value)} characters)"


def _describe_lora(path: Path) -> Iterator[tuple[str, object]]:
    from lcm_core.files.lora import read_lora

    lora = read_lora(path)
    every = [layer for layers in lora.layers.values() for layer in layers.values()]
    yield "kind", _listed(sorted({layer.kind + " with DoRA" * (layer.magnitude is not None) for layer in every}))
    for part, layers in lora.layers.items():
        ranks: list[Any] = sorted({layer.rank for layer in layers.values() if layer.rank is not None}) or ["none"]
        alphas: list[Any] = sorted({layer.alpha for layer in layers.values() if layer.alpha is not None}) or ["none"]
        yield part, f"{len(layers)} layers, rank {_listed(ranks)}, alpha {_listed(alphas)}"


def _describe_checkpoint(file: Checkpoint) -> Iterator[tuple[str, object]]:
    from lcm_core.files.checkpoint import read_info

    yield "kind", "checkpoint, one file"
    info = read_info(file)
    yield "architecture", info.family
    yield "prediction_type", info.prediction_type
    for name in file.names:
        component = file.take(name)
        yield name, _describe_weights(component.tensors)
        if name == "unet":
            yield from _describe_inputs(component.config)


def _describe_folder(root: Path) -> Iterator[tuple[str, object]]:
    from lcm_core.files.safetensors import read_folder, read_json
    from lcm_core.pipeline.sources import CARD

    yield "kind", "model folder"
    if (root / CARD).is_file():
        yield from read_json(root / CARD).items()
    for config in sorted(root.glob("*/config.json")):
        yield config.parent.name, _describe_weights(read_folder(config.parent))
        if config.parent.name.startswith("unet"):
            yield from _describe_inputs(read_json(config))
    for lora in sorted(root.glob("lora/*.safetensors")):
        yield "lora", lora.stem


def _describe_inputs(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """What a U-Net reads beside text and timestep."""
    from lcm_core.diffusion.flow_map import END_KEY

    end = config.get(END_KEY) or 0
    yield "guidance embedding", (config.get("time_cond_proj_dim") or 0) - end or "none"
    if end:
        yield "flow map", f"is told where a step ends (embedding {end}); any number of steps, sampler tcd"


def _describe_weights(tensors: Mapping[str, Tensor]) -> str:
    count = sum(tensor.numel() for tensor in tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return f"{count / 1e6:.1f} M parameters, {_listed(dtypes)}"


def _listed(values: list[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
