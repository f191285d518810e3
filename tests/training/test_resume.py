"""A run that is stopped anywhere and resumed ends in the same bytes as one that never was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import distill_student
import kd
from kd.errors import Preempted, UserError
from kd.runs import checkpoint
from kd.runs.checkpoint import State
from kd.runs.folder import _processors, _tell_machine
from kd.training.trainer import Trainer
from kd.utils import files
from kd.utils.system import Lock
from tests.conftest import ROOT
from tests.run_scripts import STUDENT, differences, distil, newest_checkpoint, script, teach

STEPS = 36  # two epochs of the synthetic set's 900 training images in batches of 50


class Killed(BaseException):
    """Ends a run as abruptly as a process can be ended from inside."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The student's run that nothing ever disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        distil("--out", "run")
    return folder


@pytest.fixture(scope="module")
def whole_teacher(tmp_path_factory):
    """The same of a teacher's."""
    folder = tmp_path_factory.mktemp("teacher")
    teach("--out", str(folder / "run"))
    return folder / "run"


@pytest.fixture
def beside(whole, tmp_path):
    """Its finished teacher, so that a test trains the student alone."""
    shutil.copytree(whole / "runs", tmp_path / "runs")
    return whole / "run"


def die_at(monkeypatch, when: int, where: str = "record") -> None:
    """Raise once, at the `when`-th call of a method of the trainer."""
    real, count = getattr(Trainer, where), 0

    def deadly(self, *args):
        nonlocal count
        count += 1
        if count == when:
            raise Killed
        return real(self, *args)

    monkeypatch.setattr(Trainer, where, deadly)


def differs_when_killed(monkeypatch, run, at: int) -> list[str]:
    """What differs between `run(*flags)` undisturbed and killed at its step `at`, then resumed."""
    run("--out", "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, at)
        run("--out", "run", "--save-every", "1")
    run("--out", "run", "--resume")
    return differences(Path("whole"), Path("run"))


@pytest.mark.parametrize("step", [1, 2, 17, 18, 19, 29, 36])
@pytest.mark.parametrize("save_every", ["0", "7"])
def test_row_1_row_2_killed_at_a_step(beside, monkeypatch, step, save_every):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, step)
        distil("--out", "run", "--save-every", save_every)
    distil("--out", "run", "--save-every", save_every, "--resume")
    assert differences(beside, Path("run")) == []


