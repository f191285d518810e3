"""Faults that belong to no one module: full disks, spikes, other processes, strangers' folders. See tests/README.md."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kd
from kd.data import Data, Split
from kd.errors import Preempted, UserError, exit_code
from kd.report.__main__ import main as report
from kd.runs import checkpoint, results
from kd.teachers.cache import LogitStore
from kd.training.evaluate import predict_logits
from kd.training.meter import Meter
from kd.training.trainer import Trainer
from kd.types import Step
from kd.utils import files
from tests.conftest import ROOT
from tests.data.test_dataset import parquet, picture
from tests.run_scripts import differences, distil, script, teach, torchrun
from tests.training.test_resume import half_a_run


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 128 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed test may hold a file there


def rewrite_state(saved: Path, change) -> None:
    """Change state.json of the newest checkpoint, and its sha256 with it."""
    folder = saved / f"step-{checkpoint.steps(saved)[0]}"
    content = json.loads((folder / "state.json").read_text())
    change(content["state"])
    (folder / "state.json").write_text(json.dumps(content))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = files.sha256_file(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_row_5_what_a_kill_left_of_another_step_is_removed(monkeypatch):
    saved = half_a_run(monkeypatch)
    (saved / ".partial-29").mkdir()
    (saved / ".partial-29/model.safetensors").write_bytes(b"half")
    teach("--out", "run", "--save-every", "7", "--resume")
    assert not list(Path("run").glob("**/*partial*"))


def test_row_13_another_number_of_processes_needs_a_flag_and_is_said_aloud(monkeypatch, capsys):
    teach("--out", "whole", "--save-every", "7")
    saved = half_a_run(monkeypatch)

    def two(state):
        state["processes"] = 2
        state["sums"]["rows"] = [[number / 2 for number in state["sums"]["rows"][0]]] * 2

    rewrite_state(saved, two)
    with pytest.raises(UserError, match=r"was trained with 2 processes, and this launch has 1.*--resume-inexact"):
        teach("--out", "run", "--save-every", "7", "--resume")
    teach("--out", "run", "--save-every", "7", "--resume", "--resume-inexact")
    assert (
        "continues from step 28 with 1 processes instead of 2; not bit-exact; the global batch stays 50"
        in capsys.readouterr().out
    )
    # Here the second process is made up, so that nothing but the record differs: its sums were not lost.
    assert differences(Path("whole"), Path("run")) == ["processes"]
    assert json.loads(Path("run/summary.json").read_text())["processes"] == [2, 1]


@pytest.mark.slow
def test_row_13_two_processes_go_on_as_one():
    args = ["--model", "tests.networks:plain", "--data", "synthetic", "--batch-size", "50", "--epochs", "2"]
    args += ["--lr", "0.05", "--out", "run", "--save-every", "5"]
    cpu = {"ACCELERATE_USE_CPU": "true"}
    script("tests/faults.py", "kill:24", str(ROOT / "train_teacher.py"), *args, env=cpu, launcher=torchrun(2))
    done = script("train_teacher.py", *args, "--resume", "--resume-inexact")
    assert done.returncode == 0, done.stderr
    assert "with 1 processes instead of 2; not bit-exact" in done.stdout
    whole = script("train_teacher.py", *args[:-4], "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    ours, theirs = (json.loads(Path(name, "summary.json").read_text()) for name in ("run", "whole"))
    assert ours["val_top1_last"] == pytest.approx(theirs["val_top1_last"], abs=1.0)


class Share(Accelerator):
    """One of several processes, without the others: `reduce` gives its own part back."""

    def __init__(self, number: int, processes: int):
        self.numbers = number, processes

    num_processes = property(lambda self: self.numbers[1])
    process_index = property(lambda self: self.numbers[0])
    device = property(lambda self: torch.device("cpu"))

    def reduce(self, tensor, reduction="mean", scale=1.0):
        return tensor

    def autocast(self, autocast_handler=None):
        return torch.autocast("cpu", enabled=False)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(1, 5))
def test_row_25_every_row_is_scored_by_exactly_one_process(rows, batch, processes):
    """Each row's logits say which row it is: the sum over processes shows one that is missing or counted twice."""
    images = torch.arange(rows, dtype=torch.uint8)[:, None, None, None].expand(rows, 3, 2, 2).contiguous()
    split = Split(images, torch.zeros(rows, dtype=torch.long))
    data = Data(split, None, split, ("a", "b"), (0.0,) * 3, (1.0,) * 3, "", (2, 2))
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    nn.init.constant_(network[1].weight, 255 / 12)
    nn.init.constant_(network[1].bias, 1.0)
    parts = [predict_logits(network, split, data, Share(number, processes), batch) for number in range(processes)]
    torch.testing.assert_close(sum(parts), (torch.arange(rows) + 1.0)[:, None].expand(rows, 2))


