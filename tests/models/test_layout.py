"""Stages of timm's networks, and the maps that a tap makes of their tokens."""

import pytest
import torch
from torch import nn

from kd.errors import UserError
from kd.models import build_model, probe, stages
from kd.models.features import Tap
from kd.models.layout import find_layouts, find_stages


class Patches(nn.Module):
    """Tokens as ViT has them: two of its own, then one for each 4 x 4 patch, row by row."""

    def __init__(self, image_size: tuple[int, int] = (8, 12), depth: int = 6, listed: object = None):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 5, 4, 4)
        self.patch_embed.grid_size = (image_size[0] // 4, image_size[1] // 4)
        self.blocks = nn.Sequential(*[nn.Identity() for _ in range(depth)])
        self.head = nn.Linear(5, 3)
        self.num_prefix_tokens = 2
        entries = [{"module": f"blocks.{i}", "reduction": 4, "num_chs": 5} for i in range(depth)]
        self.feature_info = entries if listed is None else listed

    def forward(self, image):
        self.map = self.patch_embed(image)
        patches = self.map.flatten(2).transpose(1, 2)
        tokens = self.blocks(torch.cat([patches.new_zeros(len(image), 2, 5), patches], dim=1))
        return self.head(tokens[:, 0])


def test_tokens_become_the_map_of_their_patches():
    network, image = Patches(), torch.randn(2, 3, 8, 12)
    found = find_stages(network)
    assert found == (("blocks.0", "blocks.2", "blocks.3", "blocks.5"), True)
    features = Tap(network, (*found.maps, "head.input"))(image).features
    assert features["blocks.3"].shape == (2, 5, 2, 3)
    assert torch.equal(features["blocks.3"], network.map)
    assert features["head.input"].shape == (2, 5)


def test_a_network_inside_another_and_several_are_known_by_their_whole_names():
    image = torch.randn(2, 3, 8, 12)
    wrapped = nn.Sequential(Patches(depth=3))
    assert stages("own", wrapped, 3).maps == ("0.blocks.0", "0.blocks.1", "0.blocks.2")
    assert Tap(wrapped, ("0.blocks.1",))(image).features["0.blocks.1"].shape == (2, 5, 2, 3)
    two = nn.ModuleDict({"one": Patches(), "other": Patches()})
    assert find_stages(two) == ((), False)
    assert {"one.blocks.5", "other.blocks.0"} <= find_layouts(two).keys()


def test_tokens_that_fill_no_grid_are_refused():
    network = Patches(depth=1)
    network.patch_embed.grid_size = (9, 9)
    with pytest.raises(UserError, match=r"layer 'blocks.0': its 8 tokens fill no grid; name another layer"):
        Tap(network, ("blocks.0",))(torch.randn(2, 3, 8, 12))


@pytest.mark.parametrize("listed", ["mine", [1, 2], [{"module": "nothing"}], {"blocks": 4}, []])
def test_a_list_of_another_kind_is_no_list_of_stages(listed):
    network = Patches(listed=listed)
    assert (find_stages(network), find_layouts(network)) == (((), False), {})


class Turned(nn.Module):
    def __init__(self, output_fmt: str | None, channels: int):
        super().__init__()
        self.body, self.output_fmt = nn.Conv2d(3, channels, 1), output_fmt
        self.feature_info = [{"module": "turn", "reduction": 1, "num_chs": channels}]
        self.turn = nn.Identity()

    def forward(self, image):
        self.map = self.body(image)
        return self.turn(self.map.permute(0, 2, 3, 1)).mean((1, 2))


@pytest.mark.parametrize(("output_fmt", "channels"), [("NHWC", 5), ("NHWC", 4), (None, 5)])
def test_channels_come_first_whether_the_network_says_that_they_are_last_or_their_number_does(output_fmt, channels):
    network = Turned(output_fmt, channels)
    features = Tap(network, ("turn",))(torch.randn(2, 3, 4, 4)).features
    assert torch.equal(features["turn"], network.map)


FAMILIES = {
    "vit_tiny_patch16_224": ("blocks.2", "blocks.5", "blocks.8", "blocks.11"),
    "deit_tiny_distilled_patch16_224": ("blocks.2", "blocks.5", "blocks.8", "blocks.11"),
    "vit_small_patch16_dinov3": ("blocks.2", "blocks.5", "blocks.8", "blocks.11"),  # with registers
    "cait_xxs24_224": ("blocks.5", "blocks.11", "blocks.17", "blocks.23"),  # whose class token comes later
    "mixer_s32_224": ("blocks.1", "blocks.3", "blocks.5", "blocks.7"),
    "levit_128s": ("stages.0", "stages.1", "stages.2"),
    "swin_tiny_patch4_window7_224": ("layers.0", "layers.1", "layers.2", "layers.3"),
    "volo_d1_224": ("network.0", "network.4"),
    "convnext_atto": ("stages.0", "stages.1", "stages.2", "stages.3"),
    "efficientnet_b0": ("blocks.1", "blocks.2", "blocks.4", "blocks.6"),
    "mobilenetv4_conv_small": ("blocks.0", "blocks.1", "blocks.2", "blocks.4"),
    "mobilenetv3_small_050": ("blocks.0", "blocks.1", "blocks.3", "blocks.5"),
    "regnetx_002": ("s1", "s2", "s3", "s4"),
    "resnet10t": ("layer1", "layer2", "layer3", "layer4"),
}


@pytest.mark.timm
@pytest.mark.parametrize("name", FAMILIES)
def test_the_maps_of_timms_networks_are_those_that_timm_itself_returns(name):
    pytest.importorskip("timm")
    size = (64, 32) if name.startswith(("vit_tiny", "conv", "swin")) else (64, 64)
    network = build_model(f"timm/{name}", 5, size).eval()
    found = stages(f"timm/{name}", network, 5)
    assert found.maps == FAMILIES[name]
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = Tap(network, (*found.maps, *found.embedding))(image).features
        *maps, embedding = features.values()
        listed = [stage["module"] for stage in getattr(network.feature_info, "info", network.feature_info)]
        indices = [listed.index(layer) for layer in found.maps]
        expected = network.forward_intermediates(image, indices=indices, intermediates_only=True, output_fmt="NCHW")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=True))
    assert embedding.ndim == 2


@pytest.mark.timm
def test_layers_of_hiera_have_no_order_and_must_be_named():
    pytest.importorskip("timm")
    network = build_model("timm/hiera_tiny_224", 5, (64, 64))
    assert stages("timm/hiera_tiny_224", network, 5).maps == ()


@pytest.mark.timm
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("levit_128s", ("head.linear", "head_dist.linear")),
        ("repvit_m1", ("head.head.l", "head.head_dist.l")),
        ("vit_tiny_patch16_224", ()),
    ],
)
def test_both_heads_of_distilled_networks_are_found_and_averaged(name, heads):
    pytest.importorskip("timm")
    network = build_model(f"timm/{name}", 5, (64, 64))
    found = stages(f"timm/{name}", network, 5)
    assert found.heads == heads
    assert found.classifier == (heads or ("head",))[0]
    if heads:
        logits, answers, _ = probe(network, (64, 64), name, heads)
        torch.testing.assert_close(sum(answers.values()) / 2, logits)
