"""Every method through the real script: it trains, resumes to the same bytes, and its network can be loaded."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import kd
from kd.config import METHODS, DataConfig
from kd.data import load_data
from kd.errors import UserError
from kd.teachers.load import load_teachers
from kd.training.evaluate import predict_logits
from tests.conftest import ON_GPU
from tests.run_scripts import differences, distil, metrics_of, teach
from tests.training.test_resume import Killed, die_at

FEW = [
    "--classes",
    "4",
    "--val-fraction",
    "0.8",
    "--batch-size",
    "40",
    "--epochs",
    "2",
    "--lr",
    "0.001",
    "--save-every",
    "1",
]  # 80 images: 4 steps
FLAGS = {
    "crd": ["--negatives", "64"],
    "dkd": ["--ramp-epochs", "2"],
    "rld": ["--ramp-epochs", "2"],
    "kd+vid+crd": ["--crd-negatives", "64"],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Skip curves and fsync: not tested here, and half of the time."""
    monkeypatch.setattr("kd.training.summary.draw_curves", lambda *args: None)
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--model", "resnet14", *FEW, "--out", "resnet14")
        teach("--model", "tests.networks:plain", *FEW, "--out", "plain")
    return str(folder / "resnet14")


def student(teacher: str, method: str, *args: str) -> None:
    distil("--student", "resnet8", "--teacher", teacher, "--trust-code", *FEW, method, *FLAGS.get(method, []), *args)


# Methods with state, parameters or two views, or another deployed network, always run; the others are slow tests.
STATEFUL = ("kd", "ctkd", "crld", "vid", "cc", "crd", "reviewkd", "simkd", "deit", "ofa", "apprentice")
EVERY = [
    pytest.param(name, marks=() if name in STATEFUL else pytest.mark.slow)
    for name in (*METHODS, "simkd+at")
    if name != "embed"  # which reads no labels: tests/training/test_embedding_runs.py
]
EVERY.append("kd+vid+crd")


