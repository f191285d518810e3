"""Networks by name: published parameter counts, stages, and messages for names that do not exist."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd.errors import UserError
from kd.models import (
    FAMILIES,
    MODELS,
    STAGES,
    build_model,
    check_one_image,
    mobilenetv2,
    shufflenetv1,
    shufflenetv2,
    wrn,
)


def on_paper(name: str, num_classes: int, size: tuple[int, int]) -> nn.Module:
    """The network on the meta device: shapes without numbers, at no cost."""
    with torch.device("meta"):
        return build_model(name, num_classes, size)


def stage_maps(name: str, size: tuple[int, int]) -> list[torch.Size]:
    """Shapes of the stages' outputs for one image, without the batch dimension."""
    network, shapes = on_paper(name, 7, size).eval(), {}
    names = {network.get_submodule(stage): stage for stage in STAGES[name]}

    def remember(module, given, output):
        shapes[names[module]] = output.shape[1:]

    for module in names:
        module.register_forward_hook(remember)
    network(torch.zeros(1, 3, *size, device="meta"))
    assert tuple(shapes) == STAGES[name], "stages run in the order of their list"
    return list(shapes.values())


@pytest.mark.parametrize(
    ("name", "params", "published"),
    [
        ("resnet18", 11_220_132, "11.22M"),
        ("resnet34", 21_328_292, "21.33M"),
        # arXiv:1910.10699's networks at 100 classes, rounded as the literature quotes them
        ("resnet20", 278_324, "0.28M"),
        ("resnet32", 472_756, "0.47M"),
        ("resnet56", 861_620, "0.86M"),
        ("resnet110", 1_736_564, "1.74M"),
        ("resnet8x4", 1_233_540, "1.23M"),
        ("resnet32x4", 7_433_860, "7.43M"),
        ("wrn-16-2", 703_284, "0.70M"),
        ("wrn-40-1", 569_780, "0.57M"),
        ("wrn-40-2", 2_255_156, "2.26M"),
        ("vgg8", 3_965_028, "3.97M"),
        ("vgg13", 9_462_180, "9.46M"),
        ("mobilenetv2", 812_836, "0.81M"),
        ("shufflenetv1", 949_258, "0.95M"),
        ("shufflenetv2", 1_355_528, "1.36M"),
    ],
)
def test_parameter_counts_are_the_published_ones(name, params, published):
    network = on_paper(name, 100, (32, 32))
    assert sum(parameter.numel() for parameter in network.parameters()) == params
    assert f"{params / 1e6:.2f}M" == published


# These two are in no table of that literature; the counts are sums over the layers, by hand.
@pytest.mark.parametrize(("name", "params"), [("wrn-16-1", 180_916), ("vgg11", 9_277_284)])
def test_parameter_counts_are_the_sums_of_the_layers(name, params):
    assert sum(parameter.numel() for parameter in on_paper(name, 100, (32, 32)).parameters()) == params


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet101", "resnet152")])
def test_every_network_takes_small_images_and_trains(name):
    network = build_model(name, 7, (8, 8))
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (32, 32), (64, 64), (48, 32)])
@pytest.mark.parametrize("name", [next(iter(family.MODELS)) for family in FAMILIES])
def test_stages_go_from_early_to_late(name, size):
    maps = stage_maps(name, size)
    assert len(maps) in (3, 4)
    for (channels, height, width), (later_channels, later_height, later_width) in pairwise(maps):
        assert later_channels >= channels
        assert 1 <= later_height <= height
        assert 1 <= later_width <= width


