"""The node classes that need no `trainer`: all that there are when another package of that name is in its way."""

from __future__ import annotations

from .apply import LCMApply
from .control import LCMAdapterLoader
from .grid import LCMStepsGrid
from .interpolate import LCMLatentInterpolator
from .ksampler import LCMKSampler
from .loader import LCMCheckpointLoader
from .lora import LCMLoraConvert
from .sampler import LCMSampler, LCMScheduler
from .travel import LCMTravel

NODES = [
    LCMCheckpointLoader,
    LCMApply,
    LCMKSampler,
    LCMScheduler,
    LCMSampler,
    LCMLoraConvert,
    LCMAdapterLoader,
    LCMStepsGrid,
    LCMLatentInterpolator,
    LCMTravel,
]
