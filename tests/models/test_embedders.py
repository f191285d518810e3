"""Networks without a classifier: the same layers, and what they return is what the classifier would have been given."""

import pytest
import torch
from torch import nn

from kd.errors import UserError
from kd.models import FAMILIES, MODELS, build_model, classifier_layers, stages, without_classifier

TIMM = [
    ("timm/resnet18", (32, 32), 512),
    ("timm/vit_tiny_patch16_224", (32, 32), 192),
    ("timm/levit_128s", (64, 64), 384),
    ("timm/deit_tiny_distilled_patch16_224", (32, 32), 192),
    ("timm/swin_tiny_patch4_window7_224", (224, 224), 768),
    ("timm/convnext_atto", (32, 32), 320),
]


def width(name: str, size: tuple[int, int]) -> int:
    return build_model(name, 0, size).eval()(torch.zeros(1, 3, *size)).shape[1]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet50", "resnet101", "resnet152")])
def test_every_network_of_the_zoo_returns_what_its_classifier_is_given(name):
    network, given = build_model(name, 5, (8, 8)).eval(), []
    (classifier,) = classifier_layers(name, (8, 8))
    network.get_submodule(classifier).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    embedder, images = build_model(name, 0, (8, 8)).eval(), torch.randn(3, 3, 8, 8)
    missing = embedder.load_state_dict(network.state_dict(), strict=False)
    network(images)
    assert torch.equal(embedder(images), given[0])
    assert missing.missing_keys == []
    assert {key.rpartition(".")[0] for key in missing.unexpected_keys} == {classifier}
    assert stages(name, embedder, 0) == stages(name, network, 5)._replace(classifier=None)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_the_maps_of_an_embedder_are_the_networks(family):
    name = next(iter(family.MODELS))
    found = stages(name, build_model(name, 0, (16, 16)), 0)
    assert found.maps == family.STAGES
    assert found.embedding == (), "its output is the embedding"


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("torchvision/resnet18", (32, 32), 512),
        ("torchvision/squeezenet1_1", (32, 32), 512),
        ("torchvision/mobilenet_v3_small", (32, 32), 1024),
        *TIMM,
    ],
)
def test_networks_of_the_libraries_return_their_pooled_features(name, size, expected):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    assert width(name, size) == expected
    classifiers = classifier_layers(name, size)
    with torch.random.fork_rng(devices=[]):
        network = build_model(name, 5, size)
    ours, theirs = set(build_model(name, 0, size).state_dict()), set(network.state_dict())
    assert ours == {key for key in theirs if not any(key.startswith(f"{layer}.") for layer in classifiers)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "expected"), [("plain", 128), ("in_a_tuple", 8), ("refuses_none", 128), ("own_embedder", 6)]
)
def test_a_function_of_the_users_own_may_know_or_refuse_no_classes(name, expected, capsys):
    assert width(f"tests.networks:{name}", (8, 8)) == expected


def test_a_network_without_a_layer_over_the_classes_has_no_embedding():
    with pytest.raises(
        UserError, match=r"^model tests.networks:pooled_product: ends in no linear layer over 7 classes"
    ):
        build_model("tests.networks:pooled_product", 0, (8, 8))


def test_a_trained_network_loses_both_of_its_heads():
    pytest.importorskip("timm")
    network = build_model("timm/deit_tiny_distilled_patch16_224", 5, (32, 32))
    without_classifier(network, "timm/deit_tiny_distilled_patch16_224", 5)
    assert isinstance(network.head, nn.Identity)
    assert isinstance(network.head_dist, nn.Identity)
