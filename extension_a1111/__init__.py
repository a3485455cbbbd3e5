"""The extension for AUTOMATIC1111's web UI and Forge.

`scripts/` holds what the host loads; it and `host`, `sampler` and `advice` know the host, `host` alone its versions.
The other modules are plain: they import torch, safetensors and `lcm_core` only, as the web UI's Python has little else.
"""
