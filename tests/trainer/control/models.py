"""Tiny ControlNets and T2I-Adapters with random weights, for the tests' U-Net; rows of a cache."""

import torch

from tests.trainer.conftest import WIDTH
from trainer.data.cache import Pick

WIDTHS = (32, 32, 32, 32)


def make_controlnet():
    from diffusers import ControlNetModel

    torch.manual_seed(1)
    network = ControlNetModel(
        block_out_channels=WIDTHS,
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        conditioning_embedding_out_channels=(8, 8, 8, 8),
    )
    for name, parameter in network.named_parameters():  # the layers that lead out begin with zeros
        if "controlnet_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


def make_t2i(channels, widths=WIDTHS):
    from diffusers import T2IAdapter

    torch.manual_seed(2)
    return T2IAdapter(channels, list(widths), num_res_blocks=1, adapter_type="full_adapter").eval()


def first_rows(bucket, count):
    """The first rows of a cache."""
    return [Pick(bucket, row, False) for row in range(count)]
