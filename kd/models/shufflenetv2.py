"""ShuffleNetV2 1x for small images (Ma et al., arXiv:1807.11164, table 5; arXiv:1910.10699, section 4).

Differs from the paper, as the distillation literature does: the stem is one 1 x 1 convolution without stride or
max-pool.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3")
"""At 1/2, 1/4 and 1/8 of the resolution; the paper calls them stages 2, 3 and 4."""

POOLED = "head"
BEFORE_RELU = STAGES  # half of a map's channels pass the last unit's ReLU by, so no tensor is the map before it

STEM, HEAD = 24, 1024  # channels
WIDTHS, UNITS = (116, 232, 464), (4, 8, 4)  # channels and units of each stage; table 5, 1x


class Unit(nn.Module):
    """Half of the channels are convolved, half are passed on unchanged; then both are shuffled (figure 3c)."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, stride=1)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        unchanged, convolved = x.chunk(2, dim=1)
        return self.shuffle(torch.cat([unchanged, self.branch(convolved)], dim=1))


class Reduction(nn.Module):
    """Two branches of stride 2, each over all channels; then their outputs are shuffled (figure 3d)."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        half = channels // 2
        self.bypass = nn.Sequential(*_depthwise(channels_in, stride=2), *_pointwise(channels_in, half))
        self.branch = _branch(channels_in, half, stride=2)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.shuffle(torch.cat([self.bypass(x), self.branch(x)], dim=1))


class ShuffleNetV2(nn.Module):
    """Three stages, each starting with a reduction."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Sequential(*_pointwise(3, STEM))
        self.layer1 = _stage(STEM, WIDTHS[0], UNITS[0])
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], UNITS[1])
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], UNITS[2])
        self.head = nn.Sequential(*_pointwise(WIDTHS[2], HEAD))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(HEAD, num_classes)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(self.pool(self.head(x)).flatten(1))


def _pointwise(channels_in: int, channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    """One 3 x 3 filter per channel, without ReLU."""
    convolution = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return [convolution, nn.BatchNorm2d(channels)]


def _branch(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *_pointwise(channels_in, channels), *_depthwise(channels, stride), *_pointwise(channels, channels)
    )


def _stage(channels_in: int, channels: int, units: int) -> nn.Sequential:
    return nn.Sequential(Reduction(channels_in, channels), *(Unit(channels) for _ in range(units - 1)))


def build(num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return ShuffleNetV2(num_classes)


MODELS: dict[str, Callable] = {"shufflenetv2": build}
