"""--push-to: what is uploaded when, and that a failure stops nothing."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.errors import UserError
from kd.runs.folder import RunFolder
from kd.training import push
from tests.hub_server import hub
from tests.run_scripts import TEACHER, distil, metrics_of, script, teach


@pytest.fixture
def uploads(monkeypatch):
    """What would be uploaded, by the commit's message: the files' bytes."""
    sent = {}

    def upload(folder: Path, name: str, message: str) -> str:
        sent[message] = {path.name: path.read_bytes() for path in folder.iterdir()}
        return f"hub/{name}"

    monkeypatch.setattr(push, "upload", upload)
    return sent


def test_the_weights_of_every_nth_epoch_and_the_finished_run_are_uploaded(uploads, capsys):
    teach("--epochs", "4", "--out", "run", "--push-to", "me/net", "--push-every", "2")
    assert list(uploads) == ["kd: epoch 2", "kd: the finished run"]
    assert "pushed the finished run: hub/me/net" in capsys.readouterr().out
    last = uploads["kd: the finished run"]
    for name in ("model.safetensors", "best.safetensors", "model.json", "summary.json", "metrics.jsonl"):
        assert last[name] == Path("run", name).read_bytes()
    early = uploads["kd: epoch 2"]
    assert early["model.json"] == last["model.json"]
    assert early["model.safetensors"] != last["model.safetensors"]
    assert early.keys() == {"model.safetensors", "model.json", "config.json", "metrics.jsonl", "README.md"}
    assert [json.loads(line)["epoch"] for line in early["metrics.jsonl"].decode().splitlines()] == [1, 2]
    assert "kd.load('me/net', trust_code=True)" in last["README.md"].decode()
    assert "kd.load('" not in early["README.md"].decode(), "without a summary it is no finished run"


@pytest.mark.parametrize(
    ("role", "split", "words"),
    [
        ("teacher", "test", ("trained on", "Test top-1 50.00%")),
        ("none", "validation", ("trained alone on", "Validation top-1 50.00%")),
        ("kd", "test", ("distilled (kd) on", "Test top-1 50.00%")),
    ],
)
def test_the_card_says_how_it_was_trained_and_on_which_split_it_was_scored(uploads, tmp_path, role, split, words):
    (tmp_path / "summary.json").write_text(json.dumps({"test_top1": 50.0, "test_split": split}))
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"data": {"source": "synthetic"}, "method": {}}}))
    config = parse(distill_defaults, "", ["--push-to", "me/net", *([] if role == "teacher" else [role])])
    job = config.teacher_job() if role == "teacher" else config.job()
    job = dataclasses.replace(job, run=config.run)
    push.push_run(job, RunFolder(tmp_path, {}))
    card = uploads["kd: the finished run"]["README.md"].decode()
    assert all(word in card for word in words), card


def test_an_epochs_upload_leaves_no_summary_of_an_earlier_run():
    old = dict.fromkeys(("summary.json", "best.safetensors", "notes.txt"), b"old")
    with hub({"me/net": dict(old)}) as server:
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(Path.cwd()),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_right",
        }
        Path("early").mkdir()
        for name in ("model.safetensors", "model.json", "README.md"):
            Path("early", name).write_text("new")
        code = (
            "from pathlib import Path\nfrom kd.utils.hub import upload\nupload(Path('early'), 'me/net', 'kd: epoch 2')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **settings}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert server.files["me/net"].keys() == {"model.safetensors", "model.json", "README.md", "notes.txt"}


def test_no_path_of_this_machine_is_uploaded(uploads, tmp_path):
    teach("--epochs", "1", "--out", str(tmp_path / "teacher"))
    known = ["--teacher", str(tmp_path / "teacher"), "--trust-code", "--control", "--out", str(tmp_path / "run")]
    distil(*known, "--epochs", "2", "--push-to", "me/net", "--push-every", "1")
    assert list(uploads) == ["kd: epoch 1", "kd: the finished run"]
    for files in uploads.values():
        for name, content in files.items():
            assert str(tmp_path).encode() not in content, name
    assert json.loads(uploads["kd: the finished run"]["summary.json"])["teacher"] == "teacher"


def test_the_weights_of_an_epoch_are_that_epochs(uploads, tmp_path):
    """A run of two epochs, constant learning rate, ends in what the longer one uploads after its second."""
    constant = ["--schedule", "constant"]
    teach("--epochs", "3", "--out", "long", "--push-to", "me/net", "--push-every", "2", *constant)
    teach("--epochs", "2", "--out", "short", *constant)
    (tmp_path / "early.safetensors").write_bytes(uploads["kd: epoch 2"]["model.safetensors"])
    early, short = load_file(tmp_path / "early.safetensors"), load_file("short/model.safetensors")
    assert all(early[name].equal(short[name]) for name in short)


def test_a_failed_upload_is_one_line_and_the_same_command_tries_again(monkeypatch, uploads, capsys):
    def fails(*_):
        raise ConnectionError("no network\nat all")

    works = push.upload
    monkeypatch.setattr(push, "upload", fails)
    teach("--out", "run", "--push-to", "me/net", "--push-every", "1")
    lines = [line for line in capsys.readouterr().out.splitlines() if "--push-to" in line]
    assert [line.split(" was not uploaded")[0] for line in lines] == [
        "--push-to me/net: epoch 1",
        "--push-to me/net: the finished run",
    ]
    assert "the same command tries again" in lines[1]
    teach("--out", "quiet")
    assert metrics_of(Path("run")) == metrics_of(Path("quiet"))
    monkeypatch.setattr(push, "upload", works)
    teach("--out", "run", "--push-to", "me/net", "--push-every", "1")
    assert list(uploads) == ["kd: the finished run"]


def test_a_full_disk_stops_no_training(monkeypatch, uploads, capsys, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(push, "write_weights", full)
    teach("--out", "run", "--push-to", "me/net", "--push-every", "1")
    assert "epoch 1 was not uploaded" in capsys.readouterr().out
    assert list(uploads) == ["kd: the finished run"]
    assert not list(tmp_path.glob("kd-push-*"))


def test_only_the_network_that_was_asked_for_is_pushed():
    config = parse(distill_defaults, "", ["--push-to", "me/net", "--push-every", "3"])
    assert (config.job().run.push_to, config.job().run.push_every) == ("me/net", 3)
    for job in (config.teacher_job(), config.control_job()):
        assert (job.run.push_to, job.run.push_every) == (None, 0)


@pytest.mark.parametrize(
    "args", [["--push-to", "net"], ["--push-every", "2"], ["--push-to", "a/b", "--push-every", "-1"]]
)
def test_a_wrong_name_is_refused_before_training(args):
    with pytest.raises(UserError, match="--push-"):
        parse(distill_defaults, "", args)


@pytest.mark.slow
def test_a_pushed_run_is_loaded_from_the_hub(tmp_path):
    with hub({}) as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_right"}
        out = script(
            "train_teacher.py", *TEACHER, "--out", "run", "--push-to", "me/net", "--wandb", "disabled", env=settings
        )
        assert f"pushed the finished run: {server.url}/me/net" in out.stdout, out.stdout + out.stderr
        load = [sys.executable, "-c", "import kd; print(sum(p.numel() for p in kd.load('me/net', True).parameters()))"]
        loaded = subprocess.run(load, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)
    assert loaded.returncode == 0, loaded.stderr
    assert int(loaded.stdout) == json.loads(Path("run/summary.json").read_text())["params"]
