"""A cache that is taken without its teacher: the very same answers, and refused where anything does not match."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import distill_student
from kd.config import DataConfig
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.data import Data, load_data, loader
from kd.data.rows import Split
from kd.errors import UserError
from kd.export.__main__ import main as export
from kd.runs.folder import RunInputs, run_identity
from kd.teachers import card, shared
from kd.teachers.__main__ import main as teachers
from kd.teachers.cache import ROOT, cached_logits
from kd.teachers.load import load_teacher
from kd.training.python import read_flags
from kd.utils.files import write_weights
from tests.conftest import ROOT as PROJECT
from tests.hub_server import hub
from tests.run_scripts import SMALL, differences, script, teach, torchrun
from tests.training.test_resume import Killed, die_at

STUDENT = [*SMALL, "--student", "tests.networks:normalised"]
VIEWS = ["--views", "2", "--hue", "0.1", "--no-flip"]
# What a run with the teacher's network knows more, and where its teacher is.
MORE = {"teacher", "teacher_model", "teacher_test_top1", "agreement", "shared_cache"}


def job(*args: str):
    return parse(distill_defaults, "", [*STUDENT, *args]).job()


def student(*args: str) -> None:
    """distill_student.py in this process; it names no teacher of its own."""
    distill_student.main(parse(distill_defaults, "", [*STUDENT, "--wandb", "disabled", *args]))


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data(DataConfig(source="synthetic"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, data):
    """By name: caches of one teacher as `--cache-teacher` builds them, and the teacher."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        teach("--out", "teacher", "--model", "resnet8", "--epochs", "1")
        teacher = load_teacher(Path("teacher"), data, torch.device("cpu"), trust_code=False)
        flags = {"plain": [*VIEWS, "kd"], "two": [*VIEWS, "--cache-top-k", "3", "--cache-dtype", "float32", "mlkd"]}
        for name, args in flags.items():
            cached_logits(teacher, data, job("--cache-teacher", *args), Accelerator(cpu=True), Path(name))
            (built,) = Path(name).iterdir()
            built.rename(name + "-cache")
    return folder


@pytest.fixture
def here(made, tmp_path):
    """The caches and the teacher, in this test's own folder."""
    for name in ("plain-cache", "two-cache", "teacher"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def packed(here, monkeypatch):
    """Both caches packed, in files of 250 rows of the plain one."""
    monkeypatch.setattr(shared, "SHARD_BYTES", 5000)
    for name in ("plain", "two"):
        teachers(["pack", f"{name}-cache", name, "--license", "mit"])
    return here


def opened(name: str, *args: str):
    """A cache, checked against the flags of a student."""
    return shared.find_shared(job("--cache-teacher", f"./{name}", *args))


@pytest.mark.parametrize("kind", ["plain", "two"])
@pytest.mark.parametrize("method", ["kd", "mlkd"])
def test_row_21_packed_logits_are_those_that_were_stored(packed, data, kind, method):
    if (kind, method) == ("plain", "mlkd"):
        with pytest.raises(UserError, match="mlkd needs those of a strong one too"):
            opened(kind, *VIEWS, method)
        return
    task, accelerator = job("--cache-teacher", f"./{kind}", *VIEWS, method), Accelerator(cpu=True)
    cache = opened(kind, *VIEWS, method)
    assert len(cache.shards) > 5
    taught = shared.shared_teacher(cache, task, data)
    there, here = (
        taught.shared.open(accelerator),
        shared.open_cache(f"./{kind}-cache").store.teacher(accelerator.device),
    )
    for epoch in range(2):
        for batch in loader.Batches(data, task, accelerator).epoch(epoch):
            one, other = there(batch), here(batch)
            assert torch.equal(one.logits, other.logits)
            assert one.strong is None if method == "kd" else torch.equal(one.strong, other.strong)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("plain", ["kd"]),
        pytest.param("two", ["mlkd"], marks=pytest.mark.slow),
        ("plain", ["ofa", "--student-layers", "0"]),
    ],
    ids=["kd", "mlkd", "ofa"],
)
def test_row_21_a_student_of_shared_logits_ends_in_the_same_bytes(packed, kind, method):
    stored = ["--cache-top-k", "3", "--cache-dtype", "float32"] if kind == "two" else []
    student("--teacher", "teacher", "--cache-teacher", *stored, *VIEWS, "--out", "local", *method)
    for name in ("teacher", "runs"):
        shutil.rmtree(name)
    for source in (f"./{kind}", f"./{kind}-cache"):
        student("--cache-teacher", source, *VIEWS, "--out", "shared", *method)
        assert set(differences(Path("local"), Path("shared"))) <= MORE
        summary, config = (json.loads(Path("shared", f"{name}.json").read_text()) for name in ("summary", "config"))
        assert (summary["teacher"], summary["teacher_model"]) == (f"cache:{source}", "resnet8")
        assert summary["teacher_test_top1"] is summary["agreement"] is None
        assert config["identity"]["shared_cache"] == summary["shared_cache"]["sha256"] == opened(kind, *VIEWS).sha256
        shutil.rmtree("shared")


