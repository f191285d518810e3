"""MobileNetV2 of the distillation literature (Sandler et al., arXiv:1801.04381, table 2; arXiv:1910.10699, section 4).

Half the paper's width, with expansion 6. Differs from the paper, as that literature does: the 24-channel blocks keep
their resolution, so the total stride is 16 and not 32; ReLU and not ReLU6; the first block has a 1 x 1 convolution
although it expands by 1; no dropout.
"""

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""At 1/2, 1/4, 1/8 and 1/16 of the resolution. All maps are linear: no ReLU follows."""

POOLED = "head"
BEFORE_RELU = STAGES

# Expansion, channels at full width, blocks, stride of the first block: table 2's rows, by resolution.
LAYER1 = ((1, 16, 1, 1), (6, 24, 2, 1))
LAYER2 = ((6, 32, 3, 2),)
LAYER3 = ((6, 64, 4, 2), (6, 96, 3, 1))
LAYER4 = ((6, 160, 3, 2), (6, 320, 1, 1))

STEM, HEAD = 32, 1280  # channels at full width; narrower networks keep the head's (section 4)


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow without activation (figure 3); with a shortcut if the shape stays."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = channels_in * expansion
        self.shortcut = stride == 1 and channels_in == channels
        self.expand = _convolution(channels_in, hidden, 1)
        self.filter = _convolution(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        residual = self.project(self.filter(self.expand(x)))
        return x + residual if self.shortcut else residual


class MobileNetV2(nn.Module):
    """`width` multiplies the channels of all layers but the head."""

    def __init__(self, width: float, num_classes: int):
        super().__init__()
        self.stem = _convolution(3, int(STEM * width), 3, stride=2)
        self.layer1, channels = _stage(int(STEM * width), LAYER1, width)
        self.layer2, channels = _stage(channels, LAYER2, width)
        self.layer3, channels = _stage(channels, LAYER3, width)
        self.layer4, channels = _stage(channels, LAYER4, width)
        self.head = _convolution(channels, HEAD, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(HEAD, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        x = self.layer2(self.layer1(self.stem(x)))
        x = self.layer4(self.layer3(x))
        return self.fc(self.pool(self.head(x)).flatten(1))


def _convolution(channels_in: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


def _stage(channels_in: int, rows: tuple[tuple[int, int, int, int], ...], width: float) -> tuple[nn.Sequential, int]:
    """The blocks of some rows of the table, and the number of channels they output."""
    blocks = []
    for expansion, full, repeats, stride in rows:
        channels = int(full * width)
        for index in range(repeats):
            blocks.append(InvertedResidual(channels_in, channels, 1 if index else stride, expansion))
            channels_in = channels
    return nn.Sequential(*blocks), channels_in


def build(width: float, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return MobileNetV2(width, num_classes)


MODELS: dict[str, Callable] = {"mobilenetv2": partial(build, 0.5)}
