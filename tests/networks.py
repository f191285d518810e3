"""Small networks for the tests, named as `module:function` on the command line."""

from torch import nn


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


def vit(num_classes: int) -> nn.Module:
    """A transformer for images of 8 x 8, as the answer to a patch that is too large advises."""
    from torchvision.models import VisionTransformer  # kd.models has made it importable by now

    return VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=num_classes)


def wrong_width(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes + 1))


def no_module(num_classes: int) -> str:
    return "not a network"
