"""Whatever a file or the command line holds, a user sees the right answer or one line, and never a traceback.

Files are broken at random, from sound ones: every reader either refuses with UserError or gives what it gave before.
"""

import contextlib
import copy
import io
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kd import metrics
from kd.config import DataConfig, DistillConfig
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.data import cache, load_data
from kd.errors import UserError
from kd.runs import checkpoint, results
from kd.runs.checkpoint import State
from kd.runs.folder import RunFolder, _read_state
from kd.runs.load import load_network
from kd.runs.table import show_results
from kd.teachers import shared
from kd.teachers.__main__ import main as teachers
from kd.teachers.cache import LogitStore
from kd.teachers.card import facts
from kd.utils import files, images
from tests.data.test_dataset import picture
from tests.run_scripts import distil, teach

# More of them: KD_FUZZ_EXAMPLES=2000 pytest tests/test_fuzz.py
EXAMPLES = int(os.environ.get("KD_FUZZ_EXAMPLES", "15"))
quick = settings(derandomize=True, deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))

NUMBERS = st.sampled_from([-1, 0, 1, 10**400, 2**63, 0.5, float("nan"), float("inf"), -0.0, True])
TEXTS = st.sampled_from(["", "x", "../../x", "\x00", "[red]", "\udcff", "os:system", "9" * 5000])
ODD = st.one_of(NUMBERS, TEXTS, st.sampled_from([None, [], {}, ["x"], [[1]], {"x": 1}, [1.0] * 3, [None] * 10]))
BYTES = st.one_of(st.binary(max_size=40), st.sampled_from([b"[" * 100_000, b"\xff\xfe{}", b"{}", b"null", b"[]", b"1"]))