def test_row_4_killed_with_shared_logits_it_resumes_to_the_same_bytes(packed, monkeypatch):
    flags = ["--cache-teacher", "./plain", *VIEWS, "--save-every", "4"]
    student(*flags, "--out", "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 23)
        student(*flags, "--out", "run")
    student(*flags, "--out", "run", "--resume")
    assert differences(Path("whole"), Path("run")) == []


def test_row_12_resumed_with_another_cache_is_refused(packed, monkeypatch):
    flags = [*VIEWS, "--out", "run"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 23)
        student(*flags, "--cache-teacher", "./plain")
    with pytest.raises(UserError, match=r"run has another run \(shared-cache \w{64} there, \w{64} here\)"):
        student(*flags, "--cache-teacher", "./two", "--resume")


def test_the_identity_has_the_logits_and_not_where_they_lie(data):
    accelerator = Accelerator(cpu=True)
    identities = [
        run_identity(job("--cache-teacher", source, *VIEWS), data, accelerator, RunInputs("t", (), {}, record))
        for source, record in (
            ("./a", {"source": "cache:./a", "sha256": "1"}),
            ("hub:b/c", {"source": "x", "sha256": "1"}),
        )
    ]
    assert identities[0] == identities[1]
    local = run_identity(job("--cache-teacher", *VIEWS), data, accelerator, RunInputs("t"))
    assert {key for key in local if "cache" in key} == {"cache_teacher", "cache_dtype", "cache_top_k"}


def changed(data: Data, images=None, labels=None, **others) -> Data:
    """The data with other training rows."""
    rows = data.train
    split = Split(rows.images if images is None else images, rows.labels if labels is None else labels)
    return dataclasses.replace(data, train=split, **others)


def brighter(images: torch.Tensor) -> torch.Tensor:
    images = images.clone()
    images[7, 0, 3, 3] ^= 1
    return images


OTHER_DATA = {
    "one pixel": (
        lambda d: changed(d, brighter(d.train.images)),
        r"is of other training images \(sha256 .*give the images",
    ),
    "order": (
        lambda d: changed(d, d.train.images.flip(0), d.train.labels.flip(0)),
        "is of the same training images in another order",
    ),
    "labels": (lambda d: changed(d, labels=(d.train.labels + 1) % 10), "or with other labels"),
    "fewer": (
        lambda d: changed(d, d.train.images[:-1], d.train.labels[:-1]),
        "is of 900 training images, and yours are 899",
    ),
    "size": (
        lambda d: changed(d, torch.nn.functional.pad(d.train.images, (1, 1, 1, 1)), size=(18, 18)),
        "is of images of 16 x 16 pixels, and yours have 18 x 18",
    ),
    "stored size": (
        lambda d: changed(d, torch.nn.functional.pad(d.train.images, (1, 1, 1, 1))),
        "is of stored images of 16 x 16 pixels, and yours have 18 x 18",
    ),
    "a class": (
        lambda d: dataclasses.replace(d, classes=(*d.classes[:-1], "dog")),
        "its class 9 is 'picture 9', and yours is 'dog'",
    ),
    "classes' order": (lambda d: dataclasses.replace(d, classes=d.classes[::-1]), "its classes are in another order"),
    "fewer classes": (lambda d: dataclasses.replace(d, classes=d.classes[:-1]), "has 10 classes, and your data 9"),
}


@pytest.mark.parametrize("what", OTHER_DATA)
def test_row_17_other_images_order_or_classes_are_refused_in_one_line(packed, data, what):
    change, message = OTHER_DATA[what]
    shared.check_rows(opened("plain", *VIEWS), job(*VIEWS), data)
    with pytest.raises(UserError, match=message) as error:
        shared.check_rows(opened("plain", *VIEWS), job(*VIEWS), change(data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--val-fraction", "0.2"], "is of 900 training images, and yours are 800; leave --val-fraction out"),
        (["--split-seed", "3"], r"is of other training images .*; leave --split-seed out"),
        (["--classes", "9"], "has 10 classes, and your data 9; leave --classes out"),
        (["--no-labels"], r"is of other training images .*; leave --no-labels out$"),
    ],
)
def test_flags_of_the_data_that_differ_are_named(packed, flags, advice):
    task = job(*VIEWS, *flags)
    with pytest.raises(UserError, match=advice):
        shared.check_rows(opened("plain", *VIEWS), task, load_data(task.data))


def test_crops_of_the_same_stored_images_are_other_images(packed, data):
    """Their rows have one hash. A cache from before the data was described says so by its identity alone."""
    Path("plain-cache/about.json").unlink()
    cropped = dataclasses.replace(data, size=(12, 12))
    shared.check_rows(opened("plain-cache", *VIEWS), job(*VIEWS), data)
    for name in ("plain", "plain-cache"):
        with pytest.raises(UserError, match="16 x 16 pixels, and yours have 12 x 12"):
            shared.check_rows(opened(name, *VIEWS), job(*VIEWS), cropped)


def test_a_size_to_leave_out_is_named(packed, data):
    images = torch.nn.functional.pad(data.train.images, (1, 1, 1, 1))
    with pytest.raises(UserError, match="leave --image-size out"):
        task = job(*VIEWS, "--image-size", "18")
        shared.check_rows(opened("plain", *VIEWS), task, changed(data, images, size=(18, 18)))


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--views", "3"], r"--views 2 there, 3 here\); give --views 2$"),
        (["--view-seed", "4"], r"leave --view-seed out$"),
        (
            ["--flip", "--policy", "rand", "--policy-ops", "3"],
            "give --no-flip and leave --policy and --policy-ops out$",
        ),
        (["--resized-crop", "0.5", "--crop-ratio", "0.5", "2"], "leave --resized-crop and --crop-ratio out$"),
        (["--mixup", "1", "--mix-off-epochs", "1"], "leave --mixup and --mix-off-epochs out$"),
    ],
)
def test_row_16_other_views_are_refused_with_the_flags_to_give(packed, flags, advice):
    with pytest.raises(UserError, match=advice):
        opened("plain", *VIEWS, *flags)


