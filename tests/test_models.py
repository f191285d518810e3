"""Networks by name: the published sizes, and clear answers to names that do not exist."""

import pytest
import torch

from kd.errors import UserError
from kd.models import MODELS, build_model


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("resnet18", 11_220_132),
        ("resnet34", 21_328_292),
        # arXiv:1910.10699 and its code's tables, at 100 classes
        ("resnet20", 278_324),
        ("resnet32", 472_756),
        ("resnet56", 861_620),
        ("resnet110", 1_736_564),
        ("resnet8x4", 1_233_540),
        ("resnet32x4", 7_433_860),
    ],
)
def test_parameter_counts_are_the_published_ones(name, params):
    network = build_model(name, 100, (32, 32))
    assert sum(parameter.numel() for parameter in network.parameters()) == params


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet101", "resnet152")])
def test_every_network_takes_small_images_and_trains(name):
    network = build_model(name, 7, (8, 8))
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_large_images_get_the_imagenet_stem():
    assert build_model("resnet18", 10, (32, 32)).conv1.kernel_size == (3, 3)
    assert build_model("resnet18", 10, (128, 128)).conv1.kernel_size == (7, 7)


def test_names_from_elsewhere():
    assert build_model("torchvision/mobilenet_v3_small", 5, (32, 32)) is not None
    assert build_model("tests.networks:plain", 5, (16, 16)) is not None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet19", "did you mean resnet1"),
        ("torchvision/resnet19", "did you mean resnet1"),
        ("nowhere:net", "cannot import nowhere"),
        ("tests.networks:absent", "has no function absent"),
        ("tests.networks:no_module", "not a torch module"),
        ("tests.networks:wrong_width", r"gives \(2, 6\) .* \(2, 5\) wanted"),
        ("torchvision/vit_b_16", "cannot take images of 16 x 16 pixels"),
    ],
)
def test_wrong_names_and_networks_are_answered(name, words):
    with pytest.raises(UserError, match=words):
        build_model(name, 5, (16, 16))
