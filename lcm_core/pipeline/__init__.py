"""From a model's name and a prompt to pictures: `Pipeline`, its settings, and what becomes of them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcm_core.pipeline.options import PictureOptions
    from lcm_core.pipeline.pipeline import Keyframe, Pipeline, Result

__all__ = ["Keyframe", "PictureOptions", "Pipeline", "Result"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the settings beside it are needed by command lines and hosts that must start at once.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lcm_core.pipeline import pipeline  # which has all of them

    return getattr(pipeline, name)
