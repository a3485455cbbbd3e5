"""Convolutions of small pictures for training on a CPU, where weights outweigh the pixels that they are used on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_POSITIONS = 256
"""Positions of a whole batch's output up to which one matrix product is faster than oneDNN's convolution, measured on
one thread of an AVX2 processor at 640 to 2560 channels. Forward at 1280 channels: 31 instead of 78 ms on 8 x 8 pixels,
and 38 instead of 122 ms for four of 4 x 4; backward as well. At 256 positions both take the same at 640 channels."""


class SmallPictureConv2d(nn.Conv2d):
    """A 3x3 convolution that becomes one matrix product where the batch has few positions.

    oneDNN first brings the weights into the order that its kernel reads, in every call. With 1280 channels that takes
    longer than the convolution of 8 x 8 pixels itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H', W')."""
        height, width = ((side - 1) // stride + 1 for side, stride in zip(x.shape[2:], self.stride, strict=True))
        if len(x) * height * width > MOST_POSITIONS:
            return super().forward(x)
        # (B, in * 9, positions) to (in * 9, B * positions): one product for the whole batch
        columns = functional.unfold(x, self.kernel_size, padding=1, stride=self.stride).transpose(0, 1).flatten(1)
        weight = self.weight.flatten(1)
        product = weight @ columns if self.bias is None else torch.addmm(self.bias[:, None], weight, columns)
        return product.view(-1, len(x), height, width).transpose(0, 1)


def use_matrix_products(network: nn.Module) -> None:
    """Put `SmallPictureConv2d` in the place of a network's 3x3 convolutions in float32, with the same parameters."""
    for path, module in list(network.named_modules()):
        if type(module) is nn.Conv2d and "weight" in module._parameters and _is_usual(module):  # stored as it is
            down, across = module.stride
            with torch.device("meta"):
                small = SmallPictureConv2d(module.in_channels, module.out_channels, 3, (down, across), 1)
            small.weight, small.bias = module.weight, module.bias
            network.set_submodule(path, small.train(module.training))


def _is_usual(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), 1, "zeros") and conv.weight.dtype == torch.float32