def test_without_views_the_flags_to_give_are_named(packed):
    with pytest.raises(UserError, match=r"give --no-flip --views 2 --hue 0.1$"):
        opened("plain")


def test_flags_of_the_strong_view_count_for_methods_that_see_it(packed):
    opened("two", *VIEWS, "--strong-ops", "4", "kd")
    with pytest.raises(UserError, match="leave --strong-ops out"):
        opened("two", *VIEWS, "--strong-ops", "4", "mlkd")


@pytest.mark.parametrize(("theirs", "ours", "remedy"), [(2, 1, "update kd"), (1, 2, "take the kd that built it")])
def test_row_16_views_of_another_version_are_refused(packed, monkeypatch, theirs, ours, remedy):
    manifest = json.loads(Path("plain/answers.json").read_text())
    if theirs != 1:
        manifest["identity"]["views_version"] = theirs
    Path("plain/answers.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(shared, "VERSION", ours)
    with pytest.raises(UserError, match=f"views of version {theirs}, and this kd draws version {ours}: {remedy}"):
        opened("plain", *VIEWS)


def test_row_16_a_cache_of_another_version_is_another_cache(here, data, monkeypatch):
    """Of version 1 it has the identity that it always had."""
    teacher = load_teacher(Path("teacher"), data, torch.device("cpu"), trust_code=False)
    task, accelerator = job("--cache-teacher", *VIEWS), Accelerator(cpu=True)
    cached_logits(teacher, data, task, accelerator)
    monkeypatch.setattr("kd.teachers.cache.VERSION", 2)
    cached_logits(teacher, data, task, accelerator)
    identities = [json.loads((path / "manifest.json").read_text())["identity"] for path in ROOT.iterdir()]
    assert sorted(identity.get("views_version", 1) for identity in identities) == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, and this kd reads 1; update kd"),
        ({"shards": [{"file": "../../secret", "rows": [0, 1800]}]}, "lists no valid files"),
        ({"shards": [{"file": "answers-00001-of-00001.safetensors", "rows": [0, 1799]}]}, "lists no valid files"),
        ({"blocks": "none"}, "has no valid blocks"),
        ({"about": []}, "is malformed"),
        ({"identity": []}, "is malformed"),
    ],
)
def test_a_manifest_that_this_kd_cannot_read_is_refused(packed, change, message):
    path = Path("plain/answers.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        opened("plain", *VIEWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": {"count": "two"}}, "no valid number of views"),
        ({"views": {"count": 0}}, "no valid number of views"),
        ({"views": {"sharpen": 3}}, r"does not know \(sharpen\); update kd"),
        ({"dtype": "object"}, "no valid dtype"),
        ({"kind": "embedding"}, "has the teacher's embedding, and kd needs its logits"),
    ],
)
def test_an_identity_that_this_kd_does_not_know_is_refused(packed, change, message):
    path = Path("plain/answers.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"identity": content["identity"] | change}))
    with pytest.raises(UserError, match=message):
        opened("plain", *VIEWS)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "swapped", "another type"])
