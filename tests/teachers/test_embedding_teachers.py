"""Teachers of embeddings: their own size and normalisation, no classes to match, kept answers as live ones."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import kd
from kd.config import DataConfig
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.data import load_data
from kd.errors import UserError
from kd.models import build_model
from kd.runs.load import load_network
from kd.teachers.cache import ROOT, cached_logits
from kd.teachers.live import live_logits
from kd.teachers.load import load_embedders, load_teachers
from kd.types import Batch
from tests import networks
from tests.run_scripts import STUDENT, distil, teach
from tests.teachers.test_pretrained import EXPECTS, MODEL, beside, file_of, raw_of, weights_of

CPU = torch.device("cpu")
CACHED = ["--views", "2", "--teacher", "runs/t", "--trust-code", "--cache-teacher"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A small classifier with BatchNorm, trained on other labels than any data here has."""
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--model", "resnet8", "--classes", "4", "--epochs", "1", "--out", "t")
    return str(folder / "t")


@pytest.fixture
def data():
    return load_data(DataConfig("synthetic", no_labels=True))


def given_to(network, layer: str, images):
    """What enters a layer."""
    found = []
    network.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    network(images)
    return found[0]


def test_a_run_answers_with_what_its_classifier_is_given_whatever_its_classes(run, data):
    teacher = load_embedders([run], data, CPU, trust_code=False)
    own, info, _, _ = load_network(Path(run), trust_code=False)
    ours, _ = raw_of(data)
    mean, std = (torch.tensor(part)[:, None, None] for part in (data.mean, data.std))
    theirs = (ours * std + mean - torch.tensor(info["mean"])[:, None, None]) / torch.tensor(info["std"])[:, None, None]
    torch.testing.assert_close(teacher.network(ours), given_to(own, "fc", theirs), rtol=1e-4, atol=1e-5)
    assert teacher.classes == 64
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())


@pytest.mark.parametrize("kind", ["with classes", "of any classes", "without classifier"])
def test_a_file_sees_its_own_size_and_normalisation(kind, data):
    weights = weights_of(7)
    if kind == "without classifier":
        weights = {key: value for key, value in weights.items() if not key.startswith("6.")}
    names = [str(number) for number in range(7)] if kind == "with classes" else []
    teacher = load_embedders([file_of("net.safetensors", names, weights)], data, CPU, False, MODEL)
    own = networks.normalised(7).eval()
    own.load_state_dict(weights_of(7))
    ours, theirs = raw_of(data)
    torch.testing.assert_close(teacher.network(ours), given_to(own, "6", theirs), rtol=1e-4, atol=1e-4)
    again = load_embedders([beside("net.safetensors", classes=names, mean=[0.5] * 3)], data, CPU, False, MODEL)
    assert again.sha256 != teacher.sha256, "what it expects is part of what it is"


def test_weights_under_other_names_fit_as_a_whole(data):
    weights = {
        f"part{place}.{key.partition('.')[2]}": value for place, (key, value) in enumerate(weights_of(7).items())
    }
    torch.save(weights, "net.pth")
    teacher = load_embedders([beside("net.pth")], data, CPU, False, MODEL)
    assert teacher.classes == 32


def test_several_are_side_by_side_each_of_length_one(run, data, capsys):
    both = load_embedders([run, file_of("net.safetensors", [], weights_of(7))], data, CPU, False, MODEL)
    image = torch.randn(6, 3, *data.size)
    expected = torch.cat([F.normalize(member.network(image)) for member in both.members], dim=1)
    torch.testing.assert_close(both.network(image), expected)
    assert both.classes == 64 + 32
    assert "2 teachers: their embeddings, each normalised to length 1, side by side: 96" in capsys.readouterr().out


def test_a_function_brings_its_own_weights_and_must_be_trusted(data):
    with pytest.raises(UserError, match=r"^--teacher tests.networks:plain: building it runs its author's code"):
        load_embedders(["tests.networks:plain"], data, CPU, trust_code=False)
    first, second = (load_embedders(["tests.networks:plain"], data, CPU, trust_code=True) for _ in range(2))
    assert (first.classes, first.sha256) == (128, second.sha256)