def test_row_26_a_last_batch_of_one_is_dropped():
    """900 rows in batches of 31: one would be left over, which BatchNorm cannot train on."""
    teach("--out", "run", "--batch-size", "31", "--epochs", "1")
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 900 // 31
    assert 900 % 31 == 1


def test_row_28_a_finite_spike_is_warned_of_and_never_skipped(monkeypatch, capsys):
    teach("--out", "quiet")
    assert "the loss jumped" not in capsys.readouterr().out
    real = Trainer.record

    def step(self, result, batch):
        scale = 1000.0 if self.state.step == 27 else 1.0
        real(self, result._replace(terms={name: term * scale for name, term in result.terms.items()}), batch)

    monkeypatch.setattr(Trainer, "record", step)
    teach("--out", "run")
    assert capsys.readouterr().out.count("step 27: the loss jumped to ") == 1
    weights = [files.read_weights(Path(run, "model.safetensors")) for run in ("run", "quiet")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_row_28_neither_a_start_nor_a_fall_is_a_spike():
    meter, accelerator = Meter(torch.device("cpu")), Accelerator(cpu=True)
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    for number, loss in enumerate([5.0, *[1.0] * 60, 9.0, 0.001, float("inf")]):
        meter.update(Step(logits, {"ce": torch.tensor(loss)}, {}), labels, torch.tensor(number))
        meter.read(accelerator)
        assert meter.spike is None
    meter.update(Step(logits, {"ce": torch.tensor(30.0)}, {}), labels, torch.tensor(99))
    meter.read(accelerator)
    assert meter.spike is not None
    assert meter.spike[:2] == (99, 30)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "model.safetensors", "curves.png", "summary.json"])
def test_row_32_a_disk_that_fills_up_at_any_file_is_one_line_and_nothing_is_lost(monkeypatch, capsys, name):
    whole = Path("whole")
    teach("--out", "whole", "--epochs", "1")
    real = files.sync_file

    def full(path):
        if path.name == f".{name}.partial" and path.parent.name == "run":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_file", full)
        assert exit_code(lambda: teach("--out", "run", "--epochs", "1"), "") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"run/{name}" in said or (name == "config.json" and "cannot write to run" in said)
    assert "No space left on device" in said
    assert not list(Path("run").glob(".*partial*"))
    teach("--out", "run", "--epochs", "1", "--auto-resume")
    assert differences(whole, Path("run")) == []


def test_row_32_a_memory_map_takes_its_room_at_once(small_disk):
    """Written where there is no room, it would end the process with SIGBUS."""
    with pytest.raises(OSError, match="No space left on device") as error:
        files.create_map(small_disk / "logits.npy", np.dtype(np.float32), (1000, 100))
    assert error.value.filename == str(small_disk / "logits.npy")


def test_row_32_a_weights_file_on_a_really_full_disk_keeps_the_old_one(small_disk):
    path = small_disk / "model.safetensors"
    files.write_weights(path, {"a": torch.zeros(10)})
    with pytest.raises(OSError, match="No space left") as error:
        files.write_weights(path, {"a": torch.ones(100_000)})
    assert error.value.errno == errno.ENOSPC
    assert torch.equal(files.read_weights(path)["a"], torch.zeros(10))
    assert [entry.name for entry in small_disk.iterdir()] == ["model.safetensors"]


def test_row_36_asked_to_stop_while_answers_are_kept_it_goes_on_from_there(monkeypatch):
    cached = ["--cache-teacher", "--views", "3", "--epochs", "1", "--out", "run"]
    real, count = LogitStore.write, 0

    def write(self, *args):
        nonlocal count
        count += 1
        if count == 20:
            signal.raise_signal(signal.SIGTERM)
        real(self, *args)

    monkeypatch.setattr(LogitStore, "write", write)
    with pytest.raises(Preempted, match=r"1 of 3 views of the teacher's logits in.*the same command continues"):
        distil(*cached)
    distil(*cached)
    assert count == 20 + 2 * 18, "the first view is not computed again"


