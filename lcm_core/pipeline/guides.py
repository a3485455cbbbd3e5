"""What guides the painting beside the prompt: pictures, and a negative prompt without a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.networks.control import Control, controlled
from lcm_core.networks.cross_attention import Attended, Nag, attending
from lcm_core.networks.ip_adapter import IPAdapter
from lcm_core.networks.unet import UNet
from lcm_core.pipeline.image import load_image, load_mask
from lcm_core.pipeline.model import Conditioning, Model
from lcm_core.pipeline.prompts import Step
from lcm_core.pipeline.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_STRENGTH = 10.0  # of a control


class Hint(NamedTuple):
    """A picture that says where things are."""

    network: Control
    picture: Any  # see `image.open_image`
    strength: float


class Sight(NamedTuple):
    """A picture that is attended to like words."""

    network: IPAdapter
    picture: Any
    strength: float


@dataclass(frozen=True)
class Guides:
    """What guides a batch beside its prompts."""

    hints: tuple[Hint, ...] = ()
    sights: tuple[Sight, ...] = ()
    nag: Nag = field(default_factory=Nag)

    @property
    def changes_attention(self) -> bool:
        """Whether more than the prompt is attended to."""
        return bool(self.sights) or self.nag.is_on


def open_guides(model: Model, settings: Settings, control: Sequence[tuple[str, Any, float]] = ()) -> Guides:
    """The networks of pictures that guide, and how far the negative prompt is avoided.

    Raises:
        InputError: one cannot be used, or its strength is out of range.
    """
    hints, sights = [], []
    for name, picture, strength in control:
        network = model.control(name)
        if not abs(strength) <= _MOST_STRENGTH:
            raise InputError(f"control strength {strength:g} is out of range; 0 is off, 1 is usual")
        if isinstance(network, IPAdapter):
            sights.append(Sight(network, picture, strength))
        else:
            hints.append(Hint(network, picture, strength))
    nag = Nag(settings.nag_scale, settings.nag_tau, settings.nag_alpha)
    return Guides(tuple(hints), tuple(sights), nag)


def check_nag(model: Model, settings: Settings) -> None:
    """Refuse normalised attention guidance where it cannot be.

    Raises:
        InputError: the model has other layers, or there is a negative pass already.
    """
    if settings.nag_scale == 1:
        return
    if not isinstance(model.unet, UNet):
        raise InputError(f"nag_scale was given, but {model.name} is no Stable Diffusion model; leave it out")
    if model.guidance_embedding_dim is None and settings.guidance_scale != 1:
        raise InputError(
            f"nag_scale was given at guidance {settings.guidance_scale:g}, which has a negative pass already; use "
            "guidance 1, or leave nag_scale out"
        )


def guided_network(model: Model, guides: Guides, shape: Sequence[int]) -> Callable[..., Tensor]:
    """The network that predicts, with what guides it, for latents of this shape (C, h, w)."""
    if not isinstance(model.unet, UNet):
        return model.unet
    network: Callable[..., Tensor] = model.unet
    if guides.changes_attention:
        pictures = [(sight.network.keys, sight.strength) for sight in guides.sights]
        network = attending(model.unet, Attended(guides.nag, pictures))
    size = (shape[-1] * model.vae.scale, shape[-2] * model.vae.scale)
    added = [hint.network.guide(_hint_pixels(hint, size), hint.strength) for hint in guides.hints]
    return controlled(network, added) if added else network


def _hint_pixels(hint: Hint, size: tuple[int, int]) -> Tensor:
    """(1, 1 or 3, H, W) in [0, 1]."""
    return load_mask(hint.picture, size) if hint.network.channels == 1 else load_image(hint.picture, size) / 2 + 0.5


def seen_tokens(network: IPAdapter, picture: Any) -> tuple[Tensor, Tensor]:
    """What an IP-Adapter makes of a picture (`image.open_image`), and of none; see `IPAdapter.tokens`."""
    return network.tokens(load_image(picture, (network.side,) * 2, _as_clip_does) / 2 + 0.5)


def _as_clip_does(image: Image, size: tuple[int, int] | None) -> Image:
    """The middle of a picture, by its shorter side."""
    from PIL.Image import Resampling

    assert size is not None
    side = size[0]
    width, height = (max(int(length * side / min(image.size)), side) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), Resampling.BICUBIC).crop((left, top, left + side, top + side))


class Passes(NamedTuple):
    """Each step's conditioning, of the positive and of the negative pass."""

    cond: list[Step]
    uncond: list[Step] | None


def attend_in_steps(guides: Guides, passes: Passes, avoided: Sequence[Step] | None) -> Passes:
    """Give every step what is attended to beside its text.

    Args:
        guides: the pictures.
        passes: the prompts' conditioning.
        avoided: each step's negative prompt, for `Nag`; None where that is off.
    """
    tokens = [seen_tokens(sight.network, sight.picture) for sight in guides.sights]
    positive, negative = ({str(number): pair[half] for number, pair in enumerate(tokens)} for half in (0, 1))
    made: dict[tuple[Step, Step | None], Step] = {}  # equal steps stay equal, so that they are guided by one function
    attended = []
    absent: list[Step | None] = [None] * len(passes.cond)
    for step, other in zip(passes.cond, avoided or absent, strict=True):
        if (step, other) not in made:
            states = {} if other is None else {"negative_states": other.parts[0]["encoder_hidden_states"]}
            made[step, other] = _with(step, positive, states)
        attended.append(made[step, other])
    if passes.uncond is None:
        return Passes(attended, None)
    without = {step: _with(step, negative, {}) for step in dict.fromkeys(passes.uncond)}
    return Passes(attended, [without[step] for step in passes.uncond])


def _with(step: Step, tokens: dict[str, Tensor], states: Conditioning) -> Step:
    def more(part: Conditioning) -> Conditioning:
        rows = len(part["encoder_hidden_states"])
        seen = {name: value.expand(rows, -1, -1) for name, value in tokens.items()}
        return part | states | ({"picture_tokens": seen} if seen else {})

    return replace(step, parts=tuple(map(more, step.parts)))