def test_an_embedding_is_another_teacher_than_the_same_weights_logits(data):
    labelled = load_data(DataConfig("synthetic"))
    name = file_of("net.safetensors", labelled.classes, weights_of(10))
    embedder = load_embedders([name], labelled, CPU, False, MODEL)
    assert embedder.sha256 != load_teachers([name], labelled, CPU, False, MODEL).sha256


def embedder_run(folder: str) -> str:
    """A folder as a run of embed leaves it."""
    Path(folder).mkdir(parents=True)
    network = build_model("resnet8", 0, (16, 16))
    from safetensors.torch import save_file

    save_file(network.state_dict(), f"{folder}/model.safetensors")
    info = {"model": "resnet8", "num_classes": 0, "classes": [], "image_size": [16, 16], "embedding": 64}
    info |= {key: EXPECTS[key] for key in ("mean", "std")}
    Path(folder, "model.json").write_text(json.dumps(info))
    Path(folder, "summary.json").write_text(json.dumps({"status": "finished", "model": "resnet8"}))
    return folder


def test_an_embedder_teaches_embeddings_and_no_classes(data):
    teacher = load_embedders([embedder_run("runs/e")], data, CPU, trust_code=False)
    assert teacher.classes == 64
    with pytest.raises(UserError, match=r"^teacher runs/e: is an embedder, without classes; take the method embed"):
        load_teachers(["runs/e"], load_data(DataConfig("synthetic")), CPU, trust_code=False)


def test_a_loaded_embedder_embeds_and_predicts_nothing():
    network = kd.load(embedder_run("runs/e"))
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    found = network.embedding(pixels)
    assert found.shape == (5, 64)
    torch.testing.assert_close(found, network(torch.stack([network.transform(image) for image in pixels])).detach())
    torch.testing.assert_close(network.embedding(pixels[0]), found[0])
    with pytest.raises(UserError, match=r"^resnet8: is an embedder and predicts no classes; kd.load\(RUN\).embedding"):
        network.predict(pixels)


def test_a_loaded_classifier_embeds_too(run):
    network = kd.load(run)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    images = torch.stack([network.transform(image) for image in pixels])
    torch.testing.assert_close(network.embedding(pixels), given_to(network, "fc", images).detach())


def opened(run: str, data, *args: str):
    """The cached teacher that a student with these flags would have, the live one, and the job."""
    flags = [*STUDENT, *CACHED, "--no-labels", "embed", *args]
    job = parse(distill_defaults, "", [run if word == "runs/t" else word for word in flags]).job()
    frozen, accelerator = load_embedders([run], data, CPU, trust_code=True), Accelerator(cpu=True)
    return cached_logits(frozen, data, job, accelerator), live_logits(frozen.network, accelerator), job, accelerator


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_row_21_kept_embeddings_are_the_live_ones(run, data, dtype, capsys):
    cached, live, job, accelerator = opened(run, data, "--cache-dtype", dtype, "--mixup", "1")
    size = 2 * len(data.train.labels) * 64 * (4 if dtype == "float32" else 2) / 1e6
    out = capsys.readouterr().out
    assert f"{size:.3g} MB for 2 views of {len(data.train.labels)} images: embeddings of 64 numbers" in out
    from kd.data.loader import Batches

    for batch in Batches(data, job, accelerator).epoch(1):
        expected = live(batch).logits
        if dtype == "float32":
            assert torch.equal(cached(batch).logits, expected)
        else:
            assert torch.equal(cached(batch).logits, expected.half().float())


def test_a_cache_of_logits_is_never_taken_for_one_of_embeddings(run, data):
    opened(run, data)
    (folder,) = ROOT.iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["identity"].pop("kind") == "embedding"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"has other embeddings \(kind: None there, embedding here\)"):
        opened(run, data)


def test_only_the_largest_of_an_embedding_cannot_be_kept(run):
    with pytest.raises(
        UserError, match=r"^--cache-top-k 5: keeps the largest of a teacher's logits, and embeddings are"
    ):
        parse(distill_defaults, "", ["--data", "x", "--teacher", run, "--views", "1", "--cache-top-k", "5", "embed"])


