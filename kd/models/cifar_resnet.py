"""The CIFAR ResNets of the distillation literature (He et al., arXiv:1512.03385, section 4.2).

Depth 6n + 2 in three stages of n basic blocks. resnet20 has 16, 32 and 64 channels; the "x4" networks have 64, 128 and
256, after a stem of 32 (arXiv:1910.10699, section 4). Differs from the paper, as that literature's code does: a
shortcut that changes shape is a 1 x 1 convolution with BatchNorm, and does not pad with zeros.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3")
"""At full, half and quarter resolution."""

POOLED = "layer3"
BEFORE_RELU = ("layer1.-1.relu.input", "layer2.-1.relu.input", "layer3.-1.relu.input")

NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)  # channels of the stem and of the three stages


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu = nn.ReLU()  # the last one, as a module: its input is a map that methods may compare

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        hidden = F.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """`widths`: channels of the stem and of the three stages."""

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int):
        super().__init__()
        blocks = (depth - 2) // 6
        stem, *stages = widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(stem, stages[0], blocks, stride=1)
        self.layer2 = _stage(stages[0], stages[1], blocks, stride=2)
        self.layer3 = _stage(stages[1], stages[2], blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(stages[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x).flatten(1))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(channels_in, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))


def build(depth: int, widths: tuple[int, int, int, int], num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return CifarResNet(depth, widths, num_classes)


MODELS: dict[str, Callable] = {
    **{f"resnet{depth}": partial(build, depth, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(build, depth, WIDE) for depth in (8, 32)},
}
