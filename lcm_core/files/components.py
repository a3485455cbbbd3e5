"""What a model's files hold: networks, and what kind of model they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lcm_core.errors import InputError

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class ModelInfo:
    """What a model is and how its noise was scheduled."""

    family: str
    """sd1, sd2 or sdxl; of other models the name of their family."""
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    trained_betas: tuple[float, ...] | None = None
    """The variances themselves, in place of the named schedule."""
    shift: float = 1.0
    """The shift of a flow model's noise levels; what a model itself states may depend on the picture's size."""


class Config(dict[str, Any]):
    """A network's configuration from a file, in which `[]` finds nothing but what is said; `get` is for the rest.

    Raises:
        InputError: on asking for what it does not say; names the file.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        super().__init__(values)
        self.source = source

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise InputError(f"{self.source}: the configuration does not say {key}; get the model again")
        return value


@dataclass
class Component:
    """One network: its weights in diffusers' layout, its configuration, and where they came from."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    source: str = ""
