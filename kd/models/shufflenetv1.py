"""ShuffleNet with 3 groups for small images (Zhang et al., arXiv:1707.01083, table 1; arXiv:1910.10699, section 4).

Differs from the paper, as the distillation literature does: the stem is one 1 x 1 convolution without stride or
max-pool, a ReLU follows the depthwise convolution too, and a unit of stride 2 narrows to a quarter of the channels
that it adds.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3")
"""At 1/2, 1/4 and 1/8 of the resolution; the paper calls them stages 2, 3 and 4."""

POOLED = "layer3"
BEFORE_RELU = tuple(f"{stage}.-1.relu.input" for stage in STAGES)

GROUPS = 3
STEM = 24  # channels
WIDTHS, UNITS = (240, 480, 960), (4, 8, 4)  # channels and units of each stage; table 1, g = 3


class Unit(nn.Module):
    """Narrow in groups, shuffle the groups, filter each channel, widen in groups (figure 2b).

    With stride 2 (figure 2c) the average-pooled input is concatenated, not added: `channels` counts both parts.
    """

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        new = channels - channels_in if stride == 2 else channels
        hidden = new // 4
        groups = 1 if channels_in == STEM else GROUPS  # the stem has too few channels to group (section 3.3)
        self.narrow = nn.Sequential(
            nn.Conv2d(channels_in, hidden, 1, groups=groups, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()
        )
        self.shuffle = nn.ChannelShuffle(groups)
        self.filter = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
        )
        self.widen = nn.Sequential(nn.Conv2d(hidden, new, 1, groups=GROUPS, bias=False), nn.BatchNorm2d(new))
        self.average = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu = nn.ReLU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        residual = self.widen(self.filter(self.shuffle(self.narrow(x))))
        if self.average is None:
            return self.relu(residual + x)
        return self.relu(torch.cat([residual, self.average(x)], dim=1))


class ShuffleNetV1(nn.Module):
    """Three stages, each starting with a unit of stride 2."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, STEM, 1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU())
        self.layer1 = _stage(STEM, WIDTHS[0], UNITS[0])
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], UNITS[1])
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], UNITS[2])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[2], num_classes)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(self.pool(x).flatten(1))


def _stage(channels_in: int, channels: int, units: int) -> nn.Sequential:
    first = Unit(channels_in, channels, stride=2)
    return nn.Sequential(first, *(Unit(channels, channels, 1) for _ in range(units - 1)))


def build(num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return ShuffleNetV1(num_classes)


MODELS: dict[str, Callable] = {"shufflenetv1": build}