@pytest.mark.parametrize("save_every", ["0", "18"])  # 18: a checkpoint between an epoch's last step and its validation
def test_row_2_killed_during_validation(beside, monkeypatch, save_every):
    def dead(*args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("kd.training.trainer.validate", dead)
        distil("--out", "run", "--save-every", save_every)
    distil("--out", "run", "--save-every", save_every, "--resume")
    assert differences(beside, Path("run")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "views",
    [
        ["--policy", "trivial", "--alternating-flip"],
        ["--policy", "rand", "--resized-crop", "0.3", "--hue", "0.1", "--grey", "0.2", "--blur", "0.5"],
        ["--policy", "augmix", "--vertical-flip", "--mixup", "1", "--mix-off-epochs", "1"],
    ],
    ids=lambda views: views[1],
)
def test_row_1_killed_in_an_epoch_of_augmented_views(monkeypatch, views):
    def run(*args: str) -> None:
        teach(*views, *args)

    assert differs_when_killed(monkeypatch, run, 23) == []


def test_row_2_killed_after_the_last_step_before_the_summary(beside, monkeypatch):
    def dead(*args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("kd.training.summary.draw_curves", dead)
        distil("--out", "run")
    assert not Path("run/summary.json").exists()
    distil("--out", "run", "--resume")
    assert differences(beside, Path("run")) == []


@pytest.mark.slow
def test_row_1_kill_9_in_the_middle_of_an_epoch(beside):
    args = [*STUDENT, "--out", "run", "--save-every", "5", "--threads", "1"]
    killed = script("tests/faults.py", "kill:29", str(ROOT / "distill_student.py"), *args)
    assert killed.returncode == -signal.SIGKILL
    position = json.loads((newest_checkpoint(Path("run")) / "state.json").read_text())["state"]["step"]
    assert position in (20, 25), "the thread that writes may be killed too"
    resumed = script("distill_student.py", *args, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert differences(beside, Path("run")) == []


def test_a_killed_teacher_on_the_way_is_resumed_unasked(whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 20)
        distil("--out", "run")
    assert not Path("run/config.json").exists()
    distil("--out", "run")
    assert differences(whole / "run", Path("run")) == []


@pytest.mark.parametrize("forgotten", ["momentum", "position", "buffers", "sums"])
def test_the_oracle_sees_what_a_checkpoint_forgets(beside, monkeypatch, forgotten):
    """Leave something out of the checkpoint on purpose: the comparison above must go red."""
    real = checkpoint.restore

    def forgetful(folder, module, optimizer):
        fresh = {name: buffer.clone() for name, buffer in module.named_buffers()}
        state, best = real(folder, module, optimizer)
        if forgotten == "momentum":
            optimizer.state.clear()
        elif forgotten == "position":
            state.step -= 1
        elif forgotten == "buffers":
            module.load_state_dict(fresh, strict=False)
        elif forgotten == "sums":
            state.sums["rows"] = [[0.0] * len(row) for row in state.sums["rows"]]
        return state, best

    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 29)
        distil("--out", "run", "--save-every", "7")
    monkeypatch.setattr(checkpoint, "restore", forgetful)
    distil("--out", "run", "--save-every", "7", "--resume")
    assert differences(beside, Path("run")) != []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_row_36_row_37_asked_to_stop_it_saves_and_resumes_to_the_same_bytes(beside, monkeypatch, number):
    real, count = Trainer.record, 0

    def step(self, *args):
        nonlocal count
        count += 1
        if count == 10:
            signal.raise_signal(number)
        real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match=r"^step 10 in run"):
        patch.setattr(Trainer, "record", step)
        distil("--out", "run")
    distil("--out", "run", "--resume")
    assert differences(beside, Path("run")) == []


def test_the_thread_count_is_restored(beside, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 20)
        distil("--out", "run", "--threads", "2")
    torch.set_num_threads(1)
    distil("--out", "run", "--resume")
    assert torch.get_num_threads() == 1, "given back afterwards"
    assert json.loads((newest_checkpoint(Path("run")) / "state.json").read_text())["state"]["threads"] == 2


def half_a_run(monkeypatch) -> Path:
    """A teacher stopped in its second epoch, with two checkpoints."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 30)
        teach("--out", "run", "--save-every", "7")
    return Path("run/checkpoint")


def flip_a_bit(step: Path) -> None:
    content = bytearray((step / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (step / "model.safetensors").write_bytes(content)


DAMAGE = {
    "one bit": (flip_a_bit, "model.safetensors changed"),
    "truncated": (lambda step: (step / "optimizer.safetensors").write_bytes(b""), "optimizer.safetensors changed"),
    "missing": (lambda step: (step / "optimizer.safetensors").unlink(), "No such file"),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "No such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_row_6_row_7_row_8_a_damaged_checkpoint_is_passed_over_for_the_one_before(whole_teacher, monkeypatch, damage):
    saved = half_a_run(monkeypatch)
    assert checkpoint.steps(saved) == [28, 21]
    spoil, words = DAMAGE[damage]
    spoil(saved / "step-28")
    with pytest.warns(UserWarning, match=rf"step-28 is damaged \(.*{words}"):
        teach("--out", "run", "--save-every", "7", "--resume")
    assert differences(whole_teacher, Path("run")) == []


def test_row_6_every_file_of_a_checkpoint_is_hashed(monkeypatch):
    """The average is state of the training, and the best weights are what a run ends with."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 30)
        teach("--out", "run", "--save-every", "7", "--ema", "0.9")
    saved = Path("run/checkpoint/step-28")
    names = {path.name for path in saved.iterdir()} - {"manifest.json"}
    assert names >= {"model.safetensors", "optimizer.safetensors", "best.safetensors", "ema.safetensors", "state.json"}
    for name in sorted(names):
        sound = (saved / name).read_bytes()
        (saved / name).write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        assert checkpoint._fault(saved) == f"{name} changed since it was saved"
        (saved / name).write_bytes(sound)
    assert checkpoint._fault(saved) is None


@pytest.mark.parametrize("damage", DAMAGE)
def test_row_9_where_every_checkpoint_is_damaged_nothing_starts_again_silently(monkeypatch, damage):
    saved = half_a_run(monkeypatch)
    for step in saved.glob("step-*"):
        DAMAGE[damage][0](step)
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(UserError, match="every checkpoint"):
        teach("--out", "run", "--save-every", "7", "--resume")


def test_row_5_a_save_that_dies_leaves_the_checkpoint_before(whole_teacher, monkeypatch):
    real, count = checkpoint.os.rename, 0

    def rename(source, target):
        nonlocal count
        count += 1
        if count == 3:
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint.os, "rename", rename)
        teach("--out", "run", "--save-every", "7")
    assert checkpoint.steps(Path("run/checkpoint")) == [7, 0]
    teach("--out", "run", "--save-every", "7", "--resume")
    assert differences(whole_teacher, Path("run")) == []


