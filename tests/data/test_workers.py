"""Images decoded by workers: the same batches, statistics and weights as in memory; broken rows named; no hangs."""

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import kd.training.summary
from kd.config import DataConfig, FitConfig, Job, NoneConfig, RunConfig, ViewConfig
from kd.data import load_data
from kd.data.cache import locked
from kd.data.loader import Batches
from kd.errors import UserError, exit_code
from kd.export.__main__ import main
from kd.training.trainer import Trainer
from tests.conftest import ROOT
from tests.run_scripts import differences, distil, script, teach

VIEWS = ViewConfig(resized_crop=0.3, colour_jitter=0.4, mixup=1.0, cutmix=1.0, erase=0.3)


def images(folder: Path, counts=(("train", 40), ("test", 10)), sides=(20, 32)) -> str:
    """An imagefolder of three classes that differ in colour: JPEG and PNG of several sizes."""
    random = np.random.default_rng(0)
    for split, count in counts:
        for number in range(count):
            wide, high = random.integers(*sides, 2)
            pixels = random.integers(0, 90, (high, wide, 3), dtype=np.uint8)
            pixels[..., number % 3] += 120
            place = folder / split / f"class {number % 3}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{number:04}.{'jpg' if number % 2 else 'png'}", quality=90)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return images(tmp_path_factory.mktemp("data") / "pictures")


def config(folder: str, decode: str, **more) -> DataConfig:
    return DataConfig(source=folder, decode=decode, image_size=16, workers=2, **more)


def all_batches(data, views: ViewConfig, first: int = 0) -> list:
    job = Job("teacher", "digits", "resnet8", NoneConfig(), DataConfig(), views, FitConfig(batch_size=12), RunConfig())
    return list(Batches(data, job, Accelerator(cpu=True)).epoch(1, first))


@pytest.mark.parametrize("views", [ViewConfig(), VIEWS], ids=["crop", "all views"])
def test_memory_and_workers_give_the_same_batches_in_the_same_order(folder, views):
    memory, workers = (load_data(config(folder, how, stored_size=20)) for how in ("memory", "workers"))
    assert memory.size == workers.size == (16, 16)
    for expected, actual in zip(all_batches(memory, views), all_batches(workers, views), strict=True):
        for name, one, other in zip(expected._fields, expected, actual):
            assert (one is None) == (other is None), name
            pairs = zip(one, other) if isinstance(one, tuple) else [(one, other)]
            assert one is None or all(torch.equal(*pair) for pair in pairs), name


def test_an_epoch_entered_in_the_middle_goes_on_as_the_whole_one(folder):
    data = load_data(config(folder, "workers"))
    whole, rest = all_batches(data, VIEWS), all_batches(data, VIEWS, first=1)
    assert len(rest) == len(whole) - 1
    assert torch.equal(rest[0].image, whole[1].image)
    assert rest[0].step == whole[1].step


@pytest.mark.parametrize("more", [{}, {"classes": 2}, {"val_fraction": 0.0, "stored_size": 24}])
def test_the_statistics_are_those_of_the_decoded_data(folder, more):
    memory, workers = (load_data(config(folder, how, **more)) for how in ("memory", "workers"))
    for name in ("classes", "mean", "std", "fingerprint", "size"):
        assert getattr(memory, name) == getattr(workers, name), name
    assert memory.train.sha256 == workers.train.sha256
    assert torch.equal(memory.train.labels, workers.train.labels)


def test_only_the_training_split_has_a_sha256(folder):
    """The scan hashes its pixels alone; hashing another split would cost another pass."""
    data = load_data(config(folder, "workers"))
    assert data.train.sha256 == load_data(config(folder, "memory")).train.sha256
    for split in (data.val, data.test):
        with pytest.raises(RuntimeError, match="only the training split's pixels are hashed"):
            split.sha256  # noqa: B018


def test_the_second_start_scans_nothing_again(folder, monkeypatch):
    first = load_data(config(folder, "workers"))
    monkeypatch.setattr("kd.data.workers._scan", None)  # would raise if called
    assert load_data(config(folder, "workers")).fingerprint == first.fingerprint
    with pytest.raises(TypeError):  # other training rows have another mean
        load_data(config(folder, "workers", split_seed=7))


def test_memory_and_workers_have_one_identity_and_the_same_weights(folder, tmp_path, capsys):
    flags = ["--data", folder, "--image-size", "16", "--batch-size", "12", "--resized-crop", "0.3", "--workers", "2"]
    flags += ["--epochs", "1"]
    for how in ("memory", "workers"):
        teach(*flags, "--decode", how, "--out", str(tmp_path / how))
    assert not differences(tmp_path / "memory", tmp_path / "workers")
    identities = [json.loads((tmp_path / how / "config.json").read_text())["identity"] for how in ("memory", "workers")]
    assert identities[0] == identities[1]
    output = capsys.readouterr().out
    assert "data: in memory, decoded once (" in output
    assert "data: decoded by workers in every epoch (as --decode says), columns image and label; " in output
    for how in ("memory", "workers"):
        storage = json.loads((tmp_path / how / "config.json").read_text())["data"]["held"]
        assert f"data: {storage}; 37 training, 3 validation, 10 test images of 3 classes\n" in output