def test_without_a_teacher_it_says_what_can_teach():
    with pytest.raises(UserError, match=r"^embed: needs --teacher, a network whose embedding to learn"):
        parse(distill_defaults, "", ["--data", "digits", "embed"]).for_method()


def test_labels_that_are_there_are_not_read_and_flags_about_them_refused():
    config = parse(distill_defaults, "", ["--data", "digits", "--teacher", "x", "embed"])
    assert config.for_method().data.no_labels
    assert config.views.mixup == 1.0, "the field's mixing is the default"
    config = parse(distill_defaults, "", ["--data", "digits", "--classes", "4", "--teacher", "x", "embed"])
    with pytest.raises(UserError, match=r"^--classes 4: is about labels"):
        config.for_method()


def test_it_is_combined_with_no_other_method():
    with pytest.raises(UserError, match=r"^kd\+embed: embed trains on embeddings, the others on classes"):
        parse(distill_defaults, "", ["--data", "digits", "kd+embed"])


def test_answers_are_one_batch_as_any_teachers(run, data):
    teacher = load_embedders([run], data, CPU, trust_code=False)
    batch = Batch(torch.randn(4, 3, *data.size), *[torch.zeros(4, dtype=torch.long)] * 2, *[torch.tensor(0)] * 3)
    assert live_logits(teacher.network, Accelerator(cpu=True))(batch).logits.shape == (4, 64)


@pytest.fixture
def published(monkeypatch):
    """timm's answer for a small transformer that was published without a classifier, for 56 x 56 pixels."""
    timm = pytest.importorskip("timm")
    real, name = timm.create_model, "vit_tiny_patch16_224"
    torch.manual_seed(0)
    network = real(name, num_classes=0, img_size=64)
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, 64, 64), "num_classes": 0, "mean": (0.4,) * 3}
    create = lambda name, pretrained=False, **how: network if pretrained else real(name, **how)  # noqa: E731
    monkeypatch.setattr(timm, "create_model", create)
    return f"timm/{name}", network.eval()


def test_timms_networks_without_classifier_teach_at_their_own_size_and_normalisation(published, data):
    name, network = published
    teacher = load_embedders([name], data, CPU, trust_code=False)
    assert teacher.classes == 192
    ours, _ = raw_of(data)
    mean, std = (torch.tensor(part)[:, None, None] for part in (data.mean, data.std))
    theirs = (F.interpolate(ours, (64, 64), mode="bilinear", antialias=True) * std + mean - 0.4) / 0.5
    torch.testing.assert_close(teacher.network(ours), network(theirs), rtol=1e-4, atol=1e-4)


def test_timms_networks_teach_at_a_size_that_is_asked_for(published, data):
    name, network = published
    smaller = load_embedders([name], data, CPU, trust_code=False, model_args="img_size=32")
    own = load_embedders([name], data, CPU, trust_code=False)
    assert smaller.network.pos_embed.shape == (1, 1 + 4, 192)
    assert smaller.sha256 != own.sha256
    assert torch.equal(smaller.network.blocks[0].mlp.fc1.weight, network.blocks[0].mlp.fc1.weight)


def test_a_student_of_deit_answers_with_what_both_of_its_heads_are_given(run, data):
    distil("--teacher", run, "--student", "resnet8", "--classes", "4", "--epochs", "1", "--out", "d", "deit")
    own, info, _, _ = load_network(Path("d"), trust_code=False)
    assert info["deployed"]["method"] == "deit"
    teacher, (images, _) = load_embedders(["d"], data, CPU, trust_code=False), raw_of(data)
    numbers = (data.mean, data.std, info["mean"], info["std"])
    mean, std, own_mean, own_std = (torch.tensor(part)[:, None, None] for part in numbers)
    theirs = (images * std + mean - own_mean) / own_std
    expected = given_to(own, "distillation_head", theirs)
    torch.testing.assert_close(teacher.network(images), expected, rtol=1e-4, atol=1e-5)
    assert teacher.classes == 64
