"""Teachers from elsewhere: what they expect is kept, what they know is matched by name, nothing is unpickled."""

import dataclasses
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import kd
from kd.config import DataConfig
from kd.config.defaults import distill_defaults
from kd.data import load_data
from kd.data.rows import normalize
from kd.errors import UserError
from kd.export.measure import candidates
from kd.export.source import read_source
from kd.models import build_model
from kd.models.pretrained import Pretrained, load_pretrained
from kd.runs.load import load_network
from kd.teachers.load import load_teacher, load_teachers, match_classes
from tests import checkpoints, networks
from tests.run_scripts import differences, distil, metrics_of, teach
from tests.training.test_resume import Killed, die_at

CPU = torch.device("cpu")
EXPECTS = {"image_size": [24, 20], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
MODEL = "tests.networks:normalised"


@pytest.fixture
def data():
    return load_data(DataConfig("synthetic"))


def weights_of(classes: int, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    network = networks.normalised(classes)
    network(torch.randn(64, 3, 24, 20))  # BatchNorm has seen something
    return network.state_dict()


def beside(path: str, **changes) -> str:
    """What a file's weights expect, next to the file."""
    Path(path).with_suffix(".json").write_text(json.dumps({**EXPECTS, **changes}))
    return path


def file_of(path: str, classes, weights: dict | None = None) -> str:
    save_file(weights or weights_of(len(classes)), path)
    return beside(path, classes=list(classes))


def raw_of(data) -> tuple:
    images = (data.val or data.test).images[:20]  # without labels there is no test split
    ours = normalize(images, torch.tensor(data.mean), torch.tensor(data.std))
    theirs = normalize(images, torch.tensor(EXPECTS["mean"]), torch.tensor(EXPECTS["std"]))
    return ours, F.interpolate(theirs, (24, 20), mode="bilinear", antialias=True)


def test_a_file_sees_its_own_size_and_normalisation_and_answers_in_our_order(data):
    names = ["heron", *reversed(data.classes)]  # one more than the data has, in another order
    teacher = load_teachers([file_of("big.safetensors", names)], data, CPU, False, MODEL)
    own = networks.normalised(11).eval()
    own.load_state_dict(load_file("big.safetensors"))
    ours, theirs = raw_of(data)
    torch.testing.assert_close(teacher.network(ours), own(theirs)[:, list(range(10, 0, -1))], rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    again = load_teachers([beside("big.safetensors", classes=names, mean=[0.5, 0.5, 0.5])], data, CPU, False, MODEL)
    assert again.sha256 != teacher.sha256, "what it expects is part of what it is"


def test_the_arguments_of_its_constructor_are_part_of_what_it_is():
    """--teacher-model-args change its logits and not its weights."""
    expects = ("m", {"w": torch.ones(2)}, ("a", "b"), (4, 4), (0.5,), (0.5,))
    plain, other = (Pretrained(*expects, model_args=given) for given in (None, "global_pool=max,b=1"))
    same = Pretrained(*expects, model_args="b=1, global_pool=max")
    assert plain.sha256 != other.sha256 == same.sha256


def test_a_student_follows_it_and_the_table_names_it(data, capsys):
    file_of("big.safetensors", data.classes)
    distil("--teacher", "big.safetensors", "--teacher-model", MODEL, "--epochs", "1", "--out", "student")
    summary = json.loads(Path("student/summary.json").read_text())
    measured = summary["teacher_test_top1"]
    assert (summary["teacher"], summary["teacher_model"]) == ("big.safetensors", MODEL)
    row = next(line for line in capsys.readouterr().out.splitlines() if "teacher" in line and "│" in line)
    assert f"{measured:.2f}" in row
    assert json.loads(Path("student/config.json").read_text())["teacher_flags"] == {"teacher_model": MODEL}, "--config"
    found, missing = candidates(Path("student"), read_source(Path("student"), True), data, True)
    assert (found[-1].name, missing) == ("teacher", ()), "an export measures what it costs"


def test_prefixes_are_stripped_and_checkpoints_opened(data):
    plain = weights_of(10)
    torch.save(
        {"epoch": 3, "state_dict": {f"module._orig_mod.{key}": value for key, value in plain.items()}}, "big.pth"
    )
    found = load_pretrained(beside("big.pth", classes=data.classes), MODEL)
    assert found.weights.keys() == plain.keys()
    assert all(torch.equal(found.weights[key], plain[key]) for key in plain)
    torch.save(plain, "bare.pt")
    assert load_pretrained(beside("bare.pt", classes=data.classes), MODEL).sha256 == found.sha256


def test_a_file_of_the_literatures_teaches_and_says_how_it_was_matched(data, capsys):
    plain = weights_of(10)
    given = checkpoints.wrapped(checkpoints.in_other_words(plain), "module.")
    torch.save({"epoch": 240, "model": given, "args": Namespace(lr=0.05)}, "best.tar")
    beside("best.tar", classes=data.classes)
    distil("--teacher", "best.tar", "--teacher-model", MODEL, "--epochs", "1", "--out", "student")
    printed = capsys.readouterr().out.splitlines()
    line = "--teacher best.tar: matched 7 tensors by order and shape, their names differ"
    assert sum(one.startswith(line) for one in printed) == 1
    torch.save(plain, beside("plain.pth", classes=data.classes))
    networks_of = [load_teachers([name], data, CPU, False, MODEL).network for name in ("best.tar", "plain.pth")]
    one, other = (network(torch.ones(12, 3, 16, 16)) for network in networks_of)
    assert torch.equal(one, other)


@pytest.mark.parametrize("words", [dict, checkpoints.in_other_words], ids=["our names", "other names"])
def test_a_new_last_layer_on_a_file_with_other_classes(words, data):
    torch.save(words(weights_of(6)), beside("six.bin"))
    how = ["--teacher", "six.bin", "--teacher-model", MODEL, "--fine-tune-teacher", "--epochs", "1"]
    distil(*how, "--out", "student")
    teacher = json.loads(Path("student/summary.json").read_text())["teacher"]
    trained = load_file(Path(teacher, "model.safetensors"))
    kept = weights_of(6)
    assert torch.equal(trained["0.weight"], kept["0.weight"])
    assert trained["6.weight"].shape == (10, 32)


def test_a_sharded_folder_teaches(data):
    folder, weights = Path("vit"), weights_of(10)
    folder.mkdir()
    labels = {str(number): name for number, name in enumerate(data.classes)}
    write = lambda name, content: (folder / name).write_text(json.dumps(content))  # noqa: E731
    write("config.json", {"architectures": ["ViTForImageClassification"], "id2label": labels})
    write("preprocessor_config.json", {"size": 16, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    for number, name in enumerate(weights):
        save_file({name: weights[name]}, folder / f"part-{number}.safetensors")
    write(
        "model.safetensors.index.json",
        {"weight_map": {name: f"part-{number}.safetensors" for number, name in enumerate(weights)}},
    )
    distil("--teacher", "vit", "--teacher-model", MODEL, "--epochs", "1", "--out", "student")
    assert json.loads(Path("student/summary.json").read_text())["teacher_model"] == MODEL


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: None, "--teacher big.pth: no such file"),
        (lambda: torch.save(weights_of(10), "big.pth"), "write big.json"),
        (lambda: torch.save({"state_dict": Bomb()}, beside("big.pth")), "more than tensors, which is never executed"),
        (lambda: torch.save([1, 2], beside("big.pth")), "contains no state dict"),
        (
            lambda: torch.save(weights_of(10), beside("big.pth", std=[0.2])),
            "big.json: std incomplete or malformed; write",
        ),
        (lambda: torch.save(weights_of(10), beside("big.pth")), "its classes have no names"),
        (lambda: torch.save(weights_of(9), beside("big.pth", classes=list("abcdefghij"))), "do not fit the network"),
        (
            lambda: torch.save(weights_of(10), beside("big.pth", classes=list("abcdefghij"))),
            "--fine-tune-teacher trains",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(make, words, data):
    make()
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
        load_teachers(["big.pth"], data, CPU, False, MODEL)
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


def nan_weights() -> dict:
    weights = weights_of(10)
    weights["6.bias"][3] = float("nan")
    return weights


TEN = [str(number) for number in range(10)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: file_of("big.safetensors", TEN, nan_weights()),
            "--teacher big.safetensors: 6.bias holds NaN or infinity",
        ),
        (
            lambda: beside(file_of("big.safetensors", TEN), mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4]),
            "big.json: mean and std must be from 0 to 1, as shares of 255",
        ),
        (lambda: beside(file_of("big.safetensors", TEN), std=[0.2, 0.2, 1.5]), "mean and std must be from 0 to 1"),
        (lambda: beside(file_of("big.safetensors", TEN), mean=[-0.5, 0, 0]), "mean and std must be from 0 to 1"),
        (
            lambda: beside(file_of("big.safetensors", TEN), mean=[float("nan"), 0, 0]),
            "big.json: mean incomplete or malformed",
        ),
        (
            lambda: beside(file_of("big.safetensors", TEN), model="resnet8", resized=[24, 24]),
            "big.json: belongs to a run; name the run's folder, --teacher .",
        ),
    ],
    ids=["nan", "levels", "wide", "negative", "nan mean", "run"],
)
def test_a_safetensors_file_that_misleads_is_refused(make, words, data):
    make()
    with pytest.raises(UserError, match=words):
        load_teachers(["big.safetensors"], data, CPU, False, MODEL)


def test_weights_of_another_network_name_the_one_that_was_tried(data):
    file_of("big.safetensors", data.classes)
    with pytest.raises(UserError, match=r"do not fit the network resnet34: .* name the right one with --teacher-model"):
        load_teachers(["big.safetensors"], data, CPU, False, "resnet34")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher", "./nowhere"], "nowhere: no such run folder"),
        (["--teacher", "empty"], "empty has no finished run"),
        (["--teacher", "torchvision/resnet19"], "unknown model 'torchvision/resnet19'"),
        (["--teacher", "torchvision/googlenet"], "rescales its images internally"),
        (["--teacher", "big.pth"], "--teacher big.pth: no such file"),
        (["--teacher", "~nobodyx/big.pth"], "--teacher ~nobodyx/big.pth: no such file or folder"),
        (["--teacher", "~nobodyx/run"], "--teacher ~nobodyx/run: no such file or folder"),
        (["--teacher", "there.pth", "--teacher-model", "resnet35"], "unknown model 'resnet35'"),
        (["--teacher", "there.pth"], "write there.json"),
        (["--teacher", "no-one/such"], "cannot be downloaded from the Hub"),
        (
            ["--teacher", "fits.tar", "--teacher-model", "vgg8"],
            "do not fit the network vgg8: of its 32 tensors, 32 miss",
        ),
        (["--teacher", "fits.tar", "there.ckpt", "--teacher-model", MODEL], "there.ckpt: no such file"),
        (["--teacher", "nan.bin", "--teacher-model", MODEL], "nan.bin: 6.bias holds NaN or infinity"),
    ],
)
def test_a_teacher_that_is_not_there_is_missed_before_any_data_is_read(flags, words, monkeypatch):
    monkeypatch.setattr("kd.data.load_data", None)
    Path("empty").mkdir()
    torch.save(weights_of(10), "there.pth")
    torch.save(weights_of(10), beside("fits.tar", classes=TEN))
    torch.save(nan_weights(), beside("nan.bin", classes=TEN))
    if "resnet35" in flags:
        beside("there.pth", classes=TEN)
    with pytest.raises(UserError, match=words):
        distil(*flags, "--out", "student")
    assert not Path("student").exists()


