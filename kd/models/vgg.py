"""VGG with BatchNorm for small images (Simonyan & Zisserman, arXiv:1409.1556, table 1; BatchNorm: arXiv:1502.03167).

Five groups of 3 x 3 convolutions with 64, 128, 256, 512 and 512 channels, and max-pools between the groups. vgg11 and
vgg13 are the paper's configurations A and B; vgg8, with one convolution per group, is the distillation literature's
student (arXiv:1910.10699, section 4). Differs from the paper, as that literature does: a global average pool and one
linear layer instead of three, and no max-pool before the last group for images up to 32 pixels. Differs from that
literature's code for larger images: it pools there only if they have exactly 64 pixels, this network always.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""The groups after the first ("stem"); without it VGG's stages pair with those of the other families."""

POOLED = "layer4"
BEFORE_RELU = tuple(f"{stage}.-1.input" for stage in STAGES)

CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2)}
"""Depth -> convolutions in each group. Depth counts the paper's three linear layers too."""

SMALL = 32  # images up to this many pixels on the longer side are not pooled before the last group


class Vgg(nn.Module):
    """Five groups of so many `convolutions` each; `last_pool`: whether a max-pool precedes the fifth group too."""

    def __init__(self, convolutions: tuple[int, int, int, int, int], last_pool: bool, num_classes: int):
        super().__init__()
        self.last_pool = last_pool
        self.stem = _group(3, 64, convolutions[0])
        self.layer1 = _group(64, 128, convolutions[1])
        self.layer2 = _group(128, 256, convolutions[2])
        self.layer3 = _group(256, 512, convolutions[3])
        self.layer4 = _group(512, 512, convolutions[4])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        x = self.layer1(F.max_pool2d(self.stem(x), 2))
        x = self.layer3(F.max_pool2d(self.layer2(F.max_pool2d(x, 2)), 2))
        x = self.layer4(F.max_pool2d(x, 2) if self.last_pool else x)
        return self.fc(self.pool(x).flatten(1))


def _group(channels_in: int, channels: int, convolutions: int) -> nn.Sequential:
    layers = []
    for index in range(convolutions):
        # BatchNorm cancels the bias; it stays because published parameter counts include it.
        convolution = nn.Conv2d(channels if index else channels_in, channels, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def build(depth: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return Vgg(CONVOLUTIONS[depth], max(image_size) > SMALL, num_classes)


MODELS: dict[str, Callable] = {f"vgg{depth}": partial(build, depth) for depth in CONVOLUTIONS}