@pytest.mark.slow
def test_a_cached_teacher_serves_every_storage(folder, capsys):
    flags = ["--data", folder, "--image-size", "16", "--batch-size", "12", "--epochs", "1", "--views", "1"]
    flags += ["--cache-teacher", "--workers", "2", "--resized-crop", "0.5"]
    distil(*flags, "--decode", "workers", "--out", "one")
    assert "view 1 of 1 stored" in capsys.readouterr().out
    distil(*flags, "--decode", "memory", "--out", "other")
    assert "stored" not in capsys.readouterr().out, "nothing was computed again"
    assert not differences(Path("one"), Path("other"))


def test_a_broken_row_is_named_before_training(tmp_path):
    source = images(tmp_path / "pictures")
    broken = tmp_path / "pictures" / "test" / "class 1" / "0004.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for how in ("memory", "workers"):
        with pytest.raises(
            UserError, match=r"^test row 5 \(.*0004.png\): not a readable image \(.*\); repair or drop it"
        ):
            load_data(config(source, how))


def test_images_of_several_sizes_need_one_size(folder):
    with pytest.raises(UserError, match="give --image-size N to bring all to one size"):
        load_data(DataConfig(source=folder, decode="workers", workers=0))


def test_data_that_does_not_fit_is_decoded_by_workers(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kd.data.storage.SHARE", 1e-9)
    load_data(config(folder, "auto"))
    assert "by workers in every epoch (their 0.0384 MB do not fit half of" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    load_data(config(folder, "auto"))
    assert "data: in memory, decoded once (0.0384 MB, which fit half of" in capsys.readouterr().out


def test_row_45_a_killed_worker_ends_in_one_line_with_the_remedy(capsys):
    """The next test kills a real worker, in a process of its own: torch raises from a signal handler at any place."""

    def fail() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    assert exit_code(fail, "") == 2
    said = capsys.readouterr().err
    assert "give fewer --workers, or 0, and continue with --resume" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_row_45_a_run_whose_worker_is_killed_ends_and_resumes(folder, tmp_path):
    flags = ["--data", folder, "--image-size", "16", "--batch-size", "2", "--epochs", "3", "--model"]
    flags += ["tests.networks:normalised", "--decode", "workers", "--workers", "2", "--wandb", "disabled"]
    program = f"""
import os, runpy, signal, sys
from pathlib import Path
from types import SimpleNamespace
from kd.training.trainer import Trainer
real = Trainer.record
def step(self, *args):
    if self.state.step == 22:  # while the workers still have batches to decode
        os.kill(int(Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()[-1]), signal.SIGKILL)
    real(self, *args)
Trainer.record = step
sys.argv = ["train_teacher.py", *{[*flags, "--out", str(tmp_path / "killed")]!r}]
runpy.run_path(str(Path({str(ROOT)!r}) / "train_teacher.py"), run_name="__main__")
"""
    (tmp_path / "fault.py").write_text(program)
    killed = script(str(tmp_path / "fault.py"), timeout=120)
    assert killed.returncode == 2, killed.stderr
    assert "error: a worker that decodes images died: give fewer --workers" in killed.stderr
    again = script("train_teacher.py", *flags, "--out", str(tmp_path / "killed"), "--resume")
    assert again.returncode == 0, again.stderr
    assert script("train_teacher.py", *flags, "--out", str(tmp_path / "whole")).returncode == 0
    assert not differences(tmp_path / "killed", tmp_path / "whole")


def test_each_cache_key_has_a_lock_of_its_own():
    """Closing a file releases all of this process's locks on it, so two keys must not share a lock file."""
    with locked("set") as folder:
        with locked("set.tables"):
            pass
        code = "import sys, pathlib, kd.utils.system; print(kd.utils.system.Lock(pathlib.Path(sys.argv[1])).acquire())"
        command = [sys.executable, "-c", code, f"{folder}.lock"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_export_of_a_run_by_workers_has_the_runs_score(folder, tmp_path):
    flags = ["--data", folder, "--image-size", "16", "--stored-size", "20", "--decode", "workers", "--workers", "0"]
    teach(*flags, "--batch-size", "4", "--epochs", "3", "--model", "resnet8", "--out", "run")
    main(["run", "--formats", "safetensors"])
    (row,) = json.loads(Path("run/export/export.json").read_text())["rows"]
    assert row["top1"] == pytest.approx(json.loads(Path("run/summary.json").read_text())["test_top1"])


def test_batches_that_do_not_fit_the_shared_memory_are_refused_at_the_start(folder, monkeypatch):
    """A worker that finds /dev/shm full neither sends its batch nor fails: the run would wait for ever."""
    data = load_data(config(folder, "workers"))
    batch = 3 * 16 * 16 * 12
    monkeypatch.setattr("kd.data.workers.shutil.disk_usage", lambda path: SimpleNamespace(free=5 * batch))
    with pytest.raises(UserError, match=r"--workers 2: batches of .* take .* give --workers 1, or .* --shm-size"):
        all_batches(data, ViewConfig())
    monkeypatch.setattr("kd.data.workers.shutil.disk_usage", lambda path: SimpleNamespace(free=6 * batch))
    assert len(all_batches(data, ViewConfig())) == 3


def decoders() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


def test_workers_stay_for_the_next_epoch_and_end_when_they_are_closed(folder):
    """Also after an epoch that was left in the middle, of whose batches some are decoded already."""
    before, split = decoders(), load_data(config(folder, "workers")).train
    parts, cpu = list(torch.arange(36).split(6)), torch.device("cpu")
    whole = list(split.batches(parts, cpu))
    first = decoders() - before
    assert len(first) == 2
    left = split.batches(parts[::-1], cpu)
    assert torch.equal(next(left), whole[-1])
    left.close()
    for one, other in zip(whole[1:], split.batches(parts[1:], cpu), strict=True):
        assert torch.equal(one, other)
    assert decoders() - before == first
    split.close()
    assert decoders() == before
    assert torch.equal(next(split.batches(parts, cpu)), whole[0])
    split.close()


def test_two_passes_at_once_over_one_split_do_not_take_each_others_batches(folder):
    split, parts, cpu = load_data(config(folder, "workers")).train, list(torch.arange(36).split(6)), torch.device("cpu")
    for one, other in zip(split.batches(parts, cpu), split.batches(parts[::-1], cpu), strict=True):
        assert one.shape == other.shape
    pairs = zip(split.batches(parts, cpu), split.batches(parts[::-1], cpu), split.batches(parts, cpu), strict=True)
    ones, others, thirds = zip(*pairs)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(ones, others[::-1], thirds))
    split.close()


def test_training_keeps_its_workers_over_epochs_and_leaves_none(folder, monkeypatch):
    seen, ended, before = [], [], decoders()
    for name, found in (("end_epoch", seen), ("__exit__", ended)):
        real = getattr(Trainer, name)

        def noted(self, *args, real=real, found=found):
            real(self, *args)
            found.append(decoders())

        monkeypatch.setattr(Trainer, name, noted)
    flags = ["--data", folder, "--image-size", "16", "--batch-size", "12", "--decode", "workers", "--workers", "1"]
    teach(*flags, "--epochs", "3", "--val-fraction", "0.2", "--out", "run")
    assert len(seen) == 3
    assert len(seen[0] - before) == 2, "one for training, one for validation"
    assert seen[0] == seen[1] == seen[2]
    assert ended == [before]


def test_no_worker_outlasts_the_scoring_of_the_test_splits(folder, monkeypatch):
    """The data outlives it: a student's training has that of its teacher before it."""
    left, before, real = [], decoders(), kd.training.summary.write_results

    def noted(*args):
        real(*args)
        left.append(decoders())

    monkeypatch.setattr("kd.training.summary.write_results", noted)
    flags = ["--data", folder, "--image-size", "16", "--batch-size", "12", "--decode", "workers", "--workers", "1"]
    teach(*flags, "--epochs", "1", "--probe", folder, "--out", "run")
    assert left == [before]


def test_a_broken_row_ends_the_workers(folder, monkeypatch):
    split, before = load_data(config(folder, "workers")).train, decoders()
    with monkeypatch.context() as patch:
        patch.setattr("kd.data.workers._Decoder.__getitem__", lambda self, rows: "row 3: broken")
        with pytest.raises(UserError, match="row 3: broken"):
            list(split.batches([torch.arange(4)], torch.device("cpu")))
    assert decoders() == before
    assert next(split.batches([torch.arange(4)], torch.device("cpu"))).shape == (4, 3, 16, 16)
    split.close()


def test_a_scan_takes_little_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("kd.data.workers.BLOCK_BYTES", 5 * 3 * 16 * 16)
    monkeypatch.setattr("kd.data.workers.shutil.disk_usage", lambda path: SimpleNamespace(free=30 * 3 * 16 * 16))
    small = load_data(config(images(tmp_path / "pictures"), "workers"))
    assert small.fingerprint == load_data(config(str(tmp_path / "pictures"), "memory")).fingerprint


def test_a_worker_that_sends_nothing_is_given_up(folder, monkeypatch):
    data = load_data(config(folder, "workers"))
    monkeypatch.setattr("kd.data.workers.TIMEOUT", 1)
    monkeypatch.setattr("kd.data.workers._Decoder.__getitem__", lambda self, rows: time.sleep(60))
    with pytest.raises(UserError, match=r"no worker sent a batch in 1 seconds: give fewer --workers, or 0.*--shm-size"):
        all_batches(data, ViewConfig())