@st.composite
def broken(draw, document: dict) -> bytes:
    """The JSON document with an entry of it replaced or left out, or something else altogether."""
    if draw(st.integers(0, 4)) == 0:
        return draw(BYTES)
    changed = copy.deepcopy(document)
    place, key = changed, draw(st.sampled_from(sorted(changed)))
    while isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
        place = place[key]
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    if draw(st.booleans()):
        place[key] = draw(ODD)
    else:
        del place[key]
    return json.dumps(changed).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The file cut off, with some of its bytes changed, or something else altogether."""
    if draw(st.integers(0, 4)) == 0:
        return draw(BYTES)
    changed = bytearray(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)
    for place in draw(st.lists(st.integers(0, min(len(changed), 400) - 1), max_size=4)) if changed else []:
        changed[place] = draw(st.integers(0, 255))
    return bytes(changed)


def refused(work, words: str = "") -> bool:
    """Whether `work` said what is wrong, with these words, instead of doing it; any other error goes through."""
    try:
        work()
    except UserError as error:
        return words in str(error) or pytest.fail(f"{words} is not named: {error}")
    return False


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A teacher and a cached student of its, both finished."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = ["--epochs", "2", "--classes", "4", "--batch-size", "90"]
        teach("--out", "run", "--model", "resnet8", *small)
        distil("--out", "student", "--teacher", "run", "--cache-teacher", "--views", "2", *small)
    return folder


def read_sound(path: Path) -> dict:
    return json.loads(path.read_text())


@quick
@given(data=st.data(), name=st.sampled_from(["model.json", "summary.json"]))
def test_a_network_is_loaded_right_or_refused(finished, data, name):
    folder = finished / "run"
    sound = (folder / name).read_bytes()
    wanted = load_network(folder, trust_code=False).network.state_dict()
    try:
        (folder / name).write_bytes(data.draw(broken(json.loads(sound))))
        if not refused(lambda: load_network(folder, trust_code=False)):
            got = load_network(folder, trust_code=False).network.state_dict()
            assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    finally:
        (folder / name).write_bytes(sound)


@pytest.mark.parametrize(
    "odd", [None, 0, -1, 10**400, float("nan"), "x", [], {}, [None] * 3, True, 2**40], ids=lambda odd: repr(odd)[:9]
)
def test_no_entry_of_model_json_ends_in_a_traceback(finished, odd):
    """At random some entries would rarely be met."""
    shutil.copytree(finished / "run", "copy")
    sound = read_sound(Path("copy/model.json"))
    for key in sound:
        Path("copy/model.json").write_text(json.dumps(sound | {key: odd}))
        said = refused(lambda: load_network(Path("copy"), trust_code=False))
        assert said or (key in ("deployed", "stored_size", "resized") and not odd)


@quick
@given(data=st.data())
def test_weights_are_read_right_or_refused(finished, data):
    folder = finished / "run"
    sound = (folder / "model.safetensors").read_bytes()
    try:
        (folder / "model.safetensors").write_bytes(data.draw(damaged(sound)))
        if not refused(lambda: load_network(folder, trust_code=False)):
            assert (folder / "model.safetensors").read_bytes() == sound
    finally:
        (folder / "model.safetensors").write_bytes(sound)


def small_training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


@quick
@given(data=st.data(), rehashed=st.booleans())
def test_row_6_a_checkpoint_is_restored_right_or_refused(data, rehashed):
    module, optimizer = small_training()
    state = State(
        step=3, threads=1, sums={"terms": ["ce"], "measures": [], "rows": [[1.0] * 5]}, history=[{"epoch": 1}]
    )
    folder = Path("checkpoint")
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint.save(folder, checkpoint.snapshot(state, module, optimizer, {}))
    saved = folder / "step-3"
    name = data.draw(st.sampled_from(["state.json", "manifest.json", "optimizer.safetensors", "model.safetensors"]))
    content = (saved / name).read_bytes()
    change = broken(json.loads(content)) if name.endswith("json") else damaged(content)
    (saved / name).write_bytes(data.draw(change))
    if rehashed and name != "manifest.json":  # as a stranger would who wants it believed
        manifest = read_sound(saved / "manifest.json")
        (saved / "manifest.json").write_text(json.dumps(manifest | {name: files.sha256_file(saved / name)}))
    if (saved / name).read_bytes() == content:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        if not refused(lambda: checkpoint.newest(folder)):
            assert rehashed or name == "manifest.json", "a change that no sha256 covers"
            refused(lambda: checkpoint.restore(saved, *small_training()))
        else:
            assert not rehashed or name == "manifest.json"


@quick
@given(data=st.data(), name=st.sampled_from(["manifest.json", "logits.npy"]))
def test_row_14_kept_answers_are_read_right_or_refused(finished, data, name):
    (folder,) = (finished / "runs/cache").iterdir()
    identity = read_sound(folder / "manifest.json")["identity"]
    sound = (folder / name).read_bytes()
    content = data.draw(broken(json.loads(sound)) if name == "manifest.json" else damaged(sound))
    assume(content != sound)
    try:
        (folder / name).write_bytes(content)
        if not refused(LogitStore(folder, identity).check):
            assert name == "manifest.json"
            assert {"identity": identity}.items() <= json.loads(content).items()
    finally:
        (folder / name).write_bytes(sound)


@quick
@given(data=st.data())
def test_row_14_a_shared_cache_is_read_right_or_refused(finished, data):
    (folder,) = (finished / "runs/cache").iterdir()
    if not (finished / "packed").exists():
        teachers(["pack", str(folder), str(finished / "packed")])
    path = finished / "packed/answers.json"
    sound = path.read_bytes()
    content = data.draw(broken(json.loads(sound)))
    assume(content != sound)
    try:
        path.write_bytes(content)

        def read() -> None:
            cache = shared.read_cache(path.parent, "cache:packed")
            facts(cache)
            cache.check()

        if not refused(read):
            now, before = json.loads(content), json.loads(sound)
            assert (now["blocks"], now["shards"]) == (before["blocks"], before["shards"])
    finally:
        path.write_bytes(sound)


@quick
@given(
    data=st.data(), name=st.sampled_from(["config.json", "summary.json", "metrics.jsonl", "test_logits.safetensors"])
)
def test_the_report_reads_a_run_right_or_lists_it(finished, data, name):
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree(finished / "run", "copy")
    sound = Path("copy", name).read_bytes()
    change = broken(json.loads(sound)) if name.endswith(".json") else damaged(sound)
    Path("copy", name).write_bytes(data.draw(change))
    runs, others = results.collect_runs(["copy"])
    assert len(runs) + len(others) == 1
    for run in runs:
        refused(lambda run=run: results.read_history(run))
        read = []
        if not refused(lambda run=run, read=read: read.append(results.read_test_logits(run.path, run.summary))):
            ((logits, labels),) = read
            assert len(labels) == run.summary["test_images"]
            assert abs(metrics.top_k(logits, labels, 1) - run.summary["test_top1"]) < 1e-6
    if name == "summary.json":
        refused(lambda: show_results(Path("copy")))


@quick
@given(data=st.data(), name=st.sampled_from(["config.json", "summary.json"]))
def test_row_35_a_run_folder_is_gone_on_with_or_refused(finished, data, name):
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree(finished / "run", "copy")
    record = read_sound(Path("copy/config.json"))
    run = RunFolder(Path("copy"), record["identity"])
    Path("copy", name).write_bytes(data.draw(broken(read_sound(Path("copy", name)))))
    job = parse(distill_defaults, "", ["none", "--out", "copy"]).job()
    if not refused(lambda: _read_state(run, job)):
        assert run.summary is None or run.summary["status"] == "finished"
        assert run.identity == record["identity"], "what was asked for is never changed by what lies there"
    refused(lambda: show_results(Path("copy")))


@quick
@given(
    data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), size=st.sampled_from([None, 8])
)
def test_row_29_an_image_is_decoded_or_its_row_is_named(data, kind, size):
    stored = io.BytesIO()
    picture(0).save(stored, kind)
    cell = {"bytes": data.draw(damaged(stored.getvalue())), "path": data.draw(TEXTS)}
    said = []
    if not refused(lambda: said.append(images.decode(cell, size, "train", 7)), "train row 7"):
        assert said[0].shape[0] == 3
        assert said[0].dtype == "uint8"


@quick
@given(data=st.data())
def test_decoded_data_is_believed_only_if_it_is_whole(data):
    wanted = load_data(DataConfig(source="synthetic"))
    folder = next((cache.cache_root() / "data").glob("synthetic-*/meta.json")).parent
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree(folder, "copy")
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    sound = Path("copy", name).read_bytes()
    Path("copy", name).write_bytes(data.draw(broken(json.loads(sound)) if name == "meta.json" else damaged(sound)))
    found = cache._load(Path("copy"))
    if found is not None:
        assert found[2] == wanted.fingerprint
        assert np.array_equal(found[0]["test"].images, wanted.test.images)
        assert np.array_equal(found[0]["test"].labels, wanted.test.labels)


FLAGS = ["--lr", "--epochs", "--batch-size", "--momentum", "--weight-decay", "--warmup-epochs", "--clip-norm", "--seed"]
FLAGS += ["--milestones", "--views", "--view-seed", "--mixup", "--cutmix", "--erase", "--crop-padding", "--classes"]
FLAGS += ["--image-size", "--val-fraction", "--split-seed", "--threads", "--log-every", "--save-every", "--temperature"]
FLAGS += ["--alpha", "--cache-top-k", "--teacher-seed", "--mixed-precision", "--schedule", "--data", "--student"]
VALUES = ["nan", "inf", "-inf", "-1", "0", "1", "1e400", "0.5", str(10**30), "", "x", "--", "\udcff", "None", "[red]"]


def parsed(args: list[str]) -> DistillConfig | None:
    """None where they were refused, by us or, with its box and exit code 2, by tyro."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(distill_defaults, "", args)
    except (UserError, SystemExit) as stop:
        assert getattr(stop, "code", 2) == 2  # noqa: PT017
        return None


@quick
@given(st.lists(st.tuples(st.sampled_from(FLAGS), st.sampled_from(VALUES)), max_size=3))
def test_row_44_flags_are_numbers_or_refused(pairs):
    config = parsed(list(itertools.chain(*pairs)))
    if config is not None:
        parts = [vars(part) for part in (config.data, config.views, config.fit, config.run, config.method)]
        numbers = [value for part in parts for value in part.values() if isinstance(value, float)]
        assert all(abs(number) < float("inf") for number in numbers)


def test_row_9_a_resumed_run_meets_the_same_refusals(finished):
    """The readers above are those that the script uses: one broken checkpoint through the real thing."""
    shutil.copytree(finished / "run", "copy")
    Path("copy/summary.json").unlink()
    for manifest in Path("copy/checkpoint").glob("step-*/manifest.json"):
        manifest.write_text("[1]")
    args = ["--out", "copy", "--model", "resnet8", "--epochs", "2", "--classes", "4", "--batch-size", "90", "--resume"]
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(UserError, match="every checkpoint"):
        teach(*args)