def test_a_teacher_that_lacks_a_class_leaves_no_folder_behind(data):
    file_of("big.safetensors", ["one"] * 10)
    with pytest.raises(UserError, match="knows 10 classes and not"):
        distil("--teacher", "big.safetensors", "--teacher-model", MODEL, "--out", "some/student")
    assert not Path("some").exists()


@pytest.mark.parametrize(("word", "method"), [("kdd", "kd"), ("dkdd", "dkd"), ("fitnets", "fitnet")])
def test_a_mistyped_method_is_not_taken_for_a_second_teacher(resnet8_run, word, method):
    with pytest.raises(UserError, match=f"--teacher {word}: no such run folder; did you mean the method {method}?"):
        distil("--teacher", str(resnet8_run), word)


def test_a_file_or_a_download_in_place_of_a_run_folder_says_what_it_is():
    file_of("big.tar", TEN)
    with pytest.raises(UserError, match=r"big.tar: is a file, not a run folder; a file of weights is taken .*--teach"):
        kd.load("big.tar")
    with pytest.raises(UserError, match=r"--sparsity: needs a finished run .*, and --init big.tar is none"):
        teach("--init", "big.tar", "--sparsity", "0.5")
    Path("vit").mkdir()
    Path("vit/config.json").write_text(json.dumps({"architectures": ["ViTForImageClassification"]}))
    with pytest.raises(UserError, match=r"holds a network of Transformers or timm \(ViTForImageClassification\); name"):
        kd.load("vit")
    with pytest.raises(UserError, match=r"vit: holds no model.safetensors and no pytorch_model.bin"):
        distil("--teacher", "vit", "--out", "student")