def test_row_37_a_second_ctrl_c_stops_at_once(monkeypatch):
    real = Trainer.record

    def step(self, *args):
        real(self, *args)
        if self.state.step == 20:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "record", step)
        teach("--out", "run")
    assert checkpoint.steps(Path("run/checkpoint")) == [18, 0], "nothing was saved any more"
    teach("--out", "whole")
    teach("--out", "run", "--resume")
    assert differences(Path("whole"), Path("run")) == []


def test_row_39_parameters_without_gradient_under_data_parallelism_are_one_line(capsys):
    def work():
        raise RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one.")

    assert exit_code(work, "") == 2
    assert "requires_grad_(False)" in capsys.readouterr().err


@pytest.mark.slow
def test_row_39_a_network_with_an_idle_part_is_answered_on_two_processes():
    args = ["--model", "tests.networks:idle", "--data", "synthetic", "--epochs", "1", "--out", "run"]
    done = script("train_teacher.py", *args, env={"ACCELERATE_USE_CPU": "true"}, launcher=torchrun(2))
    assert "error: some parameters got no gradient" in done.stderr


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--out", "run", "--model", "resnet8", "--epochs", "1")
    return folder / "run"


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "summary.json", "test_logits.safetensors"])
def test_row_49_nothing_of_a_strangers_is_unpickled(finished, name):
    shutil.copytree(finished, "stranger")
    path, summary = Path("stranger", name), json.loads((finished / "summary.json").read_text())
    path.write_bytes(pickle.dumps(Bomb()))
    if name == "model.safetensors":  # whose hash fits, as a stranger's would
        Path("stranger/summary.json").write_text(json.dumps(summary | {"weights_sha256": files.sha256_file(path)}))
    with pytest.raises(UserError, match=f"{name}: |{name} "):
        results.read_test_logits(Path("stranger"), summary) if name.startswith("test") else kd.load("stranger")
    report(["stranger", "--out", "told"])
    assert not Path("exploded").exists()


def test_row_49_no_checkpoint_of_a_strangers_is_unpickled(finished):
    shutil.copytree(finished, "stranger")
    Path("stranger/summary.json").unlink()
    saved = Path("stranger/checkpoint")
    optimizer = saved / f"step-{checkpoint.steps(saved)[0]}/optimizer.safetensors"
    optimizer.write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((optimizer.parent / "manifest.json").read_text())
    rehashed = manifest | {optimizer.name: files.sha256_file(optimizer)}
    (optimizer.parent / "manifest.json").write_text(json.dumps(rehashed))
    with pytest.raises(UserError, match=r"optimizer.safetensors: cannot be read"):
        teach("--out", "stranger", "--model", "resnet8", "--epochs", "1", "--resume")
    for part in saved.glob("*/*"):
        part.write_bytes(pickle.dumps(Bomb()))
    every = pytest.raises(UserError, match="every checkpoint in stranger/checkpoint is damaged")
    with pytest.warns(UserWarning, match="is damaged"), every:
        teach("--out", "stranger", "--model", "resnet8", "--epochs", "1", "--resume")
    assert not Path("exploded").exists()


def test_row_24_weights_that_lack_one_are_not_loaded(finished):
    """With a hash that fits, as of a network whose author has added a layer since."""
    shutil.copytree(finished, "changed")
    path, summary = Path("changed/model.safetensors"), json.loads((finished / "summary.json").read_text())
    weights = files.read_tensors(path)
    weights.pop("fc.bias")
    files.write_weights(path, weights)
    Path("changed/summary.json").write_text(json.dumps(summary | {"weights_sha256": files.sha256_file(path)}))
    with pytest.raises(UserError, match=r"does not fit the network: of its \d+ tensors, 1 missing \(fc.bias\)"):
        kd.load("changed")


def test_row_49_a_strangers_function_is_not_even_imported(finished, tmp_path):
    shutil.copytree(finished, "stranger")
    info = json.loads(Path("stranger/model.json").read_text())
    Path("stranger/model.json").write_text(json.dumps(info | {"model": "strangers_code:build"}))
    (tmp_path / "strangers_code.py").write_text("import os; os.mkdir('exploded')")
    with pytest.raises(UserError, match="trust_code=True"):
        kd.load("stranger")
    report(["stranger", "--out", "told"])
    assert not Path("exploded").exists()


