"""Pruning: removes the right channels and weights, the rest computes the same, and is rebuilt without torch-pruning."""

import copy
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import kd
from kd.compress.prune import prune_channels, resize, sizes
from kd.compress.sparsity import masks
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.errors import UserError
from kd.models import build_model
from kd.models.cost import count_macs
from kd.utils.files import write_json
from tests import networks
from tests.compress.test_quantize import DEEP
from tests.losses.test_methods import FEW, quick  # noqa: F401  the fixture: no curves, no waiting for the disk
from tests.run_scripts import distil
from tests.training.test_resume import differs_when_killed

SIZE = (16, 16)
FAMILIES = ("resnet8", "wrn-16-1", "tests.networks:deep")
LARGE = (
    "resnet8x4",
    "vgg8",
    "torchvision/resnet18",
    "resnet18",
    "resnet20",
    "resnet50",
    "mobilenetv2",
    "wrn-40-2",
    "vgg13",
)


def student(trained: str, *args: str) -> None:
    distil(*DEEP, *FEW, "--init", trained, "--trust-code", *args)


class Scale(nn.Module):
    """A layer whose parameter pruning shortens, but which a recipe of sizes does not cover."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return x * self.scale


def with_noise(name: str) -> nn.Module:
    """A network with random BatchNorm values, so that each channel can be recognised."""
    torch.manual_seed(0)
    network = build_model(name, 5, SIZE).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.5)
    return network


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_a_pruned_network_computes_the_same_as_the_whole_with_its_removed_channels_zeroed(name, monkeypatch):
    network = with_noise(name)
    pruned = copy.deepcopy(network)
    prune_channels(pruned, 0.5, SIZE, name, 5)
    assert 0.35 < count_macs(pruned, SIZE) / count_macs(network, SIZE) <= 0.5
    removed = 0
    for key, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            stays = torch.isin(module.bias, pruned.get_submodule(key).bias)
            assert stays.sum() == pruned.get_submodule(key).num_features
            removed += int((~stays).sum())
            module.weight.data[~stays] = 0
            module.bias.data[~stays] = 0
    assert removed > 0
    image = torch.randn(3, 3, *SIZE)
    torch.testing.assert_close(pruned(image), network(image), rtol=1e-3, atol=1e-4)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    again = build_model(name, 5, SIZE).eval()
    resize(again, {key: values for key, values in sizes(pruned).items() if values != sizes(again)[key]})
    again.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(again(image), pruned(image), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_the_filters_with_the_smallest_sums_are_removed():
    network = networks.deep(4)
    for index in (0, 3, 6):
        network[index].weight.data[[1, 4, 6]] *= 1e-3
        network[index + 1].bias.data = torch.arange(8.0)  # identifies the filters
    prune_channels(network, 0.5, SIZE, "deep", 4)
    left = [network[index].bias.tolist() for index in (1, 4, 7)]
    assert all(len(names) <= 6 and {0, 2, 3, 5, 7} <= set(names) for names in left)


@pytest.mark.parametrize("name", ["shufflenetv1", "shufflenetv2"])
def test_networks_that_shuffle_their_channels_are_refused(name):
    with pytest.raises(UserError, match=f"--prune: cannot remove channels of {name}: it shuffles"):
        prune_channels(build_model(name, 5, SIZE), 0.5, SIZE, name, 5)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # the library's warning, beside our message
def test_other_networks_that_cannot_be_pruned_are_refused_in_one_line():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match="does not end in a linear layer over the classes; use --sparsity"):
        prune_channels(network, 0.5, SIZE, "mine", 5)
    with pytest.raises(UserError, match=r"--prune: cannot remove channels of vit"):
        prune_channels(networks.vit(4), 0.5, (8, 8), "vit", 4)
    scaled = networks.deep(4)
    scaled[2] = Scale()
    with pytest.raises(
        UserError, match="has layers other than convolutions, BatchNorm and linear ones; use --sparsity"
    ):
        prune_channels(scaled, 0.5, SIZE, "scaled", 4)
    with pytest.raises(UserError, match=r"--prune 0.999: at most 0.9\d of deep can be removed; give less"):
        prune_channels(networks.deep(4), 0.999, SIZE, "deep", 4)


def test_missing_torch_pruning_is_refused_with_the_extra_to_install(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UserError, match=r"--prune needs torch-pruning: pip install -e '\.\[compress\]'"):
        student(trained, "--prune", "0.5", "--out", "run")
    assert not list(Path("run").glob("*"))


def test_the_smallest_weights_over_all_layers_are_masked():
    weights = {"a": torch.randn(4, 3, 3, 3), "b": 3 * torch.randn(5, 20)}
    kept = masks(weights, 0.7)
    ranked = sorted(w.abs().item() for weight in weights.values() for w in weight.flatten())
    threshold = ranked[round(0.7 * len(ranked))]
    for name, weight in weights.items():
        assert torch.equal(kept[name], weight.abs() >= threshold)
    assert kept["a"].double().mean() < kept["b"].double().mean()
    assert [int((~mask).sum()) for mask in masks({"a": torch.zeros(1, 7)}, 3 / 7).values()] == [3]
    with pytest.raises(UserError, match=r"--sparsity 0.9: would set every weight of a to zero; give less"):
        masks({"a": torch.ones(2, 2), "b": 2 + torch.rand(50, 2)}, 0.9)


def test_a_pruned_sparse_rounded_student_resumes_to_the_same_bytes_and_loads_anywhere(trained, monkeypatch):
    flags = ["--prune", "0.4", "--sparsity", "0.75", "--weight-bits", "8", "--lr", "0.05"]
    assert differs_when_killed(monkeypatch, partial(student, trained, *flags), 3) == []
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    network, summary = kd.load("run", trust_code=True), json.loads(Path("run/summary.json").read_text())
    inner = [network[3].weight, network[6].weight]
    count = sum(weight.numel() for weight in inner)
    assert summary["teacher"] == trained  # the uncompressed network
    assert summary["params"] == sum(parameter.numel() for parameter in network.parameters())
    assert summary["macs"] == count_macs(network, SIZE) <= 0.6 * summary["macs_before"]
    zeros = sum(int((weight == 0).sum()) for weight in inner)
    assert summary["sparsity"] == zeros / count >= round(0.75 * count) / count
    learnt = kd.load(trained, trust_code=True)[3].weight
    assert not torch.isin(inner[0][inner[0] != 0], learnt).any(), "the remaining weights are trained on"
    # A compressed run can be an --init too, and needs --sparsity again.
    again = [*DEEP, *FEW, "--init", "run", "none", "--out", "again"]
    with pytest.raises(UserError, match=r"has a sparsity of 0.75, which training would fill again; add --sparsity"):
        distil(*again)
    distil(*again, "--sparsity", "0.75")
    network = kd.load("again", trust_code=True)
    assert network[3].weight.shape == inner[0].shape
    assert all((network[index].weight[weight == 0] == 0).float().mean() > 0.9 for index, weight in zip((3, 6), inner))


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": {"0": [3, 8]}},
        {"shapes": {"0": [3, -8, 1]}},
        {"shapes": {"nothing": [1]}},
        {"shapes": {"2": []}},
        {"shapes": 3},
    ],
)
def test_a_recipe_that_cannot_be_rebuilt_is_named(trained, change):
    Path("run").mkdir()
    for path in Path(trained).iterdir():
        if path.suffix in (".json", ".safetensors"):
            Path("run", path.name).write_bytes(path.read_bytes())
    info = json.loads(Path("run/model.json").read_text())
    recipe = {"shapes": {}, "activation_bits": 32, "layers": []}
    write_json(Path("run/model.json"), info | {"compression": recipe | change})
    with pytest.raises(UserError, match=r"model.json: compression .* cannot be rebuilt"):
        kd.load("run", trust_code=True)
    write_json(Path("run/model.json"), info | {"compression": recipe})
    assert kd.load("run", trust_code=True)[0].weight.shape == (8, 3, 3, 3)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prune", "0.5"], "--prune: needs --init RUN"),
        (["--sparsity", "0.5"], "--sparsity: needs --init RUN"),
        (["--init", "run", "--prune", "1"], "--prune 1.0: give a share"),
        (["--init", "run", "--sparsity", "-0.1"], "--sparsity -0.1: give a share"),
    ],
)
def test_flags_that_mean_nothing_are_refused(args, words):
    with pytest.raises(UserError, match=words):
        parse(distill_defaults, "", args)


def test_a_pruned_network_follows_itself_unless_a_teacher_is_named():
    parsed = lambda *args: parse(distill_defaults, "", ["--init", "run", *args])  # noqa: E731
    assert parsed("--prune", "0.5").teachers == ("run",)
    assert parsed("--sparsity", "0.5").teachers == ("run",)
    assert parsed("--prune", "0.5", "--teacher", "big").teachers == ("big",)
    assert parsed("--weight-bits", "2").teachers == ()
