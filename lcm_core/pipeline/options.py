"""What is asked for a picture: one record, from a command line or a caller to the picture's file, and back from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lcm_core.errors import InputError
from lcm_core.files.reading import check_text
from lcm_core.pipeline.settings import Settings

_PATHS = ("model", "vae", "tokenizer", "image", "mask")
_EXAMPLES: dict[str, Any] = {
    **asdict(Settings()),
    **dict.fromkeys((*_PATHS, "class_name", "unet", "device", "dtype", "vae_dtype"), "a text"),
    "timesteps": [999, 749],
    "shift": 3.0,
    "lora": [["style.safetensors", 0.8]],
    "control": [["canny", "outlines.png", 0.8]],
    "embedding": ["style.safetensors"],
    "threads": 4,
}


@dataclass(frozen=True)
class PictureOptions:
    """What was asked for; None leaves it to the model, or to the machine. A picture carries all of it as JSON.

    `a | b` is what `b` says, and what `a` says where `b` says nothing.
    """

    # by the names of `Settings`, which explains them
    prompt: str | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    nag_scale: float | None = None
    nag_tau: float | None = None
    nag_alpha: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    original_steps: int | None = None
    timesteps: Sequence[int] | None = None
    gamma: float | None = None
    shift: float | None = None
    strength: float | None = None
    upscale: float | None = None
    upscale_strength: float | None = None
    second_prompt: str | None = None
    blend: float | None = None
    prompt_syntax: str | None = None
    class_name: str | None = None
    """What a class-conditional model paints instead of a prompt: a class by its name or its number."""
    # pictures to start from
    image: str | None = None
    """Path of the input picture."""
    mask: str | None = None
    """Path of the picture that is white where to paint."""
    control: Sequence[Sequence[Any]] | None = None
    """The pictures that guide the painting, each as the network's path or name, the picture's path, a strength."""
    # by the names of `model.load_model`, which explains them
    model: str | None = None
    unet: str | None = None
    lora: Sequence[Sequence[Any]] | None = None
    """Pairs of a path and a strength."""
    vae: str | None = None
    embedding: Sequence[str] | None = None
    """Paths of textual inversions."""
    tokenizer: str | None = None
    device: str | None = None
    dtype: str | None = None
    vae_dtype: str | None = None
    threads: int | None = None
    """Threads of the CPU: sums are split among them, so that another number of them rounds to other last bits."""

    def __or__(self, other: PictureOptions) -> PictureOptions:
        return replace(self, **other.said)

    @property
    def said(self) -> dict[str, Any]:
        """What is not left open, by name: plain JSON values."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def for_classes(self, classes: Sequence[str] | None, model: str) -> PictureOptions:
        """The same for a model of these classes, which has a class for a prompt; None for one that reads text.

        Raises:
            InputError: a class for a model that reads text, or a class beside a prompt.
        """
        name = self.class_name
        if name is not None and classes is None:
            raise InputError(f"class {name!r:.60} was given, but {model} paints by prompts; give a prompt")
        if name is not None and self.prompt is not None:
            raise InputError(f"both the class {name!r:.60} and the prompt {self.prompt!r:.60} were given; give one")
        if classes is None:
            return self
        # names of classes hold commas and brackets, which are no syntax
        prompt = self.prompt if name is None else name
        return replace(self, prompt=prompt, class_name=None, prompt_syntax="plain")

    def over(self, usual: Settings) -> Settings:
        """Settings with `usual` where nothing was asked for."""
        names = {field.name for field in fields(Settings)}
        return replace(usual, **{name: value for name, value in self.said.items() if name in names})


def parse_options(values: Mapping[str, Any]) -> PictureOptions:
    """The options that a picture carries; names that are not known are passed over.

    Raises:
        InputError: a value of the wrong type, or a path that leads to another computer.
    """
    known = {name: values[name] for name in _EXAMPLES if values.get(name) is not None}
    for name, value in known.items():
        if not _is_like(name, value):
            raise InputError(
                f"the setting {name}={value!r:.60} has the wrong type; it should be like {_EXAMPLES[name]!r}"
            )
    paths = [known[name] for name in _PATHS if name in known]
    for path in (
        *paths,
        *(path for path, _ in known.get("lora", ())),
        *known.get("embedding", ()),
        *_control_paths(known),
    ):
        check_text("path", path)
        if path.replace("\\", "/").startswith("//"):  # Windows would log in there
            raise InputError(f"the settings ask for {path!r}, on another computer; copy it here and give its path")
    return PictureOptions(**known)


def _is_like(name: str, value: object) -> bool:
    """Whether a value is of the type of its example."""
    if name == "timesteps":
        return isinstance(value, (list, tuple)) and all(type(number) is int for number in value)
    if name == "control":
        return isinstance(value, list) and all(map(_is_control, value))
    if name == "embedding":
        return isinstance(value, list) and all(isinstance(path, str) for path in value)
    if name == "lora":
        return isinstance(value, list) and all(map(_is_lora, value))
    example = _EXAMPLES[name]
    if type(value) is int and isinstance(example, float):
        return True
    return type(value) is type(example) and (name != "threads" or value > 0)  # type: ignore[operator]


def _control_paths(known: Mapping[str, Any]) -> list[str]:
    return [path for network, picture, _ in known.get("control", ()) for path in (network, picture)]


def _is_control(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(path, str) for path in value[:2]):
        return False
    return type(value[2]) in (int, float) and math.isfinite(value[2])


def _is_lora(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        return False
    return type(value[1]) in (int, float) and math.isfinite(value[1])
