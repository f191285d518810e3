"""The live teacher in half precision: its weights are cast once, and its logits stay those of autocast."""

import copy
import inspect

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kd.config import DataConfig
from kd.data import load_data
from kd.models import adapt, build_model
from kd.teachers import live
from kd.teachers.live import HalfWeights, fold_batchnorm, live_logits
from kd.teachers.load import adapt_input
from kd.types import Batch, Outputs
from tests import networks
from tests.fake_cuda import DEVICE, MODE, accelerator_on_gpu, counting, fake_cuda

ZERO = torch.tensor(0)


def batch_of(images: Tensor, strong: Tensor | None = None) -> Batch:
    rows = torch.zeros(len(images), dtype=torch.long, device=images.device)
    return Batch(images, rows, rows, ZERO, ZERO, ZERO, strong=strong)


def settled(name: str, size: int = 32) -> nn.Module:
    """A frozen network with running statistics that are not a fresh one's."""
    torch.manual_seed(0)
    network = build_model(name, 10, (size, size)).train()
    with torch.no_grad():
        network(3 * torch.randn(64, 3, size, size) + 1)
    return network.eval().requires_grad_(False)


class Island(nn.Module):
    """Leaves autocast for its classifier, as some authors do."""

    def __init__(self):
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.conv(image).mean((2, 3))
        if pooled.ndim != 2:  # nothing that could be traced
            raise ValueError
        with torch.autocast("cpu", enabled=False):
            return self.classifier(pooled.float())


