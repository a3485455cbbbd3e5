"""Models for ComfyUI: checkpoints and LoRAs in the folders that its stock loaders list.

A checkpoint of the usual sizes needs nothing else. The embedded model is smaller and has words of its own, which
the LCM Suite nodes add to ComfyUI (`nodes/native.py`); its files hold weights alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.checkpoint import CONFIG_KEY, Component, ModelInfo, read_safetensors, save_single_file
from lcm_core.files.safetensors import read_metadata, write_safetensors

CHECKPOINTS = Path("models", "checkpoints")
LORAS = Path("models", "loras")
CONTROLS = Path("models", "controlnet")
INPUT = Path("input")
PICTURES = ("lcm_suite_sketch", "lcm_suite_hole")
"""Names of the pictures that the example workflows start from."""


def check_host(folder: Path) -> None:
    """Refuse, before any work, a folder that is not ComfyUI.

    Raises:
        InputError: no ComfyUI there.
    """
    if not (folder / CHECKPOINTS).is_dir():
        raise InputError(
            f"{folder} is no ComfyUI folder (it has no {CHECKPOINTS}); give the one with models and custom_nodes"
        )


def export_checkpoint(
    folder: Path,
    name: str,
    components: Mapping[str, Component],
    info: ModelInfo,
    tokenizer_files: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    marks: Collection[str] = (),
) -> list[Path]:
    """Put a model into ComfyUI's list of checkpoints. An earlier export of the same name is replaced.

    Args:
        folder: ComfyUI's.
        name: what the list shows, without a suffix.
        components: all networks of the model. `cond_proj` of a full LCM stays in the file.
        info: its family, prediction type and noise schedule.
        tokenizer_files: name to text, for a model with a vocabulary of its own.
        metadata: more safetensors metadata.
        marks: see `save_single_file`.

    Returns:
        The files that were written.

    Raises:
        InputError: no ComfyUI there, or a file of another origin is in the way.
    """
    check_host(folder)
    file = folder / CHECKPOINTS / f"{name}.safetensors"
    if file.exists() and CONFIG_KEY not in read_metadata(file):
        raise InputError(f"{file} exists and is no export of LCM Suite; move or rename it first")
    save_single_file(file, components, info, tokenizer_files, metadata, marks)
    return [file]


def export_lora(folder: Path, file: Path, name: str) -> list[Path]:
    """Put a LoRA, in kohya's layout, into ComfyUI's list.

    Returns:
        The files that were written.
    """
    return _copy(file, folder, LORAS / f"{name}.safetensors")


def export_extras(folder: Path, model: Path, size: int) -> list[Path]:
    """Put there what the example workflows need beside a model: its ControlNets, and pictures to start from.

    Args:
        folder: ComfyUI's.
        model: folder of a shipped model.
        size: of its pictures, in pixels.

    Returns:
        The files that were written.
    """
    controls = sorted((model / "control").glob("*.safetensors"))
    copies = [_copy(file, folder, CONTROLS / file.name) for file in controls]
    return [path for copied in copies for path in copied] + draw_pictures(folder / INPUT, size)


def _copy(file: Path, folder: Path, place: Path) -> list[Path]:
    check_host(folder)
    write_safetensors(folder / place, *read_safetensors(file))
    return [folder / place]


def draw_pictures(folder: Path, size: int) -> list[Path]:
    """Put pictures to start from into a folder: a sketch, and the same with a hole to repaint.

    Args:
        folder: is made where it is missing.
        size: of a picture's sides, in pixels.

    Returns:
        The files that were written.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (8 * size, 8 * size), "white")  # large, then shrunk: smooth edges
    draw = ImageDraw.Draw(image)
    draw.ellipse([size * i for i in (1.2, 2.2, 6.8, 7.4)], fill=(214, 40, 57))
    draw.line([size * i for i in (4, 2.6, 4.4, 0.8)], fill=(110, 70, 40), width=size // 3)
    draw.ellipse([size * i for i in (4.5, 0.9, 6.5, 1.9)], fill=(80, 160, 60))
    sketch = image.resize((size, size), Image.Resampling.LANCZOS)
    hole = sketch.copy()
    alpha = Image.new("L", (size, size), 255)
    alpha.paste(0, (size // 2, size // 4, size, size))  # LoadImage turns what is transparent into the mask
    hole.putalpha(alpha)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, picture in zip(PICTURES, (sketch, hole), strict=True):
        written.append(folder / f"{name}.png")
        with atomic_write(written[-1]) as temporary:
            picture.save(temporary)
    return written
