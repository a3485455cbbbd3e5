"""Files in and out: whole or not at all, safetensors, checkpoints of every layout, LoRA. torch and safetensors."""
