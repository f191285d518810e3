"""Nothing that is not finite is saved, and nothing that was changed since it was written is believed."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import kd
from kd.errors import Preempted, UserError
from kd.runs import checkpoint, results
from kd.runs.load import load_network
from kd.runs.table import show_results
from kd.teachers.cache import LogitStore
from kd.training.trainer import Trainer
from kd.utils import files
from tests.conftest import ROOT
from tests.run_scripts import differences, distil, script, teach
from tests.training.test_faults import rewrite_state
from tests.training.test_resume import half_a_run

SMALL = ["--epochs", "2", "--classes", "4", "--batch-size", "90"]
LOWER = "start another run with a lower --lr"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished teacher and a student of its."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--out", "run", "--model", "resnet8", *SMALL)
        distil("--out", "student", "--teacher", "run", *SMALL)
    return folder


@pytest.mark.parametrize("step", [18, 36], ids=["an epoch's last step", "the run's last step"])
def test_row_27_weights_that_overflow_are_not_saved_though_the_loss_was_finite(monkeypatch, step):
    real = Trainer.record

    def overflow(self, result, batch):
        real(self, result, batch)
        if self.state.step == step:
            next(self.distiller.buffers()).fill_(torch.inf)

    monkeypatch.setattr(Trainer, "record", overflow)
    monkeypatch.setattr("kd.training.trainer.validate", lambda *args: {"val/loss": 1.0, "val/top1": 10.0})
    with pytest.raises(
        UserError, match=rf"was not finite after step {step - 1}; the last good checkpoint is step .* {LOWER}"
    ):
        teach("--out", "run")
    assert checkpoint.steps(Path("run/checkpoint"))[0] < step
    assert not Path("run/summary.json").exists()


def test_row_27_a_score_that_is_not_finite_ends_the_epoch_unsaved(monkeypatch):
    monkeypatch.setattr("kd.metrics.nll", lambda *args: float("nan"))
    with pytest.raises(
        UserError, match=rf"val/loss was not finite after step 17; the last good checkpoint is step 0 .* {LOWER}"
    ):
        teach("--out", "run")
    assert Path("run/metrics.jsonl").read_text() == ""


def test_row_27_a_test_score_that_is_not_finite_finishes_no_run(monkeypatch):
    monkeypatch.setattr("kd.metrics.nll", lambda *args: float("nan"))
    with pytest.raises(UserError, match=f"test_nll of the trained network is not finite: {LOWER}"):
        teach("--out", "run", "--val-fraction", "0")
    assert not {"summary.json", "model.safetensors"} & {path.name for path in Path("run").iterdir()}


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_var"])
def test_weights_and_buffers_that_are_not_finite_are_refused(finished, name):
    shutil.copytree(finished / "run", "copy")
    weights = files.read_weights(Path("copy/model.safetensors"))
    weights[name].view(-1)[3] = float("nan")
    files.write_weights(Path("copy/model.safetensors"), weights)
    summary = json.loads(Path("copy/summary.json").read_text())
    Path("copy/summary.json").write_text(
        json.dumps(summary | {"weights_sha256": files.sha256_file(Path("copy/model.safetensors"))})
    )
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
        kd.load("copy")


def test_a_flipped_bit_in_a_finished_runs_weights_is_noticed(finished):
    shutil.copytree(finished / "run", "copy")
    path = Path("copy/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="changed since its run wrote it"):
        kd.load("copy")
    with pytest.raises(UserError, match="changed since its run wrote it"):
        distil("--teacher", "copy", "--init", "copy", "--sparsity", "0.5", "--student", "resnet8", *SMALL)


def test_a_run_from_before_weights_had_a_sha256_still_loads(finished):
    shutil.copytree(finished / "run", "copy")
    summary = json.loads(Path("copy/summary.json").read_text())
    del summary["weights_sha256"]
    Path("copy/summary.json").write_text(json.dumps(summary))
    ours, theirs = (load_network(folder, False).network.state_dict() for folder in (Path("copy"), finished / "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_row_14_every_bit_of_an_array_files_header_may_flip(tmp_path):
    """numpy parses it as Python: what comes is the array, or one line."""
    identity = {"views": {"count": 1}, "rows": 2, "classes": 3, "top_k": None, "dtype": "float32"}
    store, wanted = LogitStore(tmp_path, identity), np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    np.save(tmp_path / "logits.npy", wanted)
    sound, refusals = (tmp_path / "logits.npy").read_bytes(), 0
    for bit in range(8 * (len(sound) - wanted.nbytes)):
        content = bytearray(sound)
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "logits.npy").write_bytes(content)
        try:
            found = store.open("logits", "r")
        except UserError:
            refusals += 1
        else:
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert refusals > 400


ODD = (None, -1, 0, True, 10**400, 0.5, float("nan"), float("inf"), "", "x", "\0", [], ["x"], [5], {}, {"x": 1}, [{}])


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:9])
def test_no_entry_of_a_students_summary_ends_in_a_traceback(finished, odd):
    shutil.copytree(finished / "student", "copy")
    sound = json.loads(Path("copy/summary.json").read_text())
    for key in [*sound, "teachers"]:
        Path("copy/summary.json").write_text(json.dumps(sound | {key: odd}))
        runs, others = results.collect_runs(["copy"])
        assert len(runs) + len(others) == 1
        try:
            show_results(Path("copy"))
        except UserError as error:
            assert "copy: summary.json has " in str(error)  # noqa: PT017  most are refused; some a run may write
            assert not runs


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"epoch": 1, "train/loss": ' + "9" * 401 + "}", "[1]", "", '{"epoch": 1}', "\xff"]
)
def test_no_history_ends_in_a_traceback(finished, text):
    shutil.copytree(finished / "run", "copy")
    Path("copy/metrics.jsonl").write_text(text, encoding="latin-1")
    (run,), _ = results.collect_runs(["copy"])
    with pytest.raises(UserError, match=r"copy/metrics.jsonl(: cannot be read|: has lines| has no epochs)"):
        results.read_history(run)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64])
def test_answers_that_are_no_floats_are_refused(finished, dtype):
    shutil.copytree(finished / "run", "copy")
    kept = files.read_weights(Path("copy/test_logits.safetensors"))
    files.write_weights(Path("copy/test_logits.safetensors"), kept | {"logits": kept["logits"].to(dtype)})
    (run,), _ = results.collect_runs(["copy"])
    with pytest.raises(UserError, match="for logits and labels"):
        results.read_test_logits(run.path, run.summary)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threads", 2**40), ("seconds", "x"), ("timing", {"images": []}), ("timing", {"x": 1}), ("history", [{}]),
        ("history", []), ("processes_before", 5), ("step", 10**9), ("step", 0), ("scaler", []),
        ("sums", {"terms": ["ce"], "measures": [], "rows": [["x"] * 5]}),
    ],
)  # fmt: skip
def test_a_believed_checkpoint_says_what_a_training_may_have_said(monkeypatch, field, value):
    """With its sha256 made to fit, as a stranger would."""
    saved = half_a_run(monkeypatch)
    rewrite_state(saved, lambda state: state.update({field: value}))
    with pytest.raises(UserError, match=r"to start again, remove the run"):
        teach("--out", "run", "--save-every", "7", "--resume")


def test_a_damaged_checkpoint_that_was_passed_over_is_not_counted_as_kept(monkeypatch):
    """Else the good one behind it would be pruned, and the damaged one be named as standing."""
    saved = half_a_run(monkeypatch)
    (saved / "step-28/model.safetensors").write_bytes(b"")
    real = Trainer.record

    def overflow(self, result, batch):
        if self.state.step == 23:
            result = result._replace(terms={name: term * torch.nan for name, term in result.terms.items()})
        real(self, result, batch)

    monkeypatch.setattr(Trainer, "record", overflow)
    stands = pytest.raises(UserError, match=r"the last good checkpoint is step 22")
    with pytest.warns(UserWarning, match="step-28 is damaged"), stands:
        teach("--out", "run", "--save-every", "2", "--resume")
    assert checkpoint.steps(saved) == [22, 21]


def test_row_9_epochs_without_a_checkpoint_are_no_new_run(monkeypatch, capsys):
    half_a_run(monkeypatch)
    lines = Path("run/metrics.jsonl").read_text()
    shutil.rmtree("run/checkpoint")
    with pytest.raises(UserError, match=r"run has epochs in metrics.jsonl and no checkpoint to continue from"):
        teach("--out", "run", "--save-every", "7")
    assert Path("run/metrics.jsonl").read_text() == lines
    teach("--out", "run", "--save-every", "7", "--auto-resume")
    assert "run: nothing to resume, starting afresh" in capsys.readouterr().out


def test_row_10_a_refused_resume_leaves_nothing_behind():
    with pytest.raises(UserError, match="--resume: typo has no checkpoint"):
        teach("--out", "typo", "--resume")
    assert not Path("typo").exists()


def test_row_36_a_stop_while_the_last_view_is_sealed_is_not_lost(monkeypatch):
    real = LogitStore.block

    def block(self, view):
        if view == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(self, view)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match=r"2 of 2 views of the teacher.s logits in "):
        patch.setattr(LogitStore, "block", block)
        distil("--cache-teacher", "--views", "2", "--epochs", "1", "--out", "run")
    distil("--cache-teacher", "--views", "2", "--epochs", "1", "--out", "run")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "row"), [(signal.SIGTERM, 36), (signal.SIGINT, 37)])
def test_row_36_row_37_a_signal_to_a_real_script_saves_and_ends_with_its_number(number, row):
    args = ["--model", "resnet8", "--data", "synthetic", "--batch-size", "50", "--epochs", "2", "--threads", "1"]
    args += ["--wandb", "disabled", "--log-every", "3"]
    fault = f"signal:20:0:{int(number)}"
    stopped = script("tests/faults.py", fault, str(ROOT / "train_teacher.py"), *args, "--out", "run")
    assert stopped.returncode == 128 + number
    how = "stopped" if number == signal.SIGINT else "preempted"
    assert f"{how} and saved: step 20 in run; continue with --resume" in stopped.stderr
    for out in (["--out", "run", "--resume"], ["--out", "whole"]):
        assert script("train_teacher.py", *args, *out).returncode == 0
    assert differences(Path("whole"), Path("run")) == []


def test_a_folder_whose_replacement_was_killed_between_two_renames_comes_back(tmp_path):
    (tmp_path / ".made.old").mkdir()
    (tmp_path / ".made.old/file").write_text("precious")

    def full(partial):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.write_folder(tmp_path / "made", full)
    assert (tmp_path / "made/file").read_text() == "precious"