def test_a_run_has_learned_its_last_layer(resnet8_run):
    with pytest.raises(
        UserError, match=r"--fine-tune-teacher: .*resnet8 is a run, whose last layer is trained already"
    ):
        distil("--teacher", str(resnet8_run), "--fine-tune-teacher")


def test_names_match_in_other_spellings_and_never_by_luck():
    assert match_classes(("dog", "cat"), ("cat", "dog")) == [1, 0]
    assert match_classes(("tench, Tinca tinca", "French horn"), ("french_horn", "Tench")) == [1, 0]
    assert match_classes(("Cat", "cat"), ("cat",)) == [1], "the very name first"
    assert match_classes(("Cat", "CAT"), ("cat",)) is None
    assert match_classes(("dog", "cat"), ("dog", "heron")) is None
    thousand = tuple(f"class {number}" for number in range(1000))
    respelt = ("another word", *thousand[1:])
    assert match_classes(thousand, respelt) == list(range(1000))
    assert match_classes(thousand, tuple(f"x{name}" for name in thousand)) is None


NAME = "torchvision/shufflenet_v2_x0_5"


@pytest.fixture
def hub_folder(monkeypatch, tmp_path):
    """torchvision's cache of pretrained weights, empty; and no network behind it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def unreachable(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_a_pretrained_network_of_torchvision(hub_folder, data):
    from torchvision.models import ShuffleNet_V2_X0_5_Weights

    published = ShuffleNet_V2_X0_5_Weights.DEFAULT
    torch.manual_seed(0)
    network = build_model(NAME, 1000, (224, 224)).eval()
    hub_folder.mkdir(parents=True)
    torch.save(network.state_dict(), hub_folder / Path(published.url).name)
    names = ("tench", "french_horn", "Golf ball")
    three = dataclasses.replace(data, classes=names)
    teacher = load_teachers([NAME], three, CPU, False)
    expects = published.transforms()
    images = data.test.images[:2]
    theirs = normalize(images, torch.tensor(expects.mean), torch.tensor(expects.std))
    theirs = F.interpolate(theirs, (224, 224), mode="bilinear", antialias=True)
    columns = [published.meta["categories"].index(name) for name in ("tench", "French horn", "golf ball")]
    ours = normalize(images, torch.tensor(data.mean), torch.tensor(data.std))
    torch.testing.assert_close(teacher.network(ours), network(theirs)[:, columns], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match=r"knows 1000 classes and not 'blob'.*--fine-tune-teacher"):
        load_teachers([NAME], dataclasses.replace(data, classes=("tench", "blob")), CPU, False)


def test_pretrained_weights_out_of_reach_end_in_one_line(hub_folder, data):
    with pytest.raises(
        UserError, match=r"cannot fetch its pretrained weights \(OSError: Network is unreachable\).*shufflenet.*pth"
    ) as caught:
        load_teachers([NAME], data, CPU, False)
    assert str(hub_folder) in str(caught.value)
    with pytest.raises(UserError, match="unknown model 'torchvision/resnet19': did you mean resnet1"):
        load_teachers(["torchvision/resnet19"], data, CPU, False)
    with pytest.raises(UserError, match="rescales its images internally"):
        load_teachers(["torchvision/googlenet"], data, CPU, False)


@pytest.mark.timm
def test_a_pretrained_network_of_timm(monkeypatch, data):
    timm = pytest.importorskip("timm")
    real = timm.create_model
    torch.manual_seed(0)
    network = real("resnet10t", num_classes=1000).eval()
    create = lambda name, pretrained=False, **how: network if pretrained else real(name, **how)  # noqa: E731
    monkeypatch.setattr(timm, "create_model", create)
    two = dataclasses.replace(data, classes=("tench", "goldfish"))
    teacher = load_teachers(["timm/resnet10t.c3_in1k"], two, CPU, False)
    expects = timm.data.resolve_model_data_config(network)
    images = data.test.images[:2]
    ours = normalize(images, torch.tensor(data.mean), torch.tensor(data.std))
    theirs = normalize(images, torch.tensor(expects["mean"]), torch.tensor(expects["std"]))
    theirs = F.interpolate(theirs, tuple(expects["input_size"][1:]), mode="bilinear", antialias=True)
    torch.testing.assert_close(teacher.network(ours), network(theirs)[:, :2], rtol=1e-3, atol=1e-4)


def test_a_run_of_another_image_size_teaches_live_as_cached(data):
    teach("--out", "teacher", "--epochs", "1")
    path = Path("teacher/model.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": [24, 24]}))
    frozen = load_teacher(Path("teacher"), data, CPU, True)
    own = networks.normalised(10).eval()
    own.load_state_dict(load_file("teacher/model.safetensors"))
    images = torch.randn(12, 3, 16, 16)
    larger = F.interpolate(images, (24, 24), mode="bilinear", antialias=True)
    torch.testing.assert_close(frozen.network(images), own(larger))
    flags = ["--teacher", "teacher", "--trust-code", "--views", "1", "--epochs", "1"]
    distil(*flags, "--out", "live")
    distil(*flags, "--out", "cached", "--cache-teacher", "--cache-dtype", "float32")
    assert (Path("live/model.safetensors").read_bytes()) == Path("cached/model.safetensors").read_bytes()


def test_a_hub_id_is_fetched(monkeypatch, data):
    teach("--out", "pushed", "--epochs", "1")
    asked = []

    def fetch(repository, revision=None, allow_patterns=None):
        asked.append((repository, revision, sorted(allow_patterns)))
        shutil.copytree("pushed", "fetched", ignore=lambda _, names: [n for n in names if n not in allow_patterns])
        return "fetched"

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load_teachers(["someone/net@v1"], data, CPU, True).summary["model"] == MODEL
    assert asked[0][:2] == ("someone/net", "v1")
    assert {"model.json", "model.safetensors"} <= set(asked[0][2])


FINE = ["--teacher", "big.safetensors", "--teacher-model", MODEL, "--fine-tune-teacher", "--epochs", "2"]


def test_a_new_last_layer_is_trained_upon_a_frozen_network(data):
    before = weights_of(7)
    file_of("big.safetensors", ["other"] * 7, before)
    distil(*FINE, "--out", "student")
    (folder,) = Path("runs/report").glob("teacher-*")
    after = load_file(folder / "model.safetensors")
    same = lambda name: before[name].shape == after[name].shape and torch.equal(before[name], after[name])  # noqa: E731
    changed = {name for name in before if not same(name)}
    assert changed == {"6.weight", "6.bias"}, "the backbone's weights and BatchNorm's statistics stay"
    info = json.loads((folder / "model.json").read_text())
    assert {key: info[key] for key in ("mean", "std")} == {key: EXPECTS[key] for key in ("mean", "std")}
    assert (info["image_size"], info["resized"]) == (list(data.size), EXPECTS["image_size"])
    assert info["classes"] == list(data.classes)
    network = load_network(folder, trust_code=True).network
    mean, std = (torch.tensor(info[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        found = network((data.test.images / 255 - mean) / std)
    torch.testing.assert_close(found, load_file(folder / "test_logits.safetensors")["logits"], rtol=1e-4, atol=1e-4)
    summary = json.loads(Path("student/summary.json").read_text())
    assert summary["teacher"] == str(folder)
    own = json.loads((folder / "summary.json").read_text())
    first, last = (line["train/loss"] for line in metrics_of(folder))
    assert last < first - 0.02, "the layer learns"
    assert summary["teacher_test_top1"] == pytest.approx(own["test_top1"], abs=0.5), "seen through the student's data"
    written = (folder / "summary.json").stat().st_mtime_ns
    distil(*FINE, "--seed", "1", "--out", "second")
    assert (folder / "summary.json").stat().st_mtime_ns == written, "students of several seeds share it"


def test_training_the_last_layer_resumes_to_the_same_bytes(monkeypatch):
    file_of("big.safetensors", ["other"] * 7)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 25)
        distil(*FINE)
    (folder,) = Path("runs/report").glob("teacher-*")
    assert not (folder / "summary.json").exists()
    distil(*FINE)
    shutil.move(folder, "resumed")
    shutil.rmtree("runs")
    distil(*FINE)
    assert differences(folder, Path("resumed")) == []


def test_the_flag_needs_a_teacher():
    with pytest.raises(UserError, match="--fine-tune-teacher: needs a pretrained --teacher"):
        dataclasses.replace(distill_defaults("report"), fine_tune_teacher=True).check()