def test_row_49_an_answers_file_of_objects_is_refused(tmp_path):
    identity = {"views": {"count": 1}, "rows": 2, "classes": 3, "top_k": None, "dtype": "float32"}
    store = LogitStore(tmp_path, identity)
    np.save(tmp_path / "logits.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"logits.npy: cannot be read"):
        store.open("logits", "r")
    with pytest.raises(UserError, match=r"logits.npy: cannot be read"):
        files.read_array(tmp_path / "logits.npy")  # labels are read so, at once
    for content in (b"", pickle.dumps(Bomb())):
        (tmp_path / "logits.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"logits.npy: cannot be read"):
            store.open("logits", "r")
    assert not Path("exploded").exists()


def test_row_50_odd_names_are_shown_literally_and_lead_nowhere(tmp_path, capfd):
    names = ["../../above", "[red]loud[/red]", "$(touch exploded)", "<script>alert(1)</script>"]
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=names)})
    rows = {"img": [picture(n) for n in range(16)], "label": [0, 1, 2, 3] * 4}
    work = tmp_path / "a/b/work"
    work.mkdir(parents=True)
    os.chdir(work)
    source = parquet(work / "set;touch exploded", rows, features)
    out = "runs/[bold]$(touch exploded);<b>x</b>"
    teach("--data", source, "--val-fraction", "0.25", "--batch-size", "4", "--epochs", "1", "--out", out)
    report([out, "--out", "told", "--trust-code"])
    assert f"run folder: {out}" in capfd.readouterr().out
    assert json.loads(Path(out, "model.json").read_text())["classes"] == names
    page = Path("told/report.html").read_text()
    assert "<script>alert" not in page
    assert "<b>x</b>" not in page
    assert sorted(entry.name for entry in work.iterdir()) == ["runs", "set;touch exploded", "told"]
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["b"]


def test_a_cache_for_a_method_without_a_teacher_is_said(capsys):
    distil("--cache-teacher", "--views", "2", "--epochs", "1", "tfkd")
    assert "tfkd has no teacher: --cache-teacher does nothing" in capsys.readouterr().out


def test_row_22_simkd_refuses_a_teacher_whose_classes_had_to_be_matched(finished):
    def rename(order):
        info = json.loads(Path("teacher/model.json").read_text())
        Path("teacher/model.json").write_text(json.dumps(info | {"classes": [info["classes"][n] for n in order]}))

    shutil.copytree(finished, "teacher")
    rename([1, 0, *range(2, 10)])
    student = ["--student", "resnet8", "--teacher", "teacher", "--epochs", "1"]
    with pytest.raises(UserError, match=r"simkd: .* in another order than the data's"):
        distil(*student, "simkd")
    with pytest.raises(
        UserError, match="simkd: reuses the teacher's classifier over its 10 classes, and the data has 4"
    ):
        distil(*student, "--classes", "4", "simkd")


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 5])  # on one process; on two
def test_row_1_row_2_row_3_row_4_row_5_random_kills_are_survived(number):
    command = [sys.executable, "-m", "tests.crash", "--seed", "5", "--only", str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kills = re.search(r"(\d+) kills survived in 1 runs", done.stdout)
    assert kills, done.stdout
    assert int(kills[1]) >= 1


@pytest.mark.slow
def test_the_crash_test_sees_what_a_checkpoint_forgets():
    """Momentum is left out of what is restored: it must go red, and say how to see it again."""
    forgetful = "import sys; from kd.runs import checkpoint; from tests import crash; real = checkpoint.restore\n"
    forgetful += "def restore(folder, module, optimizer):\n    found = real(folder, module, optimizer)\n"
    forgetful += "    optimizer.state.clear()\n    return found\n"
    forgetful += "checkpoint.restore = restore; sys.exit(crash.main(['--seed', '5', '--minutes', '2']))"
    done = subprocess.run([sys.executable, "-c", forgetful], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    # A kill after the last step leaves the weights right, and only the momentum itself differs.
    assert re.search(r"differs in (model|optimizer)\.safetensors", done.stderr)
    assert "again: python -m tests.crash --seed 5 --only" in done.stderr
