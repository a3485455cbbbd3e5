"""Prompts to what the U-Net is conditioned on: CLIP's text encoders of SD 1.x, SD 2.x and SDXL, with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import Checkpoint, Component, ModelPath, list_components, read_component
from lcm_core.files.safetensors import PathLike
from lcm_core.networks.chunks import Chunk, split_chunks
from lcm_core.networks.clip import assemble_clip
from lcm_core.networks.conditioning import repeat_alike
from lcm_core.networks.device import Device, choose_device, choose_dtype
from lcm_core.networks.inversions import Inversion, named, read_inversion
from lcm_core.networks.prompt import parse_weights
from lcm_core.networks.tokenizer import Tokenizer, build_tokenizer, find_tokenizer_files

Size = tuple[int, int]
States = tuple[Tensor, Tensor | None]
CACHED_PROMPTS = 64
_CLIP_VOCABULARY = 49408
_OPENCLIP_PAD = 0


@dataclass(frozen=True)
class Encoder:
    """A transformers CLIPTextModel (or CLIPTextModelWithProjection) with its tokenizer."""

    model: Any
    tokenizer: Tokenizer


class TextEncoder:
    """One CLIP text encoder (SD 1.x, SD 2.x) or the two of SDXL.

    Args:
        encoders: one, or SDXL's two in their order.
        clip_skip: how many of the last layers to leave out, for checkpoints that were trained so.
        inversions: textual inversions that prompts may name.
    """

    def __init__(self, encoders: Sequence[Encoder], clip_skip: int = 0, inversions: Sequence[Inversion] = ()) -> None:
        self.encoders = list(encoders)
        self.clip_skip = clip_skip
        self.inversions = {inversion.name: inversion for inversion in inversions}
        # a method of this object in its own cache would keep the networks in memory after their last use
        self._encode = lru_cache(CACHED_PROMPTS)(partial(_encode, self.encoders, clip_skip))
        words = [_words_of(encoder, inversions, number) for number, encoder in enumerate(self.encoders)]
        self._encode_weighted = lru_cache(CACHED_PROMPTS)(partial(_encode_weighted, self.encoders, clip_skip, words))
        self._lock = Lock()  # while textual inversions are in their places, no other thread may encode

    @property
    def is_sdxl(self) -> bool:
        """Whether pooled text and sizes go with the prompt."""
        return len(self.encoders) == 2

    @torch.inference_mode(False)  # else what is kept could never be trained with
    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        size: Size = (1024, 1024),
        original_size: Size | None = None,
        crop: Size = (0, 0),
        weighted: bool = False,
    ) -> dict[str, Any]:
        """Conditioning for a batch of prompts. Each is encoded alone, so none depends on the others.

        Args:
            prompts: B texts; words beyond 77 tokens are left out with a warning.
            size: (height, width) of the picture to paint; SDXL only, like the rest.
            original_size: (height, width) of the training pictures to resemble; small ones were blurred. None: `size`.
            crop: (top, left) that would have been cropped from it.
            weighted: read weights, BREAK and textual inversions, see `prompt.parse_weights`, and all words, 75 in each
                of N chunks. Shorter prompts of a batch are repeated to the length of the longest.

        Returns:
            `encoder_hidden_states` (B, 77 N, D) float32; for SDXL also `added_cond_kwargs` with `text_embeds` (B, P)
            and `time_ids` (B, 6) = original size, crop, size.

        Raises:
            InputError: a prompt that cannot be encoded.
        """
        with self._lock:
            if weighted:
                rows = [self._encode_weighted(named(prompt, self.inversions)) for prompt in prompts]
            else:
                rows = [self._encode(prompt) for prompt in prompts]
        states = repeat_alike(*({"states": row[0]} for row in rows))
        hidden = torch.cat([state["states"] for state in states])
        cond: dict[str, Any] = {"encoder_hidden_states": hidden}
        pooled = [row[1] for row in rows if row[1] is not None]
        if pooled:
            numbers = (*(original_size or size), *crop, *size)
            time_ids = torch.tensor([numbers] * len(rows), dtype=torch.float32, device=hidden.device)
            cond["added_cond_kwargs"] = {"text_embeds": torch.cat(pooled), "time_ids": time_ids}
        return cond

    def clear_cache(self) -> None:
        """Forget encoded prompts; needed after a text encoder's weights have changed, e.g. by `lora.merge`."""
        self._encode.cache_clear()
        self._encode_weighted.cache_clear()


def _encode(encoders: Sequence[Encoder], clip_skip: int, prompt: str) -> States:
    """A prompt's states (1, 77, D), and SDXL's pooled text (1, P)."""
    is_sdxl = len(encoders) > 1
    return _join([_states(one, _run(one, one.tokenizer(prompt)), clip_skip, is_sdxl) for one in encoders])


def _encode_weighted(
    encoders: Sequence[Encoder], clip_skip: int, words: Sequence[Mapping[tuple[int, ...], Tensor]], prompt: str
) -> States:
    """The same as `_encode` for N chunks, (1, 77 N, D)."""
    segments = parse_weights(prompt)
    found = []
    for encoder, inversions in zip(encoders, words, strict=True):
        chunks = split_chunks(encoder.tokenizer, segments, inversions)
        states = [_encode_chunk(encoder, clip_skip, chunk, len(encoders) > 1) for chunk in chunks]
        found.append((torch.cat([state for state, _ in states], dim=1), states[0][1]))
    return _join(found)


