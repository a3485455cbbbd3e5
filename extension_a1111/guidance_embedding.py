"""The guidance of full latent consistency models: a weight in the checkpoint that web UIs drop when they load it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from extension_a1111.translation import Mistake
from lcm_core.diffusion.guidance import Model, guide
from lcm_core.files.safetensors import check_file

COND_PROJ = "time_embed.cond_proj.weight"


def read_cond_proj(checkpoint: str | os.PathLike[str]) -> Tensor | None:
    """The weight (channels, D) that takes the guidance embedding into a checkpoint's network; None where it has none.

    Only the header and this one weight are read, and again only when the file has changed. Other formats than
    safetensors count as having none: to look inside a pickle could run code.
    """
    file = Path(checkpoint)
    if file.suffix.lower() != ".safetensors" or not file.is_file():
        return None
    return _read_cond_proj(str(file), file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_cond_proj(file: str, modified: int) -> Tensor | None:
    name = next((key for key in check_file(Path(file)) if key.endswith(COND_PROJ)), None)
    if name is None:
        return None
    with safe_open(file, framework="pt", device="cpu") as opened:
        return opened.get_tensor(name).float()


class GuidanceHook:
    """Adds `cond_proj(embedding)` to what enters a U-Net's `time_embed` (arXiv 2310.04378 Sec. 4.2).

    The network itself is not changed: without the hook, or outside a step, it is as the host loaded it.
    """

    def __init__(self) -> None:
        self._time_embed: nn.Module | None = None
        self._remove: Callable[[], None] = _nothing
        self._cond_proj: Tensor | None = None
        self._embedding: Tensor | None = None  # (1, D), within a step only

    @property
    def is_wanted(self) -> bool:
        """Whether a guided step is under way."""
        return self._embedding is not None

    def attach(self, time_embed: nn.Module, cond_proj: Tensor | None) -> None:
        """Follow the host to the network that it uses now, which may change within a picture (refiner, hires)."""
        if time_embed is not self._time_embed:
            self.detach()
            self._time_embed = time_embed
            self._remove = time_embed.register_forward_pre_hook(self._add).remove
        self._cond_proj = cond_proj

    def detach(self) -> None:
        """Leave the network as it was."""
        self._remove()
        self._remove, self._time_embed = _nothing, None

    def guide(self, model: Model, guidance_scale: float, embedding_dim: int) -> Model:
        """A denoiser whose network reads `guidance_scale` from the embedding in each call."""

        def embedded(x: Tensor, sigma: Tensor, timestep_cond: Tensor, **extra_args: Any) -> Tensor:
            self._embedding = timestep_cond[:1]
            try:
                return model(x, sigma, **extra_args)
            finally:
                self._embedding = None

        return guide(embedded, {}, None, guidance_scale, embedding_dim)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._embedding is None or self._cond_proj is None:
            return None
        times = inputs[0]  # (rows, channels)
        embedding = self._embedding.to(times.device)
        # In float32, whatever the network computes in: the sum is small beside its own rounding.
        added = functional.linear(embedding, self._cond_proj.to(times.device))
        return ((times.float() + added).to(times.dtype), *inputs[1:])


def no_embedding(checkpoint: Path) -> Mistake:
    """What to say when guidance as w-embedding is asked of a model that has none."""
    words = "{model} is no full LCM and reads no guidance embedding; use the CFG scale"
    return Mistake(words, model=checkpoint.stem)


def _nothing() -> None:
    pass