class Standardised(nn.Conv2d):
    """Computes with its weights before it convolves: in half precision it would lose digits."""

    def forward(self, image: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(image, weight)


def answers(monkeypatch, network: nn.Module, layers: tuple[str, ...] = ()) -> tuple[Outputs, Outputs]:
    """What a live teacher in bf16 says with weights that are cast once, and with those that autocast casts."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    batch = batch_of(torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32))
    query = live_logits(network, accelerator, layers)
    once = query(batch), query(batch)
    torch.testing.assert_close(*once, rtol=0, atol=0)
    with monkeypatch.context() as patch:
        patch.setattr(live, "HALF", {})
        each_time = live_logits(network, accelerator, layers)(batch)
    return once[0], each_time


@pytest.mark.parametrize("layers", [(), ("layer1", "layer3")])
@pytest.mark.parametrize("name", ["resnet8", "torchvision/mobilenet_v2", "tests.networks:normalised"])
def test_weights_cast_once_give_the_bits_of_autocast(monkeypatch, name, layers):
    layers = layers if name == "resnet8" else ()
    once, each_time = answers(monkeypatch, settled(name), layers)
    torch.testing.assert_close(once, each_time, rtol=0, atol=0)
    assert once.logits.dtype == once.strong.dtype == torch.float32


def test_a_transformers_weights_too(monkeypatch):
    network = networks.vit(10).eval().requires_grad_(False)
    nn.init.normal_(network.heads[0].weight)  # is zero at first
    network.register_forward_pre_hook(lambda _, images: images[0][:, :, :8, :8])
    once, each_time = answers(monkeypatch, network)
    assert once.logits.abs().max() > 0.1
    torch.testing.assert_close(once, each_time, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [(), ("layer3",)])
def test_the_network_itself_keeps_its_weights(layers):
    network = settled("resnet8")
    before, parameters = copy.deepcopy(network.state_dict()), dict(network.named_parameters())
    query = live_logits(network, Accelerator(cpu=True, mixed_precision="bf16"), layers)
    query(batch_of(torch.randn(12, 3, 32, 32)))
    assert {name: id(parameter) for name, parameter in network.named_parameters()} == {
        name: id(parameter) for name, parameter in parameters.items()
    }
    torch.testing.assert_close(dict(network.state_dict()), dict(before), rtol=0, atol=0)


def test_a_network_that_leaves_autocast_inside_is_run_with_its_own_weights(monkeypatch):
    torch.manual_seed(0)
    network = Island().eval().requires_grad_(False)
    assert fold_batchnorm(network) is network
    once, each_time = answers(monkeypatch, network)
    torch.testing.assert_close(once, each_time, rtol=0, atol=0)


def test_another_error_is_raised_as_it_is():
    network = settled("resnet8")
    network.fc.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("the network's own")))
    with pytest.raises(RuntimeError, match="the network's own"):
        live_logits(network, Accelerator(cpu=True, mixed_precision="bf16"))(batch_of(torch.randn(12, 3, 32, 32)))


def test_layers_that_compute_with_their_weights_keep_them():
    network = nn.Sequential(
        Standardised(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(2)
    )
    network(torch.randn(2, 3, 8, 8))
    HalfWeights(network.eval(), torch.bfloat16).put()
    half = [name for name, parameter in network.named_parameters() if parameter.dtype == torch.bfloat16]
    assert half == ["1.weight", "1.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "torchvision/mobilenet_v2"])
def test_logits_in_bf16_are_within_a_few_units_of_float32s(name):
    """docs/performance.md has this bound; BatchNorm is folded in float32, before the weights are rounded."""
    network, images = settled(name), torch.randn(64, 3, 32, 32)
    exact = network(images)
    half = live_logits(network, Accelerator(cpu=True, mixed_precision="bf16"))(batch_of(images)).logits
    gap = (half - exact).abs().max() / exact.abs().max()
    assert 2**-14 < gap < 2**-5
    assert (half.argmax(1) == exact.argmax(1)).float().mean() > 0.9


# Folded ResNet34 on fake CUDA; float32 takes 87.
@pytest.mark.parametrize(
    ("precision", "layers", "most"), [("bf16", (), 90), ("bf16", ("layer2",), 126), (None, (), 87)]
)
def test_a_live_resnet34_casts_its_images_and_logits_alone(precision, layers, most):
    network = build_model("resnet34", 100, (32, 32)).eval().requires_grad_(False)
    network = network if layers else fold_batchnorm(network)
    with accelerator_on_gpu(precision) as accelerator, fake_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "fold_batchnorm", nn.Sequential)  # another module than the network, as a folded copy is
        query = live_logits(network.to(DEVICE), accelerator, layers)
        batch = batch_of(MODE.from_tensor(torch.zeros(64, 3, 32, 32)).to(DEVICE))
        with counting() as launches:
            query(batch)
    assert launches["convolution"] == 36
    assert sum(launches.values()) <= most
    assert launches["_to_copy"] <= (2 if precision else 0) + len(layers)


def test_in_full_precision_nothing_is_cast(monkeypatch):
    monkeypatch.setattr(live, "HalfWeights", None)
    network, batch = settled("resnet8"), batch_of(torch.randn(12, 3, 32, 32))
    torch.testing.assert_close(live_logits(network, Accelerator(cpu=True))(batch).logits, network(batch.image))


def test_a_batchnorm_that_keeps_no_statistics_is_not_folded():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten()).eval()
    folded, images = live.fold_batchnorm(network), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-5)
    assert [type(module) for module in folded.modules()].count(nn.BatchNorm2d) == 1


def test_a_teacher_of_another_normalisation_and_size_is_folded_too(monkeypatch):
    """Its hooks must be traced with it."""
    for layer in (adapt.Renormalize, adapt.Resize):  # the tests' shape checks refuse what traces
        monkeypatch.setattr(layer, "forward", inspect.unwrap(layer.forward))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.5, 2)
    data = load_data(DataConfig("synthetic"))
    adapt_input(network, {"mean": [0.5] * 3, "std": [0.2] * 3, "image_size": [24, 24]}, data, torch.device("cpu"))
    folded, images = fold_batchnorm(network), torch.randn(5, 3, *data.size)
    assert folded is not network
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-5)
