"""The teacher's kept answers: the very ones a live teacher gives, and refused where anything does not match."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from kd import types
from kd.config import DataConfig
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.data import load_data, loader
from kd.errors import UserError
from kd.teachers.cache import ROOT, LogitStore, cached_logits
from kd.teachers.live import live_logits
from kd.teachers.load import load_teacher
from tests.conftest import ROOT as PROJECT
from tests.run_scripts import STUDENT, differences, distil, script, teach, torchrun

CACHED = ["--views", "2", "--teacher", "teacher", "--trust-code", "--cache-teacher"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher with BatchNorm, trained once for this file."""
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--out", "teacher", "--model", "resnet8")
    return folder / "teacher"


@pytest.fixture(autouse=True)
def teacher_here(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "teacher")


def opened(*args: str, seed: int = 0):
    """The cached teacher that a student with these flags would have, with data, job and the live one."""
    job = parse(distill_defaults, "", [*STUDENT, *CACHED, "--seed", str(seed), *args]).job()
    data = load_data(DataConfig(source="synthetic"))
    frozen = load_teacher(Path("teacher"), data, torch.device("cpu"), trust_code=True)
    accelerator = Accelerator(cpu=True)
    return (
        cached_logits(frozen, data, job, accelerator),
        live_logits(frozen.network, accelerator),
        data,
        job,
        accelerator,
    )


def cache_folder() -> Path:
    (folder,) = ROOT.iterdir()
    return folder


MIXED = ["--views", "2", "--mixup", "0.4", "--cutmix", "1.0", "--erase", "0.5"]
POLICY = [
    "--views",
    "2",
    "--epochs",
    "4",
    "--mixup",
    "0.4",
    "--mix-off-epochs",
    "2",
    "--hue",
    "0.1",
    "--blur",
    "0.5",
    "--policy",
]


@pytest.mark.parametrize(
    ("views", "dtype"),
    [
        (["--views", "3"], "float16"),
        (MIXED, "float32"),
        ([*POLICY, "augmix"], "float32"),
        pytest.param([*POLICY, "trivial"], "float32", marks=pytest.mark.slow),
        pytest.param([*POLICY, "rand", "--alternating-flip"], "float32", marks=pytest.mark.slow),
        pytest.param(["--views", "3"], "float32", marks=pytest.mark.slow),
        pytest.param(MIXED, "float16", marks=pytest.mark.slow),
    ],
)
def test_row_21_cached_answers_are_the_live_ones_for_every_epoch_and_seed(views, dtype):
    for seed in (0, 1):
        kept, asked, data, job, accelerator = opened("--cache-dtype", dtype, *views, seed=seed)
        for epoch in range(4):
            for batch in loader.Batches(data, job, accelerator).epoch(epoch):
                one, other = kept(batch).logits, asked(batch).logits
                if dtype == "float32":
                    assert torch.equal(one, other)
                else:
                    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert len(list(ROOT.iterdir())) == 1, "one cache serves students of every seed"


@pytest.mark.parametrize("views", [["--views", "3"], [*MIXED, "--strong-magnitude", "10"]])
def test_row_21_a_cache_has_the_live_answers_for_the_strong_view_too(views):
    kept, asked, data, job, accelerator = opened("--cache-dtype", "float32", *views, "mlkd")
    for epoch in range(4):
        for batch in loader.Batches(data, job, accelerator).epoch(epoch):
            one, other = kept(batch), asked(batch)
            assert torch.equal(one.logits, other.logits)
            assert torch.equal(one.strong, other.strong)
            assert not torch.equal(one.logits, one.strong)


def test_row_21_with_two_views_weights_are_bit_equal_to_a_live_teachers():
    flags = ["--epochs", "2", "mlkd"]
    distil("--out", "live", *CACHED[:-1], *flags)
    distil("--out", "cached", *CACHED, "--cache-dtype", "float32", *flags)
    assert differences(Path("live"), Path("cached")) == []


def test_a_method_with_one_view_has_the_cache_that_it_always_had(capsys):
    """Neither its identity nor its files tell that others have two."""
    opened()
    path = cache_folder()
    manifest = json.loads((path / "manifest.json").read_text())
    assert not any("strong" in key for part in (manifest["identity"], *manifest["blocks"]) for key in part)
    assert not any("strong" in key for key in manifest["identity"]["views"])
    opened("--strong-ops", "5")
    assert list(ROOT.iterdir()) == [path], "a flag of the strong view changes nothing here"
    capsys.readouterr()
    opened("mlkd")
    opened("--strong-ops", "5", "mlkd")
    assert len(list(ROOT.iterdir())) == 3
    assert "0.072 MB for 2 views, weak and strong, of 900 images" in capsys.readouterr().out