def test_row_14_a_damaged_shared_cache_is_refused(packed, damage):
    first, second = sorted(Path("plain").glob("answers-*"))[:2]
    content = bytearray(first.read_bytes())
    if damage == "truncated":
        first.write_bytes(content[:-100])
    elif damage == "flipped":
        content[-1] ^= 1
        first.write_bytes(content)
    elif damage == "missing":
        first.unlink()
    elif damage == "swapped":
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    else:
        write_weights(first, {"logits": torch.zeros(250, 10)})
    with pytest.raises(
        UserError, match=r"answers-00001.*; remove plain|view 0 changed since it was built; remove plain"
    ):
        opened("plain", *VIEWS).check()


@pytest.mark.parametrize("method", ["at", "simkd", "crd", "reviewkd", "kd+at"])
def test_a_method_that_needs_the_network_is_refused(packed, method):
    with pytest.raises(
        UserError, match=f"{method.replace('+', '.')}: compares features of the teacher.*has its logits alone"
    ):
        student("--student", "resnet8", "--cache-teacher", "./plain", *VIEWS, method)
    assert not Path("runs").exists()


def test_from_python_too():
    config = read_flags(distill_defaults, {"cache_teacher": "hub:me/x", "views": 2})
    assert (config.cache.cache_teacher, config.cache.cache_from) == (True, "hub:me/x")


def test_a_method_without_a_teacher_takes_nothing_from_it(tmp_path, capsys):
    student("--cache-teacher", "hub:nobody/nothing", "--views", "2", "--epochs", "1", "none")
    assert "none has no teacher: --cache-teacher does nothing" in capsys.readouterr().out


def test_erased_boxes_bind_the_normalisation_and_nothing_else_does(packed, data):
    cache = opened("plain", *VIEWS)
    other = dataclasses.replace(data, mean=(0.5,) * 3)
    shared.check_rows(cache, job(*VIEWS), other)
    with pytest.raises(UserError, match="was erased with another mean than your images have; leave --init out"):
        shared.check_rows(cache, job(*VIEWS, "--erase", "0.5"), other)


def test_an_export_of_its_student_has_no_path_of_this_machine(packed, tmp_path):
    student("--cache-teacher", str(tmp_path / "plain"), *VIEWS, "--epochs", "1", "--student", "resnet8", "--out", "run")
    export(["run", "--formats", "safetensors"])
    assert "only its logits were there" in Path("run/export/export.md").read_text()
    for path in Path("run/export").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_check_tells_what_a_cache_is(packed, capsys):
    capsys.readouterr()
    for name in ("two", "two-cache"):
        teachers(["check", name])
        told = capsys.readouterr().out
        assert f"{name}: 2 of 2 views" in told
        assert "resnet8 (teacher, test top-1 " in told
        assert "synthetic: 900 training images, 16 x 16 pixels" in told
        assert "--hue 0.1 --no-flip --views 2; version" in told, "the flags of the views, and no others"
        assert "logits, float32, the 3 largest and the others' mass" in told
        assert told.endswith("complete; every view has the hash that it was stored with\n")


