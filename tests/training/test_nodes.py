"""Two machines without a common disk: what one has on its disk reaches the other, and what differs is refused."""

import os
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from datasets import Dataset
from torch import distributed

import distill_student
import kd.data.cache
import kd.data.dataset
import kd.data.sources
import kd.data.storage
import kd.teachers.__main__
from kd.config import DataConfig, FitConfig, RunConfig
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.data import load_data
from kd.data.loader import Pixels
from kd.errors import UserError
from kd.models import build_model
from kd.teachers.cache import LogitStore
from kd.teachers.shared import open_cache
from kd.training.evaluate import predict_logits
from kd.training.launch import make_accelerator
from kd.training.probe import Probe
from kd.training.trainer import Trainer
from kd.utils import processes
from kd.utils.processes import all_do, from_main, node_first
from tests.data.test_dataset import picture
from tests.data.test_stream import shards
from tests.nodes import Ended, run_nodes, two_nodes
from tests.pairs import batch_of, build
from tests.run_scripts import SMALL, differences, distil, teach

CACHED = ("--views", "2", "--cache-teacher", "--cache-dtype", "float32")
STUDENT = (*CACHED, "--threads", "1", "--save-every", "5", "--out", "run")
TEACHER = ("--epochs", "1", "--threads", "1", "--out", "run")
QUICK = 20.0  # seconds in which a refusal must be there, on a busy machine


def codes(ended: list[Ended]) -> list[int | None]:
    return [end.code for end in ended]


def caches(machine: str) -> dict[str, bytes]:
    """The files of a machine's teacher cache."""
    paths = Path(machine).glob("runs/cache/*/*")
    return {path.name: path.read_bytes() for path in paths if path.name != "lock"}


# --- what processes do together ---------------------------------------------------------------------------------


def test_what_the_main_process_reads_reaches_the_other_in_parts(monkeypatch):
    monkeypatch.setattr(processes, "CHUNK", 1000)

    def work(rank):
        Accelerator(cpu=True)
        value = {"weights": torch.arange(2000.0), "rank": rank}
        return from_main(lambda: value)

    for end in two_nodes(work):
        assert end.code == 0, end.log
        assert end.answer["rank"] == 0
        assert torch.equal(end.answer["weights"], torch.arange(2000.0))


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("local", [False, True])
def test_row_39_an_error_of_one_process_ends_the_other_within_seconds(failing, local):
    def work(rank):
        Accelerator(cpu=True)
        if failing != rank:
            return all_do(processes.nothing)
        time.sleep(0.5)

        def fail():
            raise UserError("no such folder: name another")

        all_do(fail)

    started = time.monotonic()
    ended = two_nodes(work, local=local)
    assert time.monotonic() - started < QUICK
    assert codes(ended) == [2, 2]
    assert "error: no such folder: name another" in ended[failing].log.replace("[process 1] ", "")
    other = ended[1 - failing].log
    assert other.count("no such folder") == (not local), "told once on each machine"


@pytest.mark.parametrize("failing", [0, 1])
def test_row_39_an_error_elsewhere_ends_those_who_wait_for_that_process(failing):
    def work(rank):
        Accelerator(cpu=True)
        if failing == rank:
            raise UserError("no such folder: name another")
        all_do(processes.nothing)

    started = time.monotonic()
    ended = two_nodes(work)
    assert time.monotonic() - started < QUICK
    assert codes(ended) == [2, 2]
    assert "no such folder" in ended[1 - failing].log or failing == 0  # whose end may take the store with it


def test_a_wait_outlasts_the_timeout_of_collectives():
    def work(rank):
        Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=2))])
        return from_main(lambda: time.sleep(4) or "decoded")

    for end in two_nodes(work):
        assert end.code == 0, end.log
        assert end.answer == "decoded"


@pytest.mark.parametrize("kind", ["scores", "probe"])
def test_who_reads_images_for_minutes_is_waited_for(kind):
    def work(rank):
        accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=2))])
        data, real = load_data(DataConfig("synthetic")), Pixels.centre_crops
        network = build_model("resnet8", len(data.classes), data.size)

        def slow(self, indices):
            time.sleep(4 * rank)
            yield from real(self, indices)

        Pixels.centre_crops = slow
        if kind == "scores":
            return len(predict_logits(network, data.val, data, accelerator, 50))
        seen = replace(data, probe=data)
        return len(Probe(network, "resnet8", seen, "synthetic", accelerator, 50).features(data.val))

    for end in two_nodes(work, local=True):
        assert end.code == 0, end.log
        assert end.answer == 100