def test_row_21_weights_after_training_are_bit_equal_to_a_live_teachers(monkeypatch):
    asked = 0
    real = live_logits

    def counting(*args, **options):
        answer = real(*args, **options)

        def count(batch):
            nonlocal asked
            asked += 1
            return answer(batch)

        return count

    distil("--out", "live", *CACHED[:-1], "--epochs", "3")
    monkeypatch.setattr("kd.teachers.cache.live_logits", counting)
    distil("--out", "cached", *CACHED, "--cache-dtype", "float32", "--epochs", "3")
    assert asked == 2 * 18 + 2, "two views of 900 rows in batches of 50, and the two probes"
    assert differences(Path("live"), Path("cached")) == []
    distil("--out", "again", *CACHED, "--cache-dtype", "float32", "--epochs", "3", "--seed", "1")
    assert asked == 2 * 18 + 4, "the second student costs the two probes alone"


@pytest.mark.parametrize("method", [["deit"], ["ofa", "--student-layers", "0"]], ids=lambda method: method[0])
def test_row_21_a_method_with_another_head_needs_the_teachers_logits_alone(method):
    flags = [*MIXED, "--epochs", "1", *method]
    distil("--out", "live", *CACHED[:-1], *flags)
    distil("--out", "cached", *CACHED, "--cache-dtype", "float32", *flags)
    assert list(ROOT.iterdir()), "looked up"
    assert differences(Path("live"), Path("cached")) == []


def test_rows_are_looked_up_by_index_and_view_not_by_position():
    kept, _, data, job, accelerator = opened("--cache-dtype", "float32")
    batch = next(iter(loader.Batches(data, job, accelerator).epoch(0)))
    back = batch._replace(index=batch.index.flip(0))
    assert torch.equal(kept(back).logits, kept(batch).logits.flip(0))
    assert not torch.equal(kept(batch._replace(view=torch.tensor(1))).logits, kept(batch).logits)


@pytest.mark.parametrize("view", ["logits", "strong"])
def test_top_k_keeps_the_largest_logits_and_the_rests_mass(view):
    full, *_ = opened("--cache-dtype", "float32", "mlkd")
    kept, _, data, job, accelerator = opened("--cache-dtype", "float32", "--cache-top-k", "3", "mlkd")
    for batch in loader.Batches(data, job, accelerator).epoch(0):
        whole, few = getattr(full(batch), view), getattr(kept(batch), view)
        values, classes = whole.topk(3, dim=1)
        assert torch.equal(few.gather(1, classes), values)
        torch.testing.assert_close(few.logsumexp(1), whole.logsumexp(1), rtol=1e-5, atol=1e-5)
        rest = few.scatter(1, classes, 0.0)
        assert all(len(set(row[row != 0].tolist())) == 1 for row in rest)


def test_views_of_zero_and_methods_without_logits_are_refused():
    with pytest.raises(UserError, match="--cache-teacher: needs --views K above 0"):
        parse(distill_defaults, "", ["--cache-teacher"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher_sha256", "0" * 64),
        ("rows_sha256", "0" * 64),
        ("normalisation", [[0.5] * 3, [0.25] * 3]),
        ("precision", "bf16"),
        ("dtype", "float32"),
        ("rows", 901),
    ],
)
def test_row_15_another_caches_manifest_is_refused_with_both_values(key, value):
    opened()
    path = cache_folder() / "manifest.json"
    manifest = json.loads(path.read_text())
    ours = manifest["identity"][key]
    manifest["identity"][key] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has other logits") as error:
        opened()
    assert f"{key}: {value} there, {ours} here" in str(error.value)


@pytest.mark.parametrize("flags", [["--view-seed", "1"], ["--no-flip"], ["--crop-padding", "2"], ["--views", "3"]])
def test_row_16_other_views_are_other_caches(flags):
    opened()
    opened(*flags)
    assert len(list(ROOT.iterdir())) == 2


@pytest.mark.parametrize("name", ["logits.npy", "strong_logits.npy"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "reshaped", "missing"])
def test_row_14_a_damaged_cache_is_refused(damage, name):
    opened("mlkd")
    path = cache_folder() / name
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "reshaped":
        np.save(path, np.zeros((2, 899, 10), np.float16))
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"/{name}|view 1 changed since it was built"):
        opened("mlkd")


