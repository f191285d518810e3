"""Small networks for the tests, named as `module:function` on the command line."""

import os

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


def plain(num_classes: int) -> nn.Module:
    """Convolutions without any normalisation: one process and two agree to rounding."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, num_classes)
    )


def normalised(num_classes: int) -> nn.Module:
    """BatchNorm and dropout: what a careless resume gets wrong."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def perceptron(num_classes: int) -> nn.Module:
    """A hidden linear layer, whose weight is a matrix, and normalisation over channels alone."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(48, 16),
        nn.LayerNorm(16),
        nn.Dropout(0.1),
        nn.GELU(),
        nn.Linear(16, 16),
        nn.Linear(16, num_classes),
    )


def counted(num_classes: int) -> nn.Module:
    """`plain`, which notes how many images it was asked about in eval mode, a line each time, in the file KD_COUNT."""

    def note(module, inputs):
        if not module.training:
            with open(os.environ.get("KD_COUNT", os.devnull), "a") as file:
                file.write(f"{len(inputs[0])}\n")  # what traces it has no length, and asks the network itself

    network = plain(num_classes)
    network.register_forward_pre_hook(note)
    return network


def deep(num_classes: int) -> nn.Module:
    """Three convolutions, so that one of them is neither the first layer nor the last."""
    layers: list[nn.Module] = []
    for channels_in, channels in ((3, 8), (8, 8), (8, 8)):
        layers += [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes))


def vit(num_classes: int) -> nn.Module:
    """A transformer for images of 8 x 8, as the answer to a patch that is too large advises."""
    from torchvision.models import VisionTransformer  # kd.models has made it importable by now

    return VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=num_classes)


def wrong_width(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes + 1))


def no_module(num_classes: int) -> str:
    return "not a network"


class _Idle(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.used, self.idle = plain(num_classes), nn.Linear(2, 2)

    def forward(self, image):
        return self.used(image)


def idle(num_classes: int) -> nn.Module:
    """A part of it gets no gradient."""
    return _Idle(num_classes)


def by_value(num_classes: int) -> nn.Module:
    """Which way it goes depends on the image: no graph says what it does."""

    class ByValue(nn.Sequential):
        def forward(self, image):
            return super().forward(image if image.mean() > 0 else -image)

    return ByValue(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def rounding(num_classes: int) -> nn.Module:
    """Few levels: a parametrized weight, and activations rounded by a hook, each image by its own range."""
    network = plain(num_classes)

    def enter(module, inputs):
        step = inputs[0].abs().amax(dim=(1, 2, 3), keepdim=True) / 7
        return ((inputs[0] / step.clamp(min=1e-6)).round() * step,)

    network[2].register_forward_pre_hook(enter)
    return network


class _Several(nn.Module):
    """Returns its features too; `form` says how."""

    def __init__(self, num_classes: int, form: str):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(8, num_classes)
        self.form = form

    def forward(self, image):
        features = self.features(image).flatten(1)
        logits = self.fc(features)
        forms = {
            "logits": logits,
            "tuple": (logits, features),
            "list": [logits, features],
            "dict": {"features": features, "logits": logits},
            "features first": (features, logits),
            "unnamed": {"features": features, "out": logits},
            "in training": (logits, features) if self.training else logits,
        }
        return forms[self.form]


def logits_alone(num_classes: int) -> nn.Module:
    return _Several(num_classes, "logits")


def in_a_tuple(num_classes: int) -> nn.Module:
    return _Several(num_classes, "tuple")


def in_a_list(num_classes: int) -> nn.Module:
    return _Several(num_classes, "list")


def in_a_dict(num_classes: int) -> nn.Module:
    return _Several(num_classes, "dict")


def in_training(num_classes: int) -> nn.Module:
    return _Several(num_classes, "in training")


def features_first(num_classes: int) -> nn.Module:
    return _Several(num_classes, "features first")


def unnamed(num_classes: int) -> nn.Module:
    return _Several(num_classes, "unnamed")


def without_classes() -> nn.Module:
    return plain(10)


def two_arguments(classes: int, width: int) -> nn.Module:
    return plain(classes)


def pair(num_classes: int) -> tuple:
    return plain(num_classes), 3


def timm_vit(num_classes: int) -> nn.Module:
    """A small transformer of timm in patches of 4 x 4, for images of 16 x 16."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(16, 4, embed_dim=16, depth=4, num_heads=2, num_classes=num_classes)


def dropped(num_classes: int, rate: float = 0.5, width: int = 8) -> nn.Module:
    """Dropout of a given rate: every step draws."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(rate),
        nn.Linear(4 * width, num_classes),
    )


def refuses_none(num_classes: int) -> nn.Module:
    """Has no form without classes, and says so."""
    if num_classes < 2:
        raise ValueError("two classes at least")
    return plain(num_classes)


def own_embedder(num_classes: int) -> nn.Module:
    """Its author's own form without classifier."""
    network = plain(num_classes or 2)
    if not num_classes:
        network[4] = nn.Linear(128, 6)
    return network


def pooled_product(num_classes: int) -> nn.Module:
    """Its classes come from a parameter, not from a layer."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            if not num_classes:
                raise ValueError("no classes")
            self.weight = nn.Parameter(torch.randn(3, num_classes))

        def forward(self, image):
            return image.mean(dim=(2, 3)) @ self.weight

    return Product()


class Inside(nn.Module):
    """All of it in a part that is called as DDP calls its own."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.module = normalised(num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.module(image)


def inside_module(num_classes: int) -> nn.Module:
    return Inside(num_classes)


def weight_normed(num_classes: int) -> nn.Module:
    """A convolution whose weight is computed from a length and a direction."""
    network = plain(num_classes)
    weight_norm(network[0])
    return network


class _Reshaping(nn.Module):
    """The classic network that flattens its maps by `flatten`."""

    def __init__(self, num_classes: int, flatten):
        super().__init__()
        self.conv, self.pool, self.flatten = nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(2), flatten
        self.linear = nn.Linear(32, num_classes)

    def forward(self, images):
        return self.linear(self.flatten(self.pool(self.conv(images))))


def viewing(num_classes: int) -> nn.Module:
    return _Reshaping(num_classes, lambda maps: maps.view(maps.size(0), -1))


def squeezing(num_classes: int) -> nn.Module:
    """Right for two images; for one it drops the batch too."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), _Squeeze(), nn.Linear(8, num_classes))


class _Squeeze(nn.Module):
    def forward(self, maps):
        return maps.squeeze()