@pytest.mark.parametrize(
    ("name", "channels", "sides"),
    [
        ("resnet18", (64, 128, 256, 512), (32, 16, 8, 4)),
        ("resnet20", (16, 32, 64), (32, 16, 8)),
        ("wrn-40-2", (32, 64, 128), (32, 16, 8)),
        ("vgg8", (128, 256, 512, 512), (16, 8, 4, 4)),
        ("mobilenetv2", (12, 16, 48, 160), (16, 8, 4, 2)),
        ("shufflenetv1", (240, 480, 960), (16, 8, 4)),
        ("shufflenetv2", (116, 232, 464), (16, 8, 4)),
    ],
)
def test_stages_of_cifar_images_have_the_shapes_of_the_literature(name, channels, sides):
    assert stage_maps(name, (32, 32)) == [(c, side, side) for c, side in zip(channels, sides)]


def test_a_wide_block_adds_to_its_input_unchanged():
    block = wrn.Block(4, 4, stride=1)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_an_inverted_residual_ends_without_an_activation():
    block = mobilenetv2.InvertedResidual(4, 4, stride=1, expansion=6)
    x = torch.zeros(2, 4, 5, 5)
    nn.init.constant_(block.project[1].bias, -1.0)
    nn.init.zeros_(block.project[1].weight)
    assert torch.equal(block(x), x - 1)


def test_shufflenetv1_concatenates_its_new_channels_and_the_averaged_input():
    unit = shufflenetv1.Unit(24, 240, stride=2)
    x = torch.rand(2, 24, 6, 6)
    assert unit(x).shape == (2, 240, 3, 3)
    assert torch.equal(unit(x)[:, 216:], F.avg_pool2d(x, 3, stride=2, padding=1))


def test_shufflenetv2_passes_half_of_the_channels_on_unchanged():
    unit = shufflenetv2.Unit(8)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(unit(x)[:, ::2], x[:, :4])
    assert (unit(x)[:, 1::2] >= 0).all()


def test_large_images_get_the_imagenet_stem():
    assert build_model("resnet18", 10, (32, 32)).conv1.kernel_size == (3, 3)
    assert build_model("resnet18", 10, (128, 128)).conv1.kernel_size == (7, 7)


def test_names_of_libraries_and_of_users_functions():
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
        ("tests.networks:wrong_width", r"outputs \(2, 6\) .*logits of shape \(2, 5\)"),
        ("tests.networks:without_classes", r"is called as without_classes\(num_classes=5\), and is defined as .*\(\)"),
        ("tests.networks:two_arguments", r"two_arguments\(classes: int, width: int\) .*; give it the parameter num_cl"),
        ("tests.networks:pair", r"pair\(num_classes=5\) returned a tuple of 2 \(a Sequential, a int\), not a torch"),
        (
            "tests.networks:features_first",
            r"returns a tuple of 2 \(\(2, 8\), \(2, 5\)\) for 2 images; its forward must",
        ),
        (
            "tests.networks:unnamed",
            r"outputs a dict of 2 \('features': \(2, 8\), 'out': \(2, 5\)\) for 2 images; it must",
        ),
        ("torchvision/vit_b_32", "cannot take images of 16 x 16 pixels .*patches of 32 x 32 do not divide them"),
        ("torchvision/vit_b_32", r"module:function .*VisionTransformer\(image_size=16, patch_size=4"),
        ("torchvision/maxvit_t", "cannot take images of 16 x 16 pixels"),
        ("torchvision/inception_v3", "cannot take images of 16 x 16 pixels"),
    ],
)
def test_wrong_names_and_networks_are_refused_with_the_remedy(name, words):
    with pytest.raises(UserError, match=words):
        build_model(name, 5, (16, 16))


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("in_a_tuple", "returns a tuple of 2 ((2, 5), (2, 8)); the first is taken for the logits"),
        ("in_a_list", "returns a list of 2 ((2, 5), (2, 8)); the first is taken for the logits"),
        (
            "in_a_dict",
            "returns a dict of 2 ('features': (2, 8), 'logits': (2, 5)); its 'logits' are taken for the logits",
        ),
        ("in_training", "returns in training a tuple of 2 ((2, 5), (2, 8)); the first is taken for the logits"),
    ],
)
def test_the_logits_of_a_users_own_network_that_returns_more(function, line, capsys, monkeypatch):
    monkeypatch.setattr("kd.models._said", set())
    torch.manual_seed(0)
    network = build_model(f"tests.networks:{function}", 5, (16, 16))
    torch.manual_seed(0)
    alone = build_model("tests.networks:logits_alone", 5, (16, 16))
    assert capsys.readouterr().out == f"model tests.networks:{function}: {line}\n"
    assert network.state_dict().keys() == alone.state_dict().keys()
    image = torch.randn(4, 3, 16, 16)
    for training in (True, False):
        assert torch.equal(network.train(training)(image), alone.train(training)(image))
    build_model(f"tests.networks:{function}", 5, (16, 16))
    assert capsys.readouterr().out == "", "said once"