@pytest.mark.parametrize(("name", "view"), [("logits", "view"), ("strong_logits", "the strong view")])
def test_row_17_rows_in_another_order_are_another_cache_and_a_forged_one_is_found_out(name, view):
    """Were every hash forged, the rows that are recomputed at each start would still not agree."""
    opened("mlkd")
    store = cache_folder()
    logits = np.load(store / f"{name}.npy", mmap_mode="r+")
    logits[:] = logits[:, ::-1].copy()
    logits.flush()
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["blocks"] = [LogitStore(store, manifest["identity"]).block(view) for view in range(2)]
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"the teacher now gives other logits for {view} 0"):
        opened("mlkd")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_row_20_answers_that_are_not_finite_are_refused_when_built(monkeypatch, value):
    monkeypatch.setattr("kd.teachers.cache._query", lambda *_: iter([types.Outputs(torch.full((50, 10), value))]))
    with pytest.raises(UserError, match=r"not finite as float16: .*--cache-dtype float32"):
        opened()


@pytest.mark.parametrize("name", ["logits", "strong_logits"])
def test_row_20_nan_in_a_sealed_cache_is_refused_when_loaded(name):
    opened("mlkd")
    store = cache_folder()
    logits = np.load(store / f"{name}.npy", mmap_mode="r+")
    logits[1, 5, 5] = np.nan
    logits.flush()
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["blocks"] = [LogitStore(store, manifest["identity"]).block(view) for view in range(2)]
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="view 1 has NaN or infinity"):
        opened("mlkd")


@pytest.mark.parametrize("method", ["kd", "mlkd"])
def test_row_18_a_killed_build_continues_and_ends_in_the_same_bytes(monkeypatch, method):
    opened("--cache-top-k", "3", method)
    whole = {path.name: path.read_bytes() for path in cache_folder().glob("*.npy")}
    assert len(whole) == (2 if method == "kd" else 4)
    shutil.rmtree(ROOT)
    real, count = LogitStore.write, 0

    def write(self, *args):
        nonlocal count
        count += 1
        if count == 25:  # in the middle of the second view
            raise KeyboardInterrupt
        real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LogitStore, "write", write)
        opened("--cache-top-k", "3", method)
    manifest = json.loads((cache_folder() / "manifest.json").read_text())
    assert len(manifest["blocks"]) == 1, "the half-done view is not believed"
    count = -1000
    monkeypatch.setattr(LogitStore, "write", write)
    opened("--cache-top-k", "3", method)
    assert count == -1000 + 18, "the first view is not computed again"
    assert {path.name: path.read_bytes() for path in cache_folder().glob("*.npy")} == whole


def test_row_19_a_second_builder_waits_for_the_first_and_reuses_what_it_built(capsys, monkeypatch):
    opened()
    folder = cache_folder().resolve()
    holder = "from pathlib import Path; from kd.utils.system import Lock; "
    holder += f"lock = Lock(Path({str(folder / 'lock')!r})); lock.acquire(); print('held', flush=True); open(0).read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", holder], **pipes) as process:

        def release(seconds: float) -> None:
            process.stdin.close()
            process.wait()

        monkeypatch.setattr("time.sleep", release)  # the first builder goes on until the second one waits
        assert process.stdout.readline() == "held\n"
        capsys.readouterr()
        opened()
        said = capsys.readouterr().out
    assert said.count("waiting for another process to finish") == 1
    assert "stored" not in said, "nothing was computed again"


@pytest.mark.slow
def test_row_19_two_builders_at_once_build_once():
    args = [*STUDENT, *CACHED, "--threads", "1"]
    command = [sys.executable, str(PROJECT / "distill_student.py"), *args]
    both = [
        subprocess.Popen([*command, "--seed", seed], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for seed in "01"
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(text.count("of 2 stored") for text in said) == [0, 2]


@pytest.mark.slow
def test_two_processes_build_what_one_builds():
    opened()
    whole = np.load(cache_folder() / "logits.npy")
    shutil.rmtree(ROOT)
    args = [*STUDENT, *CACHED, "--out", "run", "--epochs", "1"]
    done = script("distill_student.py", *args, env={"ACCELERATE_USE_CPU": "true"}, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    # Batches of 25 rather than 50 may round differently in the last bit of a half.
    np.testing.assert_allclose(np.load(cache_folder() / "logits.npy"), whole, rtol=1e-3, atol=1e-3)
