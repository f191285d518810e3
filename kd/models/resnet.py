"""Deep residual networks (He et al., arXiv:1512.03385), from torchvision.

For small images the stem is one 3 x 3 convolution of stride 1 without max-pool, worth 5 to 7 points on CIFAR-100 over
the ImageNet stem. With 100 classes resnet18 has 11.2M parameters and resnet34 21.3M.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""At full, half, quarter and eighth resolution of the stem's output; with the small stem that is the image's."""

POOLED = "layer4"
BEFORE_RELU = tuple(f"{stage}.-1.relu.input" for stage in STAGES)

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

SMALL = 64  # images up to this many pixels on the longer side get the small stem


def build(name: str, num_classes: int, image_size: tuple[int, int], **arguments) -> nn.Module:
    import torchvision

    network = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **arguments)
    if max(image_size) <= SMALL:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
        network.maxpool = nn.Identity()
    return network


MODELS: dict[str, Callable] = {name: partial(build, name) for name in NAMES}

# timm's blocks name their last ReLU by its number: basic blocks have two, bottlenecks three.
TIMM_BEFORE_RELU = {
    name: tuple(f"{stage}.-1.act{2 if name in ('resnet18', 'resnet34') else 3}.input" for stage in STAGES)
    for name in NAMES
}
