"""Families of models beside Stable Diffusion's U-Nets, one small file each: how the network is called, how text or a
class becomes its conditioning, which layers take a LoRA, how its noise levels are shifted. `known` finds a model's
family; all else is common to them."""
