"""Networks of timm that start from weights: whole, with new last layers, at other image sizes; drop-path by the step.

The weights are random, and written by the tests: nothing is fetched.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import kd
from kd.config import DataConfig, Job
from kd.config.cli import parse
from kd.config.defaults import train_defaults
from kd.data import load_data
from kd.errors import UserError
from kd.models import build_model
from kd.training.evaluate import predict_logits
from kd.training.setup import build_network
from kd.training.start import start_from
from tests.losses.test_methods import quick  # noqa: F401  the fixture: no curves, no waiting for the disk
from tests.run_scripts import distil, teach
from tests.training.test_resume import differs_when_killed

timm = pytest.importorskip("timm")

VIT = "timm/vit_tiny_patch16_224"
TINY = "depth=2,embed_dim=24,num_heads=3"
MODEL = ["--model", VIT, "--model-args"]
SMALLER = ["--batch-size", "16"]  # five steps
FEW = ["--classes", "4", "--val-fraction", "0.8", "--epochs", "1"]


def job_of(*args: str, model: str = VIT) -> Job:
    return parse(train_defaults, "", ["--data", "synthetic", "--model", model, *args]).job()


@pytest.fixture
def data():
    return load_data(DataConfig(source="synthetic", classes=4, val_fraction=0.8))


@pytest.fixture
def weights():
    """A file of a tiny ViT for images of 32 x 32 and 7 classes."""
    torch.manual_seed(0)
    state = build_model(VIT, 7, (32, 32), arguments={"depth": 2, "embed_dim": 24, "num_heads": 3}).state_dict()
    torch.save(state, "vit.pth")
    Path("vit.json").write_text(json.dumps({"image_size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}))
    return state


def differing(one: dict, other: dict) -> set[str]:
    return {key for key in one if one[key].shape != other[key].shape or not torch.equal(one[key], other[key])}


def test_a_vit_is_fine_tuned_wholly_at_its_own_size(weights, data, quick):  # noqa: F811
    job, seen = start_from(job_of("--model-args", TINY, "--init", "vit.pth"), data)
    assert (job.origin.image_size, seen.mean) == ((32, 32), (0.5, 0.5, 0.5))
    assert differing(weights, build_network(job, seen).module.state_dict()) == {"head.weight", "head.bias"}
    teach(*MODEL, TINY, *FEW, "--init", "vit.pth", "--out", "run")
    trained = load_file("run/model.safetensors")
    assert differing(weights, trained) == weights.keys(), "nothing is frozen"
    logits = predict_logits(kd.load("run"), data.test, seen, Accelerator(cpu=True), 40)
    torch.testing.assert_close(logits, load_file("run/test_logits.safetensors")["logits"], rtol=1e-4, atol=1e-4)
    distil("--student", "resnet8", "--teacher", "run", *FEW, "--out", "student")
    assert json.loads(Path("student/summary.json").read_text())["teacher_model"] == VIT


def test_position_embeddings_are_resampled_for_another_size(weights, data, capsys):
    args = f"{TINY},img_size=64"
    job, seen = start_from(job_of("--model-args", args, "--init", "vit.pth"), data)
    network = build_network(job, seen).module
    expected = timm.layers.resample_abs_pos_embed(weights["pos_embed"], [4, 4], num_prefix_tokens=1)
    assert torch.equal(network.pos_embed, expected)
    assert differing(weights, network.state_dict()) == {"head.weight", "head.bias", "pos_embed"}
    assert network(torch.zeros(2, 3, *data.size)).shape == (2, 4), "the data's images are resized inside"
    printed = capsys.readouterr().out
    assert "--init vit.pth: resampled pos_embed for images or patches of another size" in printed
    assert "images at 64 x 64 pixels, resized inside" in printed


def test_without_weights_img_size_is_the_size_that_the_network_sees(quick):  # noqa: F811
    teach(*MODEL, f"{TINY},img_size=48", *FEW, "--out", "run")
    info = json.loads(Path("run/model.json").read_text())
    assert (info["image_size"], info["resized"]) == ([16, 16], [48, 48])
    assert kd.load("run").pos_embed.shape == (1, 10, 24)


def test_published_weights_and_both_last_layers_of_a_distilled_vit(monkeypatch, data):
    real = timm.create_model
    torch.manual_seed(0)
    name = "deit_tiny_distilled_patch16_224"
    published = real(name)
    create = lambda name, pretrained=False, **how: published if pretrained else real(name, **how)  # noqa: E731
    monkeypatch.setattr(timm, "create_model", create)
    job, seen = start_from(job_of("--init", "pretrained", model=f"timm/{name}"), data)
    assert job.origin.image_size == (224, 224)
    network = build_network(job, seen).module
    fresh = {f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")}
    assert differing(published.state_dict(), network.state_dict()) == fresh


def test_drop_path_is_a_function_of_the_step(monkeypatch, quick):  # noqa: F811
    run = lambda *args: teach(*MODEL, f"{TINY},drop_path_rate=0.5,proj_drop_rate=0.2", *FEW, *SMALLER, *args)  # noqa: E731
    assert differs_when_killed(monkeypatch, run, 3) == []


def test_convolutions_see_the_data_at_its_own_size(data):
    torch.manual_seed(0)
    torch.save(build_model("timm/mobilenetv3_small_050", 7, (32, 32)).state_dict(), "net.pth")
    Path("net.json").write_text(json.dumps({"image_size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}))
    larger = dataclasses.replace(data, size=(48, 48))
    job, _ = start_from(job_of("--init", "net.pth", model="timm/mobilenetv3_small_050"), larger)
    assert job.origin.image_size == (48, 48)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        (VIT, {"drop_paht_rate": 0.1}, "--model-args drop_paht_rate: timm/vit_tiny.* takes no such argument"),
        (VIT, {"pretrained": True}, "--model-args pretrained: is not for you to give"),
        (VIT, {"checkpoint_path": "x.pth"}, "--model-args checkpoint_path: is not for you to give"),
        (VIT, {"depth": "x"}, "cannot take images of 32 x 32 .*; built with --model-args depth='x'"),
        ("timm/resnet10t", {"img_size": 64}, "--model-args img_size: timm/resnet10t takes images of any size"),
    ],
)
def test_arguments_that_it_does_not_take_are_named(name, arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        build_model(name, 5, (32, 32), arguments=arguments)
    assert "\n" not in str(caught.value)
