"""Latent Consistency Models: schedules, samplers, guidance, interpolation, checkpoints and pipelines.

Importing this package loads nothing heavy; import the module that you need: `from lcm_core.pipeline import Pipeline`.
"""

__version__ = "0.1.0"