DIES_AT_THE_RENAMING = """
import os, signal
from kd.runs import checkpoint
from tests.run_scripts import teach

def deadly(folder, real=checkpoint.sync_folder):
    if folder.name == ".partial-14":  # all files are there, and the folder is not renamed
        os.kill(os.getpid(), signal.SIGKILL)
    real(folder)

checkpoint.sync_folder = deadly
teach("--out", "run", "--save-every", "7")
"""


def test_row_5_kill_9_in_the_thread_that_saves_leaves_the_checkpoint_before(whole_teacher):
    """In a process of its own: a forked one has no threads for its backward pass."""
    killed = subprocess.run([sys.executable, "-c", DIES_AT_THE_RENAMING], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert checkpoint.steps(Path("run/checkpoint")) == [7, 0]
    teach("--out", "run", "--save-every", "7", "--resume")
    assert differences(whole_teacher, Path("run")) == []
    assert not list(Path("run/checkpoint").glob(".partial*"))


def test_training_goes_on_while_a_checkpoint_is_written(whole_teacher, monkeypatch):
    real, record, later = checkpoint.save, Trainer.record, threading.Event()

    def slow(folder, taken):
        if taken.step == 7:
            assert later.wait(20), "the training waited for this"
        real(folder, taken)

    def step(self, *args):
        record(self, *args)
        if self.state.step == 12:
            later.set()

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(Trainer, "record", step)
    teach("--out", "run", "--save-every", "7")
    assert differences(whole_teacher, Path("run")) == []


def test_what_is_written_is_what_was_when_it_was_saved(tmp_path):
    network = torch.nn.BatchNorm1d(3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    ema = {name: value.clone() for name, value in network.state_dict().items()}

    def step():
        network(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        ema["weight"].mul_(0.5)

    step()
    state = State(step=1, history=[{"epoch": 1}])
    taken = checkpoint.snapshot(state, network, optimizer, {"ema": ema})
    checkpoint.save(tmp_path / "at_once", taken)
    step()
    state.history[0]["epoch"] = 2
    checkpoint.save(tmp_path / "later", taken)
    files = [path.name for path in (tmp_path / "at_once/step-1").iterdir()]
    assert {"ema.safetensors", "optimizer.safetensors"} < set(files)
    for name in files:
        assert (tmp_path / "at_once/step-1" / name).read_bytes() == (tmp_path / "later/step-1" / name).read_bytes()


def test_a_fork_waits_for_the_thread_that_saves(tmp_path, monkeypatch):
    """A worker forked in mid-write would inherit what locks the thread holds."""
    done = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, taken: (time.sleep(0.3), done.append(taken)))
    writer = checkpoint.Writer(tmp_path)
    writer.start(checkpoint.Snapshot(1, {}, {}))
    child = os.fork()
    if not child:
        os._exit(len(done))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    writer.wait()


def test_a_fork_in_another_thread_does_not_lose_sight_of_a_newer_write(tmp_path):
    """It waits for the thread that writes; when that is done, the training may have started the next one."""
    writer, newer = checkpoint.Writer(tmp_path), threading.Thread(target=str)

    class Written:
        def join(self):
            writer._thread = newer

    writer._thread = Written()
    writer.join()
    assert writer._thread is newer


def test_row_32_a_full_disk_keeps_the_old_checkpoint(monkeypatch):
    real = files.write_weights

    def full(path, weights):
        if "step-" in str(path) or path.parent.name == ".partial-14":
            raise OSError(28, "No space left on device")
        real(path, weights)

    monkeypatch.setattr(checkpoint, "write_weights", full)
    with pytest.raises(UserError, match=r"No space left on device.*--resume"):
        teach("--out", "run", "--save-every", "7")
    assert checkpoint.steps(Path("run/checkpoint")) == [7, 0]
    assert not list(Path("run/checkpoint").glob(".partial*"))


def test_row_11_checkpoints_are_ordered_as_numbers(tmp_path):
    for step in (9, 10, 100, 2):
        (tmp_path / f"step-{step}").mkdir()
    assert checkpoint.steps(tmp_path) == [100, 10, 9, 2]


def test_row_12_other_flags_are_refused_with_their_difference(monkeypatch):
    half_a_run(monkeypatch)
    with pytest.raises(UserError, match=r"has another run \(epochs 2 there, 3 here; lr 0.05 there, 0.1 here\)"):
        teach("--out", "run", "--resume", "--lr", "0.1", "--epochs", "3")
    with pytest.raises(UserError, match=r"has another run \(.*role teacher there, tfkd here"):
        distil("--out", "run", "--resume", "tfkd")


def test_row_10_row_35_resume_needs_something_and_a_new_start_an_empty_folder(monkeypatch):
    with pytest.raises(UserError, match="--resume: run has no checkpoint"):
        teach("--out", "run", "--resume")
    half_a_run(monkeypatch)
    with pytest.raises(UserError, match="unfinished run: add --resume"):
        teach("--out", "run")
    teach("--out", "run", "--auto-resume")
    Path("other").mkdir()
    Path("other/thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"other is not a run folder \(it has thesis.tex\)"):
        teach("--out", "other")
    Path("other/thesis.tex").rename("other/.DS_Store")
    teach("--out", "other", "--epochs", "1")


def test_a_run_that_continues_on_another_machine_says_so(monkeypatch, capsys):
    run = half_a_run(monkeypatch).parent
    config = json.loads((run / "config.json").read_text())
    teach("--out", str(run), "--resume")
    assert "continues elsewhere" not in capsys.readouterr().out
    shutil.rmtree(run)
    run = half_a_run(monkeypatch).parent
    config |= {"device": "cuda:0", "versions": config["versions"] | {"torch": "2.0.1", "numpy": "1.0"}}
    files.write_json(run / "config.json", config)
    teach("--out", str(run), "--resume")
    said = capsys.readouterr().out
    assert "run: continues elsewhere (device cuda before, cpu (" in said
    assert f"; torch 2.0.1 before, {version('torch')} now); its bits will differ" in said


IDENTITY = {"role": "teacher", "model": "resnet8", "data": "x", "teacher": None}
CONFIG = {"identity": IDENTITY, "flags": {"method": {}, "data": {"source": "x"}}}


@pytest.mark.parametrize(("before", "now"), [("cpu", "cuda:1"), ("cuda:0", "mps"), ("cuda:0", "cuda:1")])
def test_a_change_of_device_is_said_whatever_it_is(before, now, capsys, tmp_path):
    there = CONFIG | {"cpu": "EPYC", "versions": {"torch": "2.13.0"}}
    files.write_json(tmp_path / "config.json", there | {"device": before})
    _tell_machine(tmp_path, there | {"device": now})
    assert ("continues elsewhere (device " in capsys.readouterr().out) == (now != "cuda:1" or before == "cpu")


def test_another_kind_of_gpu_is_said_where_both_are_known(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert "gpu" not in _processors(torch.device("cpu"))
    first, second = (_processors(torch.device("cuda", place)) | {"device": "cuda"} for place in (1, 2))
    for before, now, said in ((first, second, True), (first, first, False), ({"device": "cuda"}, first, False)):
        files.write_json(tmp_path / "config.json", CONFIG | before)
        _tell_machine(tmp_path, CONFIG | now)
        assert ("(gpu GPU 1 before, GPU 2 now)" in capsys.readouterr().out) == said


def test_row_10_auto_resume_says_that_it_starts_afresh(capsys):
    teach("--out", "run", "--auto-resume")
    assert "nothing to resume, starting afresh" in capsys.readouterr().out


def test_row_34_a_lock_does_not_outlive_its_process_in_a_worker_that_was_forked(tmp_path):
    """As it would with flock: the worker has the open file too."""
    holder = "import os, time; from kd.utils.system import Lock; from pathlib import Path; lock = Lock(Path('lock'))\n"
    holder += "lock.acquire()\nworker = os.fork()\nif worker:\n    print(worker, flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        assert not Lock(Path("lock")).acquire()
        process.kill()
        process.wait()
        os.kill(worker, 0)  # it lives on
        lock = Lock(Path("lock"))
        assert lock.acquire()
        lock.close()
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


def test_row_34_a_folder_in_use_is_refused(tmp_path):
    holder = "import time; from kd.utils.system import Lock; from pathlib import Path; Path('run').mkdir(); "
    holder += "lock = Lock(Path('run/lock')); lock.acquire(); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="run is in use by another process"):
            teach("--out", "run")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    teach("--out", "run")  # the lock died with its process


def test_row_36_asked_to_stop_while_the_last_epoch_is_scored(beside, monkeypatch):
    """Else the stop would be lost, and a teacher on the way would go on into its student's training."""
    from kd.training import evaluate

    real, count = evaluate.validate, 0

    def validate(*args):
        nonlocal count
        count += 1
        if count == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match=f"^step {STEPS} in"):
        patch.setattr("kd.training.trainer.validate", validate)
        distil("--out", "run")
    distil("--out", "run", "--resume")
    assert differences(beside, Path("run")) == []


def test_a_kill_in_the_very_first_write_leaves_the_folder_usable():
    Path("run").mkdir()
    Path("run/.config.json.partial").write_text("{")
    teach("--out", "run")
    assert Path("run/summary.json").exists()


def test_a_weights_file_that_cannot_be_written_is_an_os_error(tmp_path, monkeypatch):
    """safetensors has an error of its own for a full disk; a checkpoint must not die of it unprepared."""

    def full(tensors, path):
        raise files.SafetensorError("I/O error: no space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        files.write_weights(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    assert not list(tmp_path.glob("*safetensors*"))


def test_row_24_prefixes_of_wrappers_are_stripped_and_a_part_called_module_is_not(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_weights(path, {"module._orig_mod.a": torch.zeros(2), "module.b": torch.ones(1)})
    assert files.read_weights(path).keys() == {"a", "b"}
    files.write_weights(path, {"module.a": torch.zeros(2), "fc": torch.ones(1)})
    assert files.read_weights(path).keys() == {"module.a", "fc"}


@pytest.mark.parametrize("network", ["inside_module", "weight_normed"])
def test_a_network_keeps_its_names_whatever_they_are(network, monkeypatch):
    """One whose parts are called as wrappers are, and one that computes its weights from others."""
    flags = ["--model", f"tests.networks:{network}", "--ema", "0.9"]
    assert differs_when_killed(monkeypatch, lambda *args: teach(*flags, *args), 7) == []
    kd.load("run", trust_code=True)
    teach(*flags[:2], "--init", "run", "--epochs", "1", "--out", "again")


def test_row_33_where_nothing_can_be_written_is_said_before_a_teacher_is_trained(monkeypatch):
    monkeypatch.setattr(distill_student, "train", lambda *_: pytest.fail("trained"))
    Path("results").mkdir()
    Path("results/notes.txt").touch()
    for flags, message in (
        (["--out", "results"], r"results is not a run folder \(it has notes.txt\)"),
        (["--out", "new", "--resume"], "--resume: new has no checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            distil(*flags)
    Path("closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path))
    with pytest.raises(UserError, match="cannot write to closed; choose another --out"):
        distil("--out", "closed")


def test_a_home_folder_is_where_it_was_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    teach("--epochs", "1", "--out", "~/runs/x")
    assert (tmp_path / "home/runs/x/summary.json").exists()
    assert not Path("~").exists()


def test_row_1_with_two_views_killed_in_the_middle_of_an_epoch(monkeypatch):
    """BatchNorm, dropout, a mixed strong view, and the teacher's answers for both."""
    flags = ["--mixup", "0.4", "--erase", "0.3", "--mixed-precision", "bf16", "--epochs", "1"]
    assert differs_when_killed(monkeypatch, lambda *args: distil(*flags, *args, "mlkd"), 7) == []