@pytest.mark.parametrize("method", EVERY)
def test_row_4_every_method_trains_and_resumes_to_the_same_bytes(teacher, method, monkeypatch):
    student(teacher, method, "--out", "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 3)
        student(teacher, method, "--out", "run")
    student(teacher, method, "--out", "run", "--resume")
    assert differences(Path("whole"), Path("run")) == []


@pytest.mark.skipif(not (ON_GPU and torch.cuda.is_available()), reason="needs a GPU, and KD_TEST_GPU=1")
@pytest.mark.parametrize("method", EVERY)
def test_cuda_graphs_give_every_method_the_bits_of_its_compiled_step(teacher, method):
    for folder, mode in (("plain", "default"), ("graphs", "reduce-overhead")):
        student(teacher, method, "--out", folder, "--compile-mode", mode)
    assert differences(Path("plain"), Path("graphs")) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rld", "pld", "ctkd"])
def test_row_21_methods_of_logits_follow_kept_answers_as_a_live_teacher(teacher, method):
    student(teacher, method, "--out", "live", "--views", "2")
    student(teacher, method, "--out", "kept", "--views", "2", "--cache-teacher", "--cache-dtype", "float32")
    assert differences(Path("live"), Path("kept")) == []


def test_simkd_scores_saves_counts_and_loads_the_deployed_network(teacher):
    student(teacher, "simkd", "--out", "run")
    network, head = kd.load("run"), kd.load(teacher).fc
    torch.testing.assert_close(network.classifier.weight, head.weight, rtol=0, atol=0)
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["params"] == sum(parameter.numel() for parameter in network.parameters())
    alone = sum(parameter.numel() for parameter in kd.load(teacher).parameters())
    assert not any(name.startswith("student.fc") for name, _ in network.named_parameters())
    assert summary["params"] != alone
    data = load_data(DataConfig(source="synthetic", classes=4, val_fraction=0.8))
    logits = predict_logits(network, data.test, data, Accelerator(cpu=True), 40)
    assert 100 * (logits.argmax(1) == data.test.labels).double().mean().item() == summary["test_top1"]
    assert metrics_of(Path("run"))[0].keys() >= {"train/simkd", "val/top1"}
    assert "train/ce" not in metrics_of(Path("run"))[0]


def test_an_unfinished_run_on_the_layers_of_before_is_not_continued_on_others(teacher, monkeypatch):
    """The same command compared a WRN's pooled map once; its checkpoint must not be trained on with another loss."""
    wide = ["--student", "wrn-16-1", "--teacher", teacher, *FEW, "sp", "--out", "run"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 3)
        distil(*wide)
    written = json.loads(Path("run/config.json").read_text())
    assert written["identity"].pop("layers") == [["layer3"], ["layer3"]]
    Path("run/config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"has another run \(layers None there, \[\['layer3'\], \['layer3'\]\] here\)"):
        distil(*wide, "--resume")


def test_a_recipe_that_cannot_be_rebuilt_is_named(teacher):
    student(teacher, "simkd", "--out", "run")
    info = json.loads(Path("run/model.json").read_text())
    for recipe in ({"method": "nothing"}, {"method": "simkd"}, ["simkd"], info["deployed"] | {"layer": "layer9"}):
        Path("run/model.json").write_text(json.dumps(info | {"deployed": recipe}))
        with pytest.raises(UserError, match=r"model.json: deployed .* cannot be rebuilt"):
            kd.load("run")


def test_a_network_without_known_stages_needs_layers_and_the_message_lists_them(teacher):
    plain = str(Path(teacher).parent / "plain")
    to = ["--student", "tests.networks:normalised", "--teacher", plain, "--trust-code", *FEW]
    with pytest.raises(
        UserError, match=r"the student's model has no known stages .* --student-layers: there are 0, 1, 2"
    ):
        distil(*to, "at", "--out", "run")
    with pytest.raises(UserError, match=r"no layer '00': "):
        distil(*to, "at", "--student-layers", "00", "--out", "run")
    with pytest.raises(UserError, match=r"the teacher's model has no known stages"):
        distil(*to, "at", "--student-layers", "0", "--out", "run")
    distil(*to, "at", "--student-layers", "0", "--teacher-layers", "0", "--out", "run")
    distil(*to, "rkd", "--out", "embeddings")  # the embedding is found without being named
    assert metrics_of(Path("embeddings"))[-1]["train/rkd"] > 0


def test_features_of_a_teacher_with_another_normalisation_are_found(teacher):
    """Another split has another mean; the teacher's layers must still be found by name."""
    student(teacher, "sp", "--split-seed", "3", "--out", "run")
    assert metrics_of(Path("run"))[-1]["train/sp"] > 0


def test_several_teachers_are_averaged_in_their_probabilities_and_compared_one_by_one(teacher, capsys):
    plain = str(Path(teacher).parent / "plain")
    student(teacher, "kd", "--out", "one")
    distil("--student", "resnet8", "--teacher", teacher, plain, "--trust-code", *FEW, "kd", "--out", "two")
    assert capsys.readouterr().out.count("│ teacher ") == 1 + 2
    summary = json.loads(Path("two/summary.json").read_text())
    assert [member["folder"] for member in summary["teachers"]] == [teacher, plain]
    assert all(0 <= member["agreement"] <= 100 for member in summary["teachers"])
    data = load_data(DataConfig(source="synthetic", classes=4, val_fraction=0.8))
    both = load_teachers([Path(teacher), Path(plain)], data, torch.device("cpu"), trust_code=True)
    image = torch.randn(6, 3, *data.size)
    mean = sum(member.network(image).softmax(1) for member in both.members) / 2
    torch.testing.assert_close(both.network(image).softmax(1), mean)
    with pytest.raises(UserError, match="--teacher-layers: there are networks"):
        distil("--student", "resnet8", "--teacher", teacher, plain, "--trust-code", *FEW, "sp", "--out", "three")
    assert not Path("three").exists()


def test_agreement_and_accuracies_are_those_of_the_saved_networks(teacher):
    plain = str(Path(teacher).parent / "plain")
    quick = ["--classes", "4", "--val-fraction", "0.8", "--batch-size", "40", "--lr", "0.05", "--epochs", "3"]
    distil("--student", "resnet8", "--teacher", teacher, plain, "--trust-code", *quick, "kd", "--out", "run")
    summary = json.loads(Path("run/summary.json").read_text())
    data = load_data(DataConfig(source="synthetic", classes=4, val_fraction=0.8))
    student, *teachers = (
        predict_logits(kd.load(folder, trust_code=True), data.test, data, Accelerator(cpu=True), 40)
        for folder in ("run", teacher, plain)
    )
    joint = sum(logits.softmax(1) for logits in teachers) / 2
    percent = lambda logits, classes: 100 * (logits.argmax(1) == classes).double().mean().item()  # noqa: E731
    accuracies = [percent(logits, data.test.labels) for logits in (student, joint, *teachers)]
    agreements = [percent(logits, student.argmax(1)) for logits in (joint, *teachers)]
    members = summary["teachers"]
    found = [summary["test_top1"], summary["teacher_test_top1"], *(member["test_top1"] for member in members)]
    assert found == accuracies
    assert [summary["agreement"], *(member["agreement"] for member in members)] == agreements
    assert agreements[1] != agreements[2]
    assert max(agreements) < 100


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (["at", "--student-layers", "layer3", "layer3"], "--student-layers: names layer3 twice; name each layer once"),
        (["reviewkd", "--teacher-layers", "layer2", "layer2"], "--teacher-layers: names layer2 twice"),
        (["ofa", "--student-layers", "layer2", "layer2"], "--student-layers: names layer2 twice"),
        (["--batch-size", "1", "rkd"], "rkd compares images with each other, and --batch-size 1 is one at a time"),
        (["--batch-size", "50", "--accumulate", "50", "kd+sp"], r"and --batch-size 50 in 50 parts is one at a time"),
        (["--classes", "2", "kd", "--standardize"], "--standardize: with two classes every standardised logit is 0.71"),
        (["--classes", "2", "kd+at", "--kd-standardize"], "--kd-standardize: with .*; give --no-kd-standardize"),
    ],
)
def test_what_would_teach_nothing_is_refused_before_the_teacher_is_trained(method, words):
    with pytest.raises(UserError, match=words):
        distil("--student", "resnet8", "--teacher-model", "resnet8", "--no-drop-last", *method)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (["dkd"], "--ramp-epochs 20: the run has 2, so that dkd ends before its full strength\n"),
        (["kd+dkd"], "--dkd-ramp-epochs 20: the run has 2, so that dkd ends before its full strength\n"),
        (["ctkd", "--decay-epochs", "2"], ""),
    ],
)
def test_a_ramp_that_is_longer_than_the_run_is_said(teacher, capsys, method, said):
    distil("--student", "resnet8", "--teacher", teacher, *FEW, "--out", "run", *method)
    printed = capsys.readouterr().out
    assert (said in printed) if said else "full strength" not in printed
