"""BatchNorm over all processes in place of a network's own, and what a network costs."""

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.data import load_data
from kd.errors import UserError
from kd.models import build_model
from kd.models.adapt import synchronise_batchnorm
from kd.models.cost import count_macs
from kd.models.features import Tap
from kd.training.setup import build_network, check_job


def settled(network: nn.Module, size: int = 32) -> nn.Module:
    """With running statistics that are not a fresh network's."""
    with torch.no_grad():
        network.train()(3 * torch.randn(8, 3, size, size) + 1)
    return network.eval()


@pytest.mark.parametrize(
    "name",
    [
        "resnet8",
        *(
            pytest.param(f"timm/{name}", marks=pytest.mark.timm)
            for name in ("efficientnet_b0", "mobilenetv3_small_050", "regnety_002", "resnet10t")
        ),
    ],
)
def test_a_synchronised_network_computes_the_same(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network, images = settled(build_model(name, 10, (32, 32))), torch.randn(4, 3, 32, 32)
    expected, names = network(images), list(network.state_dict())
    weights = list(network.parameters())
    synchronise_batchnorm(network)
    kinds = [type(module) for module in network.modules()]
    assert not any(kind is nn.BatchNorm2d for kind in kinds)
    assert any(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=0)
    assert list(network.state_dict()) == names
    assert all(one is other for one, other in zip(network.parameters(), weights, strict=True))


def test_a_synchronised_layer_is_still_read():
    """crd, at and the like may read a BatchNorm's output, or what enters it."""
    network, images = settled(build_model("resnet8", 10, (32, 32))), torch.randn(4, 3, 32, 32)
    tap = Tap(network, ("bn1", "layer2.0.bn1.input"))
    expected = tap(images).features
    synchronise_batchnorm(network)
    torch.testing.assert_close(tap(images).features, expected, rtol=0, atol=0)


class Doubled(nn.BatchNorm2d):
    def forward(self, image: Tensor) -> Tensor:
        return 2 * super().forward(image)


def test_a_batchnorm_that_computes_more_is_refused():
    with pytest.raises(UserError, match="--sync-batchnorm: 1 computes more than BatchNorm does"):
        synchronise_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4)))


def by_hand(tokens: int, width: int, hidden: int, layers: int, patch: int, classes: int) -> int:
    """Multiply-accumulates of a vision transformer with one more token than patches."""
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    stem = (tokens - 1) * 3 * patch**2 * width
    return stem + layers * (attention + 2 * tokens * width * hidden) + width * classes


def test_attention_is_counted_whichever_way_it_would_run():
    flags = {"patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    from torchvision.models.vision_transformer import VisionTransformer

    network = VisionTransformer(image_size=32, num_classes=10, **flags)
    assert count_macs(network, (32, 32)) == by_hand(17, 32, 64, 2, 8, 10)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.timm
def test_fused_attention_is_counted():
    pytest.importorskip("timm")
    arguments = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    network = build_model("timm/vit_tiny_patch16_224", 10, (32, 32), arguments=arguments)
    assert count_macs(network, (32, 32)) == by_hand(17, 32, 64, 2, 8, 10)


def test_it_is_refused_before_a_teacher_is_trained():
    flags = ["--data", "synthetic", "--sync-batchnorm", "--student", "tests.models.test_adapt:doubled"]
    config = parse(distill_defaults, "", flags)
    data, job = load_data(config.data), config.job()
    with pytest.raises(UserError, match="computes more than BatchNorm does"):
        check_job(job, build_network(job, data), data, Accelerator(cpu=True))


def doubled(num_classes: int) -> nn.Module:
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4), *pooled)
