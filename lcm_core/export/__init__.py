"""Models put where other programs look for them: one module per program."""

from lcm_core.files.recommended import GUIDANCE_KEY

__all__ = ["GUIDANCE_KEY"]
