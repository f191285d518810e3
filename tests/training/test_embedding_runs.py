"""embed through the real script: it resumes and repeats to the same bytes, and what it deploys starts a classifier."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kd
from kd.errors import UserError
from kd.export.__main__ import export, parse
from kd.export.onnx_runtime import OnnxFile
from tests.losses.test_methods import quick  # noqa: F401  the fixture: no curves, no waiting for the disk
from tests.run_scripts import differences, distil, metrics_of, newest_checkpoint, script, teach, torchrun
from tests.training.test_distributed import CPU
from tests.training.test_resume import Killed, die_at

FLAGS = [
    "--student",
    "resnet8",
    "--crop-padding",
    "2",
    "--resized-crop",
    "0",
    "--warmup-epochs",
    "0",
    "--save-every",
    "1",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--model", "resnet14", "--epochs", "1", "--out", "t")
    return str(folder / "t")


def embed(teacher: str, *args: str) -> None:
    distil(*FLAGS, "--teacher", teacher, *args, "embed", "--queue", "200")


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        embed(teacher, "--out", "e")
    return folder / "e"


def test_row_4_a_queue_of_embeddings_resumes_to_the_same_bytes(teacher, whole, monkeypatch):
    steps = metrics_of(whole)[0]["step"]
    for step in (2, steps, steps + 3):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(patch, step)
            embed(teacher, "--out", f"run{step}")
        embed(teacher, "--out", f"run{step}", "--resume")
        assert differences(whole, Path(f"run{step}")) == []
    saved = load_file(newest_checkpoint(whole) / "model.safetensors")
    assert saved["loss.queue"].shape == (200, 64)
    assert int(saved["loss.pushed"]) == 2 * steps * 50


def test_row_21_a_student_of_kept_embeddings_has_the_bytes_of_one_of_a_live_teacher(teacher):
    embed(teacher, "--views", "2", "--out", "live")
    embed(teacher, "--views", "2", "--cache-teacher", "--cache-dtype", "float32", "--out", "kept")
    assert differences(Path("live"), Path("kept")) == []


def test_what_is_deployed_has_no_head_and_no_classes(whole):
    info, summary = (json.loads((whole / f"{name}.json").read_text()) for name in ("model", "summary"))
    assert (info["num_classes"], info["classes"], info["embedding"]) == (0, [], 64)
    assert (summary["embedding"], summary["test_top1"], summary["labelled"]) == (64, None, False)
    assert not any(key.startswith(("fc", "loss", "head")) for key in load_file(whole / "model.safetensors"))
    line = metrics_of(whole)[-1]
    assert {"train/embed", "train/cosine", "val/loss", "val/cosine"} <= line.keys()
    assert "train/top1" not in line
    assert line["train/cosine"] > metrics_of(whole)[0]["train/cosine"]
    assert kd.load(whole).embedding(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 64)


def test_it_starts_a_classifier_all_but_the_last_layer(whole, capsys):
    teach("--model", "resnet8", "--init", str(whole), "--epochs", "1", "--freeze", "conv1", "layer1", "--out", "c")
    assert "a new last layer fc for 10 classes, its weights have none" in capsys.readouterr().out
    ours, theirs = load_file("c/model.safetensors"), load_file(whole / "model.safetensors")
    assert {key.partition(".")[0] for key in ours.keys() - theirs.keys()} == {"fc"}
    assert torch.equal(ours["conv1.weight"], theirs["conv1.weight"])
    distil("--student", "resnet8", "--init", str(whole), "--teacher", "c", "--epochs", "1", "--out", "s", "kd")
    assert json.loads(Path("s/summary.json").read_text())["test_top1"] > 0


def test_a_classifier_starts_an_embedder_without_its_last_layer(teacher, whole, capsys):
    teach("--model", "resnet8", "--epochs", "1", "--out", "c")
    embed(teacher, "--init", "c", "--epochs", "1", "--freeze", "conv1", "--out", "e")
    assert "--init c: its last layer fc is left out; embed trains none" in capsys.readouterr().out
    ours, theirs = load_file("e/model.safetensors"), load_file("c/model.safetensors")
    assert torch.equal(ours["conv1.weight"], theirs["conv1.weight"])
    embed(teacher, "--init", "e", "--epochs", "1", "--out", "again")
    assert "left out" not in capsys.readouterr().out
    assert json.loads(Path("again/model.json").read_text())["embedding"] == 64


def test_an_embedder_is_exported_and_answers_as_its_network(whole, capsys):
    pytest.importorskip("onnxruntime")
    folder = export(parse([str(whole), "--formats", "safetensors", "onnx", "pt2"]))
    out = capsys.readouterr().out
    assert out.count("embeddings have a cosine similarity of at least 0.99") == 2
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    network, file = kd.load(folder), OnnxFile(folder / "model.onnx")
    torch.testing.assert_close(torch.from_numpy(file(images.numpy())), network.embedding(images), rtol=1e-3, atol=1e-4)
    assert (file.preprocessing["output"], file.preprocessing["embedding"]) == ("embedding", 64)
    card = (folder / "README.md").read_text()
    assert "An image embedder of 77,392 parameters" in card
    assert "image-feature-extraction" in card
    assert "predicts one of the classes" not in card
    with pytest.raises(
        UserError, match=r"^--formats int8: its check compares predicted classes, and .* is an embedder"
    ):
        export(parse([str(whole), "--formats", "int8"]))


def test_predict_of_an_embedder_says_what_it_has_instead(whole):
    from kd.predict import open_predictor

    with pytest.raises(UserError, match=r"is an embedder and predicts no classes; kd.load\(RUN\).embedding"):
        open_predictor(str(whole))


def test_patches_run_beside_a_live_teacher_alone(teacher, capsys):
    flags = [*FLAGS, "--teacher", teacher, "--views", "2", "--cache-teacher", "--epochs", "1", "--out", "p"]
    distil(*flags, "embed", "--patches", "0.5", "--form", "cosine")
    assert "embed needs features, which --cache-teacher does not store" in capsys.readouterr().out
    assert metrics_of(Path("p"))[-1]["train/patches"] > 0


@pytest.mark.slow
def test_row_25_two_processes_embed_as_one_does(teacher):
    flags = ["--data", "synthetic", "--batch-size", "50", "--epochs", "2", "--student", "tests.networks:plain"]
    flags += ["--teacher", teacher, "--wandb", "disabled", "--threads", "1", "embed"]
    two = script("distill_student.py", "--out", "two", *flags, env=CPU, launcher=torchrun(2))
    assert two.returncode == 0, two.stderr
    one = script("distill_student.py", "--out", "one", *flags)
    assert one.returncode == 0, one.stderr
    for line, other in zip(metrics_of(Path("one")), metrics_of(Path("two")), strict=True):
        assert line == pytest.approx(other, rel=1e-3)
