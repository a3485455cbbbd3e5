"""What a model's files hold: networks, and what kind of model they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

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


@dataclass
class Component:
    """One network: its weights in diffusers' layout, its configuration, and where they came from."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    source: str = ""
