"""Transformers of timm teach a small convolutional network and learn from it, by every method, without layer flags."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import kd
from kd.config import METHODS
from kd.errors import UserError
from kd.losses import loss_class
from kd.losses.base import Distiller
from kd.models import build_model, probe, stages
from kd.models.features import Tap
from kd.types import Batch, Outputs, Pair
from tests.losses.test_methods import FEW
from tests.run_scripts import differences, distil, metrics_of, teach
from tests.training.test_resume import Killed, die_at

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.timm

CLASSES, SAMPLES = 5, 8
LABELS = torch.arange(SAMPLES) % CLASSES
FEATURES = [name for name, kind in METHODS.items() if "teacher_layers" in kind.__dataclass_fields__]
SMALL = {"crd": {"negatives": 16, "width": 8}}
VIT, SWIN = "timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224"
CONVNEXT, EFFICIENTNET = "timm/convnext_atto", "timm/efficientnet_b0"
MOBILENET, DISTILLED = "timm/mobilenetv4_conv_small", "timm/deit_tiny_distilled_patch16_224"


def build(method: str, student: str, teacher: str, size: tuple[int, int], **flags) -> tuple[Distiller, Tap]:
    """As kd.training.setup does it."""
    torch.manual_seed(0)
    networks = [build_model(name, CLASSES, size) for name in (student, teacher)]
    networks[1].eval().requires_grad_(False)
    found = [stages(name, network, CLASSES) for name, network in zip((student, teacher), networks)]
    config = METHODS[method](**SMALL.get(method, {}), **flags)
    kind = loss_class(config)
    layers = kind.layers(config, *found)
    outputs = [probe(network, size, "test", names) for network, names in zip(networks, layers)]
    head = networks[1].get_submodule(found[1].classifier)
    loss = kind(config, Pair(*outputs, LABELS, *found, head))
    return Distiller(networks[0], loss), Tap(networks[1], loss.teacher_layers)


def step(distiller: Distiller, teacher: Tap, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    image = torch.randn(SAMPLES, 3, *size)
    batch = Batch(image, LABELS, torch.arange(SAMPLES), *[torch.tensor(0)] * 3)
    with torch.no_grad():
        outputs: Outputs = teacher(image)
    terms = distiller.train()(batch, outputs).terms
    sum(terms.values()).backward()
    return terms


def check(distiller: Distiller, terms: dict[str, torch.Tensor]) -> None:
    assert all(torch.isfinite(term) for term in terms.values())
    trained = [parameter for parameter in distiller.student.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    assert all(parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in trained)


@pytest.mark.parametrize("size", [(32, 32), (64, 64)], ids=["32", "64"])
@pytest.mark.parametrize(("student", "teacher"), [(VIT, "resnet8"), ("resnet8", VIT)], ids=["vit", "resnet8"])
@pytest.mark.parametrize("method", [*FEATURES, "deit", "ofa"])
def test_every_method_works_between_a_transformer_and_a_resnet(method, student, teacher, size):
    if (method, teacher) == ("simkd", VIT):
        with pytest.raises(
            UserError, match=r"simkd: the teacher's head does not take the average of blocks.11; .* another method"
        ):
            build(method, student, teacher, size)
        return
    distiller, tap = build(method, student, teacher, size)
    terms = step(distiller, tap, size)
    check(distiller, terms)
    assert terms[{"ofa": "exits"}.get(method, method)] != 0


@pytest.mark.parametrize("method", ["at", "reviewkd", "ofa", "deit"])
@pytest.mark.parametrize("student", [SWIN, CONVNEXT, EFFICIENTNET, MOBILENET, DISTILLED])
def test_other_families_learn_from_a_transformer(method, student):
    size = (64, 64)
    distiller, tap = build(method, student, VIT, size)
    check(distiller, step(distiller, tap, size))


def test_the_two_outputs_of_a_distilled_network_are_timms_own():
    size, image = (32, 32), torch.randn(SAMPLES, 3, 32, 32)
    distiller, _ = build("deit", DISTILLED, "resnet8", size)
    network = distiller.deployed
    assert type(network).__name__ == "VisionTransformerDistilled"
    assert distiller.loss.recipe == {}, "deployed as it is"
    with torch.no_grad():
        answers = network(image), *distiller.tap(image).features.values()
        network.set_distilled_training(True)
        network.train()
        one, two = network(image)
    for ours, theirs in zip(answers, ((one + two) / 2, one, two), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A file of a transformer's random weights, and a finished run of resnet8."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(1)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32)
    torch.nn.init.normal_(network.head.weight)
    save_file(network.state_dict(), folder / "vit.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--model", "resnet8", *FEW, "--out", "resnet8")
    names = json.loads((folder / "resnet8/model.json").read_text())["classes"]
    expects = {"image_size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "classes": names}
    (folder / "vit.json").write_text(json.dumps(expects))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("kd.training.summary.draw_curves", lambda *args: None)


@pytest.mark.parametrize("method", ["deit", "ofa", "at", "reviewkd"])
def test_a_transformers_file_teaches_resnet8(folder, method):
    teacher = ["--teacher", str(folder / "vit.safetensors"), "--teacher-model", VIT]
    distil("--student", "resnet8", *teacher, *FEW, method, "--out", "run")
    assert metrics_of(Path("run"))[-1][f"train/{method}"] > 0
    network = kd.load("run")
    assert hasattr(network, "distillation_head") == (method == "deit")
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["params"] == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("student", "kind"), [("tests.networks:timm_vit", "hard"), (DISTILLED, "soft")])
def test_resnet8_teaches_a_transformer_which_resumes_to_the_same_bytes(folder, student, kind, monkeypatch):
    flags = ["--student", student, "--teacher", str(folder / "resnet8"), "--trust-code", *FEW, "--save-every", "2"]
    method = ["deit", "--kind", kind]
    distil(*flags, *method, "--out", "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 3)
        distil(*flags, *method, "--out", "run")
    distil(*flags, *method, "--out", "run", "--resume")
    assert differences(Path("whole"), Path("run")) == []
    assert kd.load("run", trust_code=True)(torch.randn(2, 3, 16, 16)).shape == (2, 4)
