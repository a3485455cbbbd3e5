"""A finished cache that stands for the pictures."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from lcm_core.errors import InputError
from trainer.data.batches import LatentCache
from trainer.data.index import check_unchanged
from trainer.data.settings import DataConfig
from trainer.data.shards import is_unchanged, known_whole
from trainer.data.teacher import Teacher
from trainer.distributed import Processes


@dataclass(frozen=True)
class FinishedCache:
    """A cache that is given as the data, instead of pictures; nothing of these is looked at."""

    config: DataConfig
    teacher: Teacher
    index: Path

    @cached_property
    def cache(self) -> LatentCache:
        """What it holds."""
        checked = is_unchanged(self.index, known_whole(self.index.parent))
        return LatentCache(self.index, self.config.null_prompt == "zeros", checked)

    @property
    def captions(self) -> list[str]:
        """A few of them, from all over; the index has no more."""
        return self.cache.examples

    def hash_pictures(self) -> str:
        """What `CachePlan.hash_pictures` was."""
        return str(self.cache.about["contents"][0])

    def hash_captions(self) -> str:
        """What `CachePlan.hash_captions` was."""
        return str(self.cache.about["contents"][1])

    def fill(self, device: torch.device, processes: Processes) -> LatentCache:
        """Open it.

        Raises:
            InputError: it is damaged or not complete, belongs to another teacher, or was made with other settings.
        """
        about = self.cache.about
        check_unchanged(about, asdict(self.config), asdict(DataConfig()))
        found = set(os.listdir(self.index.parent))
        names = (f"{number:06d}.safetensors" for number in range(about["shards"]))
        if (gone := next((name for name in names if name not in found), None)) is not None:
            raise InputError(f"{self.index.parent / gone} is missing; fill the cache again")
        for part, value in self.teacher.hash_encoders().items():
            if value != about["made_by"][part]:
                raise InputError(
                    f"the cache {self.config.path} was made with another {part} than that of {self.teacher.name}; "
                    "give the teacher that it was made for"
                )
        return self.cache