def test_the_first_process_of_a_machine_works_before_the_other(tmp_path):
    def work(rank):
        Accelerator(cpu=True)

        def keep(first):
            if first:
                time.sleep(0.3)
                Path("kept").touch()
            return first, Path("kept").exists()

        return node_first(keep)

    assert [end.answer for end in two_nodes(work, local=True)] == [(True, True), (False, True)]
    Path("kept").unlink()
    assert [end.answer for end in two_nodes(work)] == [(True, True), (True, True)]


# --- data -------------------------------------------------------------------------------------------------------


def counted_load(rank: int) -> dict:
    """How often this process hashes and counts when it loads data, and which commit of a Hub set it then reads."""
    counts, commits = dict.fromkeys(("hash_arrays", "count_levels"), 0), []

    def count(module, name):
        real = getattr(module, name)

        def counting(*args):
            counts[name] += 1
            return real(*args)

        setattr(module, name, counting)

    count(kd.data.cache, "hash_arrays")
    count(kd.data.storage, "count_levels")
    Accelerator(cpu=True)
    mean = load_data(DataConfig("synthetic")).mean
    kd.data.sources._newest_revision = lambda name, branch: f"the answer to process {rank}"

    def opened(config, commit):
        commits.append(commit)
        raise UserError("the Hub is not asked in this test")

    kd.data.dataset.find_source = opened
    with suppress(UserError):
        load_data(DataConfig("someone/set"))
    return counts | {"mean": mean, "commits": commits}


def test_one_process_of_a_machine_hashes_and_counts_and_one_of_all_asks_the_hub():
    first, second = (end.answer for end in two_nodes(counted_load, local=True))
    assert first["mean"] == second["mean"]
    assert (first["count_levels"], second["count_levels"]) == (1, 0)
    assert first["hash_arrays"] > 0
    assert second["hash_arrays"] == 0
    assert first["commits"] == ["the answer to process 0"]
    again = [end.answer for end in two_nodes(counted_load, local=True)]
    assert [counts["count_levels"] for counts in again] == [0, 0], "kept beside the decoded images"
    apart = [end.answer for end in two_nodes(counted_load)]
    assert [counts["count_levels"] for counts in apart] == [1, 1], "each machine keeps its own"
    assert [counts["commits"] for counts in apart] == [["the answer to process 0"]] * 2


def test_machines_may_stream_copies_of_one_folder(tmp_path):
    """Their files have other times, which tell one machine whether its own have changed."""
    shards(tmp_path / "node0" / "set")
    shutil.copytree("node0/set", "node1/set", copy_function=shutil.copyfile)

    def work(rank):
        Accelerator(cpu=True)
        data = load_data(DataConfig("set", stream=True, image_size=16))
        return data.fingerprint, data.train.sha256

    first, second = two_nodes(work)
    assert (first.code, second.code) == (0, 0), second.log
    assert first.answer == second.answer
    Path("node1/set/.DS_Store").write_text("no data")
    assert [end.code for end in two_nodes(work)] == [0, 0]
    (part,) = Path("node1/set").rglob("train-00003*")
    rows = Dataset.from_parquet(str(part))  # as many rows of the same labels, and other images
    rows.map(lambda row: {"image": picture(9, size=row["image"].size)}).to_parquet(part)
    ended = two_nodes(work)
    assert codes(ended) == [2, 2]
    assert "has other data than the main process" in ended[1].log


def test_machines_with_different_data_are_refused():
    def work(rank):
        Accelerator(cpu=True)
        load_data(DataConfig("synthetic", split_seed=rank))

    ended = two_nodes(work)
    assert codes(ended) == [2, 2]
    for end in ended:
        assert "--data synthetic:" in end.log
        assert "has other data than the main process" in end.log


# --- DDP --------------------------------------------------------------------------------------------------------


