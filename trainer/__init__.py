"""Distilling Stable Diffusion checkpoints into Latent Consistency Models. Run `python -m trainer --help`."""
