"""Models put where other programs look for them: one module per program."""

GUIDANCE_KEY = "lcm_suite.guidance_scale"
"""Safetensors metadata: the guidance scale that a full LCM is used with where the user says nothing."""