def test_the_command_of_the_card_is_the_one_to_give(packed, data):
    for name in ("plain", "two"):
        text = Path(name, "README.md").read_text()
        assert text.startswith("---\nlicense: mit\n")
        (line,) = [line for line in text.splitlines() if line.startswith("    accelerate launch")]
        config = parse(distill_defaults, "", line.split()[3:])
        cache = shared.find_shared(config.job())
        shared.check_rows(cache, config.job(), load_data(config.data))
        assert config.cache.cache_from == f"./{name}"


def test_flags_keep_their_digits_and_their_spaces(packed, data):
    cache = shared.find_shared(job(*VIEWS, "--cache-teacher", "./plain"))
    cache.about["data"] |= {"source": "my photos", "label": "the class"}
    cache.identity["views"].update(crop_ratio=[4 / 3 - 0.6, 4 / 3], resized_crop=0.25)
    config = parse(distill_defaults, "", shlex.split(card.command(cache, "./plain")))
    assert (config.data.source, config.data.label) == ("my photos", "the class")
    assert config.views.crop_ratio == (4 / 3 - 0.6, 4 / 3)
    assert config.views.resized_crop == 0.25


def test_what_is_pushed_has_no_path_of_this_machine(here, data, tmp_path):
    teacher = load_teacher(Path("teacher").resolve(), data, torch.device("cpu"), trust_code=False)
    cached_logits(teacher, data, job("--cache-teacher", *VIEWS), Accelerator(cpu=True))
    (built,) = ROOT.iterdir()
    teachers(["pack", str(built), "plain"])
    for path in Path("plain").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def half_built(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | {"blocks": content["blocks"][:1]}))


def one_bit(folder: Path) -> None:
    content = bytearray((folder / "logits.npy").read_bytes())
    content[-3] ^= 1
    (folder / "logits.npy").write_bytes(content)


@pytest.mark.parametrize(("harm", "message"), [(half_built, "has 1 of 2 views"), (one_bit, "view 1 changed since")])
def test_an_incomplete_or_changed_cache_is_not_shared(here, monkeypatch, harm, message):
    monkeypatch.setattr("kd.teachers.__main__.push_dataset", lambda *_: pytest.fail("was pushed"))
    harm(Path("plain-cache"))
    before = set(Path().iterdir())
    for command in (["pack", "plain-cache", "out"], ["push", "plain-cache", "me/logits"], ["check", "plain-cache"]):
        with pytest.raises(UserError, match=message):
            teachers(command)
    assert set(Path().iterdir()) == before


def test_a_cache_that_is_being_built_is_not_shared(here):
    holder = "import time; from kd.utils.system import Lock; from pathlib import Path; "
    holder += "lock = Lock(Path('plain-cache/lock')); lock.acquire(); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="plain-cache: is in use by another process"):
            teachers(["pack", "plain-cache", "out"])
    finally:
        process.kill()
        process.communicate()


def test_interrupted_while_packing_nothing_half_written_is_left(here, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = set(Path().iterdir())
    monkeypatch.setattr(shared, "write_json", interrupt)
    for command in (["pack", "plain-cache", "out"], ["push", "plain-cache", "me/logits"]):
        with pytest.raises(KeyboardInterrupt):
            teachers(command)
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nothing", "--cache-teacher ./nothing: no such folder"),
        ("me/nothing", "no such folder; write hub:me/nothing for the Hub's"),
        ("./teacher", "has neither answers.json nor manifest.json; name a cache"),
        ("hub:me/nothing", "hub:me/nothing: cannot be downloaded from the Hub"),
    ],
)
def test_a_source_that_is_no_cache_is_refused(here, source, message):
    with pytest.raises(UserError, match=message) as error:
        student("--cache-teacher", source, *VIEWS)
    assert "\n" not in str(error.value)


