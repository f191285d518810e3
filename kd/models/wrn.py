"""Wide residual networks (Zagoruyko & Komodakis, arXiv:1605.07146, section 2), without dropout.

wrn-D-K: depth D = 6n + 4 in three stages of n blocks, of 16K, 32K and 64K channels. BatchNorm and ReLU stand before
each convolution, so a stage's map is not yet activated. A shortcut that changes shape is a bare 1 x 1 convolution.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3")
"""At full, half and quarter resolution, before BatchNorm and ReLU, as the literature compares them."""

POOLED = "head"  # the last BatchNorm and ReLU
BEFORE_RELU = ("layer2.0.bn1", "layer3.0.bn1", "head.0")  # after the BatchNorm that a stage's map enters

SIZES = ((16, 1), (16, 2), (28, 10), (40, 1), (40, 2))  # depth, widening factor


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (table 1's basic block)."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projection = None
        if stride != 1 or channels_in != channels:
            self.projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        active = F.relu(self.bn1(x))
        # A projection takes the activated input, an identity the input itself (as in the paper's own code).
        shortcut = x if self.projection is None else self.projection(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + shortcut


class WideResNet(nn.Module):
    """`widen` multiplies the channels of the three stages, but not the stem's 16."""

    def __init__(self, depth: int, widen: int, num_classes: int):
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, 16 * widen, blocks, stride=1)
        self.layer2 = _stage(16 * widen, 32 * widen, blocks, stride=2)
        self.layer3 = _stage(32 * widen, 64 * widen, blocks, stride=2)
        self.head = nn.Sequential(nn.BatchNorm2d(64 * widen), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * widen, num_classes)
        nn.init.zeros_(self.fc.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.pool(self.head(x)).flatten(1))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(channels_in, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))


def build(depth: int, widen: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return WideResNet(depth, widen, num_classes)


MODELS: dict[str, Callable] = {f"wrn-{depth}-{widen}": partial(build, depth, widen) for depth, widen in SIZES}