def test_torchvision_transformers_get_the_image_size():
    network = on_paper("torchvision/vit_b_16", 5, (32, 32))
    assert network.encoder.pos_embedding.shape[1] == 1 + 4
    with pytest.raises(UserError, match=r"48 x 32 pixels \(it takes square images only"):
        on_paper("torchvision/vit_b_16", 5, (32, 48))


def test_a_users_own_transformer_takes_digits():
    assert build_model("tests.networks:vit", 10, (8, 8)) is not None


@pytest.mark.timm
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet10t"])
def test_timm_networks_get_the_image_size_if_they_need_it(name):
    pytest.importorskip("timm")
    assert build_model(f"timm/{name}", 5, (32, 64)) is not None


@pytest.mark.timm
@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("vit_tiny_patch16_224", (8, 8), "16 x 16 do not divide them"),
        ("eva02_tiny_patch14_224", (32, 32), "14 x 14 do not divide them"),  # timm alone drops the last 4 pixels
        ("vit_tiny_patch16_224", (24, 32), r"timm.create_model.*img_size=\(24, 32\), patch_size=4"),
    ],
)
def test_timm_patches_that_do_not_divide_the_image_are_refused(name, size, words):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=words):
        build_model(f"timm/{name}", 5, size)


def test_missing_timm_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_model("timm/resnet10t", 5, (32, 32))


@pytest.mark.parametrize(
    "code", ["import kd.models, torchvision", "from kd.utils.operators import define_operators as f; f()"]
)
def test_torchvision_is_importable_after_kd_models(code):
    """In a fresh process, because declaring operators twice aborts it."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("resnet8", {"depth": 20}, "--model-args depth: resnet8 takes no such argument"),
        ("resnet18", {"dropout": 0.1}, "--model-args dropout: resnet18 takes no such argument"),
        ("torchvision/resnet18", {"dropout": 0.1}, "--model-args dropout: torchvision/resnet18 takes no such argument"),
        ("torchvision/resnet18", {"weights": "DEFAULT"}, "--model-args weights: is not for you to give"),
        ("tests.networks:dropped", {"depth": 2}, "--model-args depth: tests.networks:dropped takes no such argument"),
    ],
)
def test_arguments_that_a_network_does_not_take_are_named(name, arguments, words):
    with pytest.raises(UserError, match=words):
        build_model(name, 5, (32, 32), arguments=arguments)


def test_arguments_reach_the_constructor():
    network = build_model("torchvision/mobilenet_v3_small", 5, (32, 32), arguments={"dropout": 0.7})
    assert 0.7 in {module.p for module in network.modules() if isinstance(module, nn.Dropout)}
    assert build_model("tests.networks:dropped", 5, (32, 32), arguments={"width": 3})[0].out_channels == 3


def test_a_network_that_squeezes_the_batch_away_is_refused():
    """The last batch may have one image, and kd.predict always has."""
    words = r"tests.networks:squeezing: the network returns \(7,\) for 1 image; .* write .flatten\(1\)"
    with pytest.raises(UserError, match=words):
        check_one_image(build_model("tests.networks:squeezing", 7, (8, 8)), "tests.networks:squeezing", (8, 8))