def _encode_chunk(encoder: Encoder, clip_skip: int, chunk: Chunk, is_sdxl: bool) -> States:
    """A chunk's states (1, 77, D), each times its weight, and then scaled to the mean that they had, as A1111 does."""
    with _replaced(encoder, chunk.vectors):
        output = _run(encoder, encoder.tokenizer.row(chunk.ids))
    states, pooled = _states(encoder, output, clip_skip, is_sdxl)
    if all(weight == 1 for weight in chunk.weights):
        return states, pooled
    weights = torch.ones(states.shape[1], device=states.device)
    weights[1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights)
    return keep_mean(states * weights[:, None], states), pooled


def keep_mean(weighted: Tensor, states: Tensor) -> Tensor:
    """`weighted` scaled to the mean of `states`, as A1111 does; as it is where its own mean is 0, of which that makes
    NaN."""
    before, after = states.mean(), weighted.mean()
    return weighted * torch.where(after == 0, 1.0, before / after)


@contextmanager
def _replaced(encoder: Encoder, vectors: Mapping[int, Tensor]) -> Iterator[None]:
    """Textual inversions in place of the tokens that hold their places."""

    def place(module: Any, args: Any, embedded: Tensor) -> Tensor:
        for start, rows in vectors.items():
            embedded[0, 1 + start : 1 + start + len(rows)] = rows.to(embedded)
        return embedded

    model = getattr(encoder.model, "text_model", encoder.model)
    hook = model.embeddings.token_embedding.register_forward_hook(place)
    try:
        yield
    finally:
        hook.remove()


def _words_of(encoder: Encoder, inversions: Sequence[Inversion], number: int) -> dict[tuple[int, ...], Tensor]:
    """The tokens of each inversion's name -> its vectors for one encoder."""
    return {tuple(encoder.tokenizer.words(inversion.name)): inversion.vectors[number] for inversion in inversions}


def _join(found: Sequence[States]) -> States:
    """The states of all encoders side by side, and the last one's pooled text."""
    return torch.cat([states for states, _ in found], dim=-1), found[-1][1]


def load_text(
    path: ModelPath,
    device: Device | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: PathLike | None = None,
    clip_skip: int = 0,
    inversions: Sequence[PathLike] = (),
) -> TextEncoder:
    """Load a model's text encoders and tokenizers, frozen and in evaluation mode.

    Args:
        path: a diffusers folder or a single file, opened or not.
        device: None chooses for this machine.
        dtype: None chooses float32 on a CPU, where prompts cost little, else what `choose_dtype` says.
        tokenizer: see `tokens.find_tokenizer_files`.
        clip_skip: see `TextEncoder`.
        inversions: files of textual inversions.

    Raises:
        InputError: no usable text encoder or tokenizer there.
    """
    place = choose_device(device)
    number = torch.float32 if dtype is None and place.type == "cpu" else choose_dtype(place, dtype)
    if not isinstance(path, Checkpoint) and Path(path).is_file():
        path = Checkpoint(path)
    names = [name for name in list_components(path) if name.startswith("text_encoder")] or ["text_encoder"]
    # the words first: a single file often lacks them, which is found before seconds of loading
    words = [find_tokenizer_files(path, tokenizer, name.replace("text_encoder", "tokenizer")) for name in names]
    encoders = []
    for name, found in zip(names, words, strict=True):
        component = read_component(path, name)
        model = _load_encoder(component, place, number)
        pad = _OPENCLIP_PAD if _pads_with_zero(path, component) else None
        row = Tokenizer(build_tokenizer(*found), model.config.max_position_embeddings, pad)
        encoders.append(Encoder(model, row))
    if not 0 <= clip_skip < encoders[0].model.config.num_hidden_layers:
        raise InputError(f"clip_skip {clip_skip} is out of range; use 0 for the layers that the model was trained with")
    widths = [encoder.model.config.hidden_size for encoder in encoders]
    return TextEncoder(encoders, clip_skip, [read_inversion(path, widths) for path in inversions])


def _pads_with_zero(path: ModelPath, component: Component) -> bool:
    """OpenCLIP's encoders were trained on zero padding. Folders say so in their tokenizer, single files do not."""
    config = component.config
    has_clip_words = config.get("vocab_size") == _CLIP_VOCABULARY
    return isinstance(path, Checkpoint) and config.get("hidden_act") == "gelu" and has_clip_words


def _load_encoder(component: Component, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}
    architectures = component.config.get("architectures") or ["CLIPTextModel"]
    kind = architectures[0] if isinstance(architectures, list) else architectures
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{component.source} holds a {kind}; give a model with a CLIP text encoder")
    build: Any = kinds[kind]
    return assemble_clip(lambda: build(CLIPTextConfig.from_dict(component.config)), component, device, dtype)


def _run(encoder: Encoder, numbers: Sequence[int]) -> Any:
    if max(numbers) >= encoder.model.config.vocab_size:
        raise InputError(
            f"the tokenizer knows word {max(numbers)}, the text encoder only {encoder.model.config.vocab_size} words; "
            "give the tokenizer that belongs to the model"
        )
    ids = torch.tensor([numbers], device=encoder.model.device)  # (1, 77)
    return encoder.model(input_ids=ids, output_hidden_states=True)


def _states(encoder: Encoder, output: Any, clip_skip: int, is_sdxl: bool) -> States:
    """What the U-Net is given of an encoder's output, (1, 77, D), and its pooled text."""
    if is_sdxl:  # trained on the last layer but one, without the final norm
        pooled = getattr(output, "text_embeds", None)
        return output.hidden_states[-2 - clip_skip].float(), None if pooled is None else pooled.float()
    if not clip_skip:
        return output.last_hidden_state.float(), None
    norm = getattr(encoder.model, "text_model", encoder.model).final_layer_norm
    return norm(output.hidden_states[-1 - clip_skip]).float(), None