def on(server, *command: str, token: str = "", offline: bool = False, **more: str) -> subprocess.CompletedProcess:
    """A command of this project with this server as the Hub."""
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(Path.cwd() / "home"), "HF_HUB_OFFLINE": str(int(offline))}
    env = {**os.environ, **settings, "HF_TOKEN": token, **more}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_cache_pushed_to_and_taken_from_the_hub_gives_the_same_student_bytes(here):
    """With a network, without one, and on two processes."""
    student("--teacher", "teacher", "--cache-teacher", *VIEWS, "--out", "local")
    for name in ("teacher", "runs"):
        shutil.rmtree(name)
    flags = [str(PROJECT / "distill_student.py"), *STUDENT, *VIEWS, "--threads", "1", "--wandb", "disabled"]
    old = {"answers-00001-of-00002.safetensors": b"of an earlier push", "notes.txt": b"my own"}
    with hub({"datasets/me/logits": old}) as server:
        refused = on(server, "-m", "kd.teachers", "push", "plain-cache", "me/logits")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert "upload failed" in refused.stderr
        assert "hf auth login" in refused.stderr
        sent = on(server, "-m", "kd.teachers", "push", "plain-cache", "me/logits", "--private", token="hf_right")
        assert sent.returncode == 0, sent.stderr
        assert f"pushed: {server.url}/datasets/me/logits\n" in sent.stdout
        request = server.created[-1]
        assert request["type"] == "dataset"
        assert request.get("private", request.get("visibility") == "private") is True
        files = {"README.md", "answers.json", "answers-00001-of-00001.safetensors", "notes.txt"}
        assert server.files["datasets/me/logits"].keys() == files
        taken = on(server, *flags, "--cache-teacher", "hub:me/logits", "--out", "taken")
        assert taken.returncode == 0, taken.stderr
        assert "datasets/me/logits/resolve/" + "0" * 40 + "/notes.txt" not in server.asked
        pinned = on(server, "-m", "kd.teachers", "check", "hub:me/logits@v2")
        assert pinned.stdout.startswith("hub:me/logits@" + "2" * 40), pinned.stderr
        unknown = on(server, *flags, "--cache-teacher", "hub:me/other")
        assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1), unknown.stderr
    offline = on(server, *flags, "--cache-teacher", "hub:me/logits", "--out", "offline", offline=True)
    assert offline.returncode == 0, offline.stderr
    gone = on(
        server, *torchrun(2)[1:], *flags, "--cache-teacher", "hub:me/logits", "--out", "gone", ACCELERATE_USE_CPU="true"
    )
    assert gone.returncode == 0, gone.stderr
    for name in ("taken", "offline"):
        assert set(differences(Path("local"), Path(name))) <= MORE
        assert json.loads(Path(name, "summary.json").read_text())["teacher"] == "hub:me/logits@" + "0" * 40
    repeated = parse(distill_defaults, "", ["--config", "taken/config.json"])
    assert (repeated.cache.cache_from, repeated.teacher) == ("hub:me/logits", ())


@pytest.mark.slow
def test_two_processes_train_on_a_shared_cache_as_on_their_own(here):
    env = {"ACCELERATE_USE_CPU": "true"}
    flags = ["distill_student.py", *STUDENT, *VIEWS, "--wandb", "disabled", "--threads", "1"]
    local = script(*flags, "--teacher", "teacher", "--cache-teacher", "--out", "local", env=env, launcher=torchrun(2))
    assert local.returncode == 0, local.stderr
    (built,) = ROOT.iterdir()
    teachers(["pack", str(built), "packed"])
    taken = script(*flags, "--cache-teacher", "./packed", "--out", "taken", env=env, launcher=torchrun(2))
    assert taken.returncode == 0, taken.stderr
    assert set(differences(Path("local"), Path("taken"))) <= MORE


def test_row_21_embeddings_are_shared_as_logits_are(made, tmp_path, monkeypatch, capsys):
    flags = ["--student", "resnet8", "--warmup-epochs", "0", "--views", "2", "--mixup", "0"]
    student(*flags, "--teacher", str(made / "teacher"), "--cache-teacher", "--out", "local", "embed")
    (built,) = ROOT.iterdir()
    teachers(["pack", str(built), "packed"])
    text = Path("packed/README.md").read_text()
    assert "# Embeddings of resnet8 (teacher, " in text
    (line,) = [line for line in text.splitlines() if line.startswith("    accelerate launch")]
    config = parse(distill_defaults, "", line.split()[3:])
    assert config.preset == "embed"
    shared.find_shared(config.job())
    with pytest.raises(UserError, match=r"has its embeddings alone: give .* or leave --patches out$"):
        student(*flags, "--cache-teacher", "./packed", "--out", "shared", "embed", "--patches", "1")
    student(*flags, "--cache-teacher", "./packed", "--out", "shared", "embed")
    assert "no validation: without labels it asks the teacher, whose network is not here" in capsys.readouterr().out
    assert Path("local/model.safetensors").read_bytes() == Path("shared/model.safetensors").read_bytes()
