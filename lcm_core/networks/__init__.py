"""Networks: U-Net, VAE and text encoders as modules on a device, LoRA layers in them, and their speed on a CPU."""