def test_a_forward_pass_sends_no_buffers():
    def work(rank):
        accelerator, sent = make_accelerator(FitConfig(), RunConfig(threads=1)), []
        distiller, teacher = build("crd")
        batch = batch_of(torch.arange(8), 0, "crd")
        outputs = teacher.of_batch(batch)
        model = accelerator.prepare(distiller)
        real = distributed._broadcast_coalesced

        def counted(group, tensors, *args):
            sent.append(sum(tensor.nbytes for tensor in tensors))
            return real(group, tensors, *args)

        distributed._broadcast_coalesced = counted
        for _ in range(2):
            sum(model(batch, outputs).terms.values()).backward()
        return sum(sent), sum(buffer.nbytes for buffer in distiller.buffers())

    for end in two_nodes(work):
        assert end.code == 0, end.log
        sent, held = end.answer
        assert sent < min(1e6, held)
        assert sent == 0


# --- the scripts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A student on two machines, its teacher trained on the way; what node0 and node1 hold then."""
    folder = tmp_path_factory.mktemp("nodes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = run_nodes("distil", *STUDENT)
    assert codes(ended) == [0, 0], ended
    return folder


@pytest.fixture
def machines(whole, tmp_path):
    """A copy of them, without the student's run."""
    for name in ("node0", "node1"):
        shutil.copytree(whole / name, tmp_path / name, ignore=lambda _, names: {"run"} & set(names))
    return whole


@pytest.mark.slow
def test_one_machine_has_the_run_and_both_have_the_teachers_logits(whole):
    assert (whole / "node0/run/summary.json").exists()
    assert not list((whole / "node1").glob("**/checkpoint")), "nothing of a run is written there"
    assert not (whole / "node1/run").exists()
    logits = caches(str(whole / "node0"))
    assert logits.keys() == {"logits.npy", "manifest.json", "about.json"}
    assert caches(str(whole / "node1")) == logits


@pytest.mark.slow
def test_two_machines_end_in_the_bytes_of_two_processes_of_one(whole):
    ended = two_nodes(lambda rank: distil(*STUDENT), local=True)
    assert codes(ended) == [0, 0], ended
    assert differences(whole / "node0/run", Path("run")) == []


@pytest.mark.slow
def test_two_machines_with_one_disk_keep_one_cache_of_logits(whole):
    ended = run_nodes("distil", *STUDENT, shared=True)
    assert codes(ended) == [0, 0], ended
    assert caches(".") == caches(str(whole / "node0"))
    assert differences(whole / "node0/run", Path("run")) == []


@pytest.mark.slow
def test_the_finished_command_again_shows_its_table_on_one_machine_and_ends_on_both(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    os.chdir(tmp_path / "copy")
    first, second = run_nodes("distil", *STUDENT)
    assert (first.code, second.code) == (0, 0), second.log
    assert "run folder: run" in first.log
    assert second.log == ""


def killed_at(step: int, *flags: str) -> None:
    """The student, killed when its process has counted a step."""
    real, count = Trainer.record, 0

    def record(self, *args):
        nonlocal count
        real(self, *args)
        count += 1
        if count == step:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.record = record
    distil(*flags)


@pytest.mark.slow
def test_row_3_killed_on_two_machines_it_resumes_to_the_same_bytes(machines):
    ended = two_nodes(lambda rank: killed_at(24, *STUDENT))
    assert codes(ended) == [-signal.SIGKILL] * 2
    ended = run_nodes("distil", *STUDENT, "--resume")
    assert codes(ended) == [0, 0], ended
    assert differences(machines / "node0/run", Path("node0/run")) == []


@pytest.mark.slow
def test_row_10_a_second_machine_is_told_that_there_is_nothing_to_resume(machines):
    started = time.monotonic()
    ended = run_nodes("distil", *STUDENT, "--resume")
    assert time.monotonic() - started < QUICK
    assert codes(ended) == [2, 2]
    assert "error: process 0: --resume: run has no checkpoint" in ended[1].log


@pytest.mark.slow
def test_row_15_a_machine_gets_the_logits_that_it_lacks_and_other_ones_are_refused(machines):
    wanted = caches("node0")
    shutil.rmtree("node1/runs/cache")
    ended = run_nodes("distil", *STUDENT)
    assert codes(ended) == [0, 0], ended
    assert "stored" not in ended[0].log, "the teacher is not run again"
    assert caches("node1") == wanted
    (logits,) = Path("node1").glob("runs/cache/*/logits.npy")
    spoilt = bytearray(logits.read_bytes())
    spoilt[-1] ^= 1
    logits.write_bytes(spoilt)
    ended = run_nodes("distil", *STUDENT, "--seed", "1", "--out", "other")
    assert codes(ended) == [2, 2]
    assert "error: process 1:" in ended[0].log
    assert "changed since it was built" in ended[1].log


@pytest.mark.slow
def test_row_18_killed_while_two_machines_store_logits_they_continue():
    def killed(rank):
        real, count = LogitStore.write, 0

        def write(self, *args):
            nonlocal count
            count += 1
            if count == 20:  # of 18 + 18 for each machine: in the second view
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, *args)

        LogitStore.write = write
        distil(*STUDENT)

    assert codes(two_nodes(killed)) == [-signal.SIGKILL] * 2
    ended = run_nodes("distil", *STUDENT)
    assert codes(ended) == [0, 0], ended
    assert "view 1 of 2 stored" not in ended[0].log
    assert caches("node0") == caches("node1") != {}


@pytest.mark.slow
def test_a_teacher_and_a_start_that_one_machine_has_serve_both():
    Path("node0").mkdir()
    os.chdir("node0")
    teach("--out", "big/one", "--epochs", "1", "--model", "tests.networks:plain")
    os.chdir("..")
    flags = ("--teacher", "big/one", "--trust-code", "--epochs", "1", "--threads", "1", "--out", "run")
    ended = run_nodes("distil", *flags)
    assert codes(ended) == [0, 0], ended
    assert len(list(Path("node1/data/runs").iterdir())) == 1, "a copy"
    flags = ("--init", "big/one", "--model", "tests.networks:plain", *TEACHER[:-1], "started")
    ended = run_nodes("teach", *flags)
    assert codes(ended) == [0, 0], ended


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher and a packed cache of its logits, as one machine of two has them."""
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--model", "resnet8", "--out", "big", "--epochs", "1")
        distil("--student", "resnet8", "--teacher", "big", "--epochs", "1", *CACHED, "--out", "student", "kd")
        (built,) = Path("runs/cache").iterdir()
        kd.teachers.__main__.main(["pack", str(built), "packed"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (*CACHED, "embed", "--queue", "100"),
        ("--no-labels", "kd", "--alpha", "1"),
    ],
    ids=["embed", "no-labels"],
)
def test_a_teacher_that_one_machine_has_serves_what_needs_no_labels_on_both(teacher, flags):
    shutil.copytree(teacher / "big", "node0/big")
    ended = run_nodes("distil", "--student", "resnet8", "--teacher", "big", *TEACHER, *flags)
    assert codes(ended) == [0, 0], ended
    assert (Path("node0/run/summary.json").exists(), Path("node1/run").exists()) == (True, False)


@pytest.mark.slow
def test_shared_logits_that_one_machine_lacks_are_refused_within_seconds_and_else_serve_both(teacher):
    shutil.copytree(teacher / "packed", "node0/packed")
    flags = (*SMALL, "--student", "resnet8", "--views", "2", "--cache-teacher", "./packed", *TEACHER, "kd")

    def student(rank):
        distill_student.main(parse(distill_defaults, "", list(flags)))

    started = time.monotonic()
    ended = two_nodes(student)
    assert time.monotonic() - started < QUICK
    assert codes(ended) == [2, 2]
    assert "error: process 1: --cache-teacher ./packed: no such folder" in ended[0].log
    shutil.copytree(teacher / "packed", "node1/packed")
    ended = two_nodes(student)
    assert codes(ended) == [0, 0], ended


def test_a_shared_cache_that_one_machine_lacks_is_refused_within_seconds(monkeypatch):
    Path("node0/cache").mkdir(parents=True)
    Path("node0/cache/answers.json").write_text('{"identity": {}, "blocks": []}')
    monkeypatch.setattr("kd.teachers.shared._check_manifest", lambda *args: None)

    def work(rank):
        Accelerator(cpu=True)
        open_cache("./cache")

    started = time.monotonic()
    ended = two_nodes(work)
    assert codes(ended) == [2, 2], ended
    assert time.monotonic() - started < QUICK
    assert "--cache-teacher ./cache: no such folder" in ended[1].log


@pytest.mark.slow
def test_a_machine_started_with_another_flag_is_refused_within_seconds():
    started = time.monotonic()
    ended = two_nodes(lambda rank: teach(*TEACHER, "--lr", str(0.1 + rank)))
    assert time.monotonic() - started < QUICK
    assert codes(ended) == [2, 2]
    for end in ended:
        assert "this is another run than the main process's (lr 0.1 there, 1.1 here)" in end.log
    assert not Path("node0/run").exists()
