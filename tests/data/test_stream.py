"""Streamed data: rows keep their numbers, the order is a pure function, and images equal those in memory."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from kd.config import DataConfig, ViewConfig
from kd.config.cli import parse
from kd.config.defaults import train_defaults
from kd.data import load_data, stream
from kd.data.rows import normalize
from kd.data.stream import stream_order
from kd.errors import UserError
from kd.runs.folder import run_identity
from kd.utils import files, rng
from tests.data.test_workers import all_batches, images
from tests.run_scripts import SMALL, differences, distil, metrics_of, script, teach, torchrun
from tests.training.test_resume import Killed, die_at

CPU = {"ACCELERATE_USE_CPU": "true"}

FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=["ape", "bee", "cat"])})
ROWS = (40, 10)


def shards(folder: Path, broken: int | None = None) -> str:
    """Parquet: 40 training rows in four files of different lengths, ten test rows in two."""
    random = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    for split, counts in (("train", (7, 13, 1, 19)), ("test", (6, 4))):
        row = 0
        for number, count in enumerate(counts):
            cells, labels = [], []
            for _ in range(count):
                pixels = random.integers(0, 100, (18, 20, 3), dtype=np.uint8)
                pixels[..., row % 3] += 100
                junk = split == "train" and row == broken
                cells.append({"bytes": b"junk", "path": "x.png"} if junk else Image.fromarray(pixels))
                labels.append(row % 3)
                row += 1
            part = Dataset.from_dict({"image": cells, "label": labels}, features=FEATURES)
            part.to_parquet(folder / "data" / f"{split}-{number:05}-of-{len(counts):05}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return shards(tmp_path_factory.mktemp("data") / "parquet")


def streamed(folder: str, rows: int, **more) -> DataConfig:
    return DataConfig(source=folder, stream=True, shuffle_rows=rows, image_size=16, workers=2, **more)


def all_of(split) -> torch.Tensor:
    index = torch.arange(len(split.labels)).split(9)
    return torch.cat(list(split.batches(index, torch.device("cpu"))))


def test_rows_labels_and_splits_are_those_of_memory(folder):
    memory, stream = load_data(DataConfig(source=folder, image_size=16)), load_data(streamed(folder, 8))
    for name in ("train", "val", "test"):
        expected, actual = getattr(memory, name), getattr(stream, name)
        assert torch.equal(expected.labels, actual.labels)
        assert torch.equal(expected.images, all_of(actual)), name
    assert (memory.mean, memory.std, memory.classes, memory.size) == (
        stream.mean,
        stream.std,
        stream.classes,
        stream.size,
    )


@pytest.mark.parametrize("window", [1, 5, 16, 1000])
def test_an_order_visits_every_row_once_and_keeps_to_its_shards(window):
    where = np.repeat(np.arange(8), [3, 10, 1, 7, 30, 2, 2, 9])
    order = stream_order(where, window, seed=3, epoch=2)
    assert sorted(order) == list(range(64))
    assert np.array_equal(order, stream_order(where, window, seed=3, epoch=2))
    assert not np.array_equal(order, stream_order(where, window, seed=3, epoch=3))
    assert not np.array_equal(order, stream_order(where, window, seed=4, epoch=2))
    # What is read before a window's end and what is read after it share at most one shard.
    for start in range(window, 64, window):
        assert len(set(where[order[:start]]) & set(where[order[start:]])) <= 1


def test_a_window_over_everything_is_the_order_of_memory():
    where = np.repeat(np.arange(4), 25)
    assert np.array_equal(stream_order(where, 100, 5, 1), rng.order(5, 1, 100).numpy())


@pytest.mark.parametrize("rows", [8, 1000])
def test_batches_have_the_images_of_their_indices(folder, rows):
    memory, stream = load_data(DataConfig(source=folder, image_size=16)), load_data(streamed(folder, rows))
    still = ViewConfig(crop_padding=0, flip=False)
    seen = all_batches(stream, still)
    for batch in seen:
        pixels = memory.train.images[batch.index]
        mean, std = torch.tensor(memory.mean), torch.tensor(memory.std)
        assert torch.equal(batch.image, normalize(pixels, mean, std))
        assert torch.equal(batch.label, memory.train.labels[batch.index])
    rest = all_batches(stream, still, first=1)
    assert [batch.index.tolist() for batch in rest] == [batch.index.tolist() for batch in seen[1:]]
    assert all(torch.equal(one.image, other.image) for one, other in zip(rest, seen[1:], strict=True))


def openings(train, monkeypatch) -> list[int]:
    """A list to which every shard that is opened from now on adds its number."""
    opened, kind = [], type(train.images.stream)
    real = kind.shard
    monkeypatch.setattr(
        kind, "shard", lambda self, num_shards, index: opened.append(index) or real(self, num_shards, index)
    )
    return opened


def test_each_shard_is_opened_once_an_epoch(folder, monkeypatch):
    train = load_data(streamed(folder, 8, val_fraction=0.0)).train
    opened = openings(train, monkeypatch)
    list(train.batches(train.order(0, 0).split(5), torch.device("cpu")))
    assert sorted(opened) == [0, 1, 2, 3]


def parts_of(folder: Path, counts: list[int], label=lambda row: row % 3) -> str:
    """Parquet files of `counts` rows, whose images are grey by their row's number; one test file."""
    (folder / "data").mkdir(parents=True)
    row = 0
    for number, count in enumerate([*counts, 6]):
        rows = range(row, row := row + count)
        cells = [Image.fromarray(np.full((4, 4, 3), one % 251, np.uint8)) for one in rows]
        part = Dataset.from_dict({"image": cells, "label": [label(one) for one in rows]}, features=FEATURES)
        split, where = ("train", number) if number < len(counts) else ("test", 0)
        part.to_parquet(folder / "data" / f"{split}-{where:05}-of-{len(counts) if split == 'train' else 1:05}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def forty(tmp_path_factory) -> str:
    return parts_of(tmp_path_factory.mktemp("data") / "forty", [3 + number % 4 for number in range(40)])


@pytest.mark.parametrize(("window", "share"), [(60, 1), (60, 2), (25, 1), (7, 1), (1000, 2)])
def test_a_window_over_many_shards_opens_and_reads_each_once(forty, monkeypatch, window, share):
    """For any share of each batch; the buffer never has more than two windows of images and a batch."""
    train = load_data(streamed(forty, window, val_fraction=0.0)).train
    opened, buffered, read = openings(train, monkeypatch), [], stream._Reader._read_to

    def counted(self, row: int, shard: int) -> None:
        read(self, row, shard)
        buffered.append(len(self.buffer))
        assert len(self.opened) <= stream.MAX_OPEN

    monkeypatch.setattr(stream._Reader, "_read_to", counted)
    for epoch in range(2):
        order = train.order(0, epoch)
        indices = [batch[::share] for batch in order.split(10)]
        seen = torch.cat(list(train.batches(indices, torch.device("cpu"))))
        assert seen[:, 0, 0, 0].tolist() == [row % 251 for row in torch.cat(indices).tolist()]
    assert max(opened.count(number) for number in range(40)) <= 2, "once an epoch"
    assert max(buffered) <= 2 * window + 10


def test_an_epoch_entered_in_the_middle_opens_only_the_shards_left(forty, monkeypatch):
    train = load_data(streamed(forty, 40, val_fraction=0.0)).train
    opened = openings(train, monkeypatch)
    rest = train.order(0, 0)[95:]
    seen = torch.cat(list(train.batches(rest.split(10), torch.device("cpu"))))
    assert seen[:, 0, 0, 0].tolist() == [row % 251 for row in rest.tolist()]
    assert sorted(opened) == sorted(set(train.images.shards_of(rest.numpy()).tolist()))


def test_a_stream_that_is_sorted_by_class_gets_one_line_of_advice(tmp_path, capsys):
    source = parts_of(tmp_path / "sorted", [30, 30, 30], label=lambda row: min(row // 30, 2))
    load_data(streamed(source, 15))
    advice = [line for line in capsys.readouterr().out.splitlines() if "--shuffle-rows" in line]
    assert advice == [
        "data: 15 consecutive rows have 1.4 classes, shuffled ones would have 2.99: the data is sorted by class; give a"
        " larger --shuffle-rows, or store it shuffled"
    ]
    load_data(streamed(source, 81))
    load_data(streamed(parts_of(tmp_path / "mixed", [30, 30, 30]), 15))
    assert "--shuffle-rows" not in capsys.readouterr().out


def test_a_shard_cut_short_is_named_while_labels_are_read(tmp_path):
    source = shards(tmp_path / "parquet")
    cut = tmp_path / "parquet" / "data" / "train-00002-of-00004.parquet"
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(
        UserError, match=r"train-00002-of-00004.parquet: cannot be read \(Arrow.*fetch it again"
    ) as caught:
        load_data(streamed(source, 8))
    assert "\n" not in str(caught.value)


def test_another_column_of_images_is_other_data(tmp_path):
    """A cache of the teacher's answers to one is refused for the other."""
    features = Features({"depth": ImageFeature(), "rgb": ImageFeature(), "label": ClassLabel(names=["ape", "bee"])})
    pictures = [Image.new("RGB", (8, 8), (10 * row, 0, 0)) for row in range(20)]
    rows = {"depth": pictures, "rgb": pictures[::-1], "label": [0, 1] * 10}
    for split in ("train", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    both = [load_data(streamed(str(tmp_path), 8, image=name)) for name in ("depth", "rgb")]
    assert len({data.train.sha256 for data in both}) == 2


def test_killed_and_resumed_it_ends_in_the_same_bytes(folder, monkeypatch):
    flags = ["--data", folder, "--image-size", "16", "--batch-size", "5", "--workers", "2", "--epochs", "2"]
    flags += ["--stream", "--shuffle-rows", "12", "--save-every", "2"]
    teach(*flags, "--out", "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 11)
        teach(*flags, "--out", "run")
    teach(*flags, "--out", "run", "--resume")
    assert differences(Path("whole"), Path("run")) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--stream", "--shuffle-rows", "12"], ["--decode", "workers"]])
def test_two_processes_read_what_one_does(folder, how):
    flags = [*SMALL, "--data", folder, "--image-size", "16", "--batch-size", "6", "--workers", "1", *how]
    flags += ["--model", "tests.networks:plain", "--wandb", "disabled"]
    done = script("train_teacher.py", *flags, "--out", "two", env=CPU, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("data: ") == 1, "only the first process prints"
    teach(*flags, "--out", "one")
    for line, other in zip(metrics_of(Path("one")), metrics_of(Path("two")), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_with_a_window_over_everything_the_weights_are_those_of_memory(folder, tmp_path):
    flags = ["--data", folder, "--image-size", "16", "--batch-size", "12", "--workers", "2", "--epochs", "1"]
    teach(*flags, "--out", str(tmp_path / "memory"))
    teach(*flags, "--stream", "--shuffle-rows", "1000", "--out", str(tmp_path / "stream"))
    assert not differences(tmp_path / "memory", tmp_path / "stream")


def test_shuffle_rows_is_part_of_the_identity_of_streamed_runs():
    data, accelerator = load_data(DataConfig(source="synthetic")), Accelerator(cpu=True)

    def identity(*flags: str) -> dict:
        return run_identity(parse(train_defaults, "", [*flags]).job(), data, accelerator)

    with pytest.raises(UserError, match="--shuffle-rows 8: needs --stream"):
        identity("--shuffle-rows", "8")
    assert identity("--stream", "--shuffle-rows", "8") != identity("--stream")


@pytest.mark.slow
def test_a_cached_teacher_teaches_a_streamed_student(folder):
    flags = ["--data", folder, "--image-size", "16", "--batch-size", "12", "--epochs", "1", "--views", "1"]
    flags += ["--stream", "--shuffle-rows", "8", "--workers", "2"]
    distil(*flags, "--out", "live")
    distil(*flags, "--cache-teacher", "--cache-dtype", "float32", "--out", "cached")
    assert not differences(Path("live"), Path("cached"))


def test_an_imagefolder_streams_too(tmp_path):
    source = images(tmp_path / "pictures")
    memory, stream = load_data(DataConfig(source=source, image_size=16)), load_data(streamed(source, 8))
    assert torch.equal(memory.train.images, all_of(stream.train))
    assert torch.equal(memory.test.labels, stream.test.labels)


@pytest.mark.parametrize("side", [12, 28])
def test_a_split_of_another_size_needs_one_size(tmp_path, side):
    source = images(tmp_path / "pictures", sides=(20, 21))
    for file in Path(source).glob("test/*/*"):
        Image.open(file).resize((side, side)).save(file)
    flags = {"shuffle_rows": 8, "workers": 2, "stream": True}
    with pytest.raises(UserError, match=rf"test row 0: is {side} x {side}, others 20 x 20; give --image-size N"):
        load_data(DataConfig(source=source, **flags))
    data = load_data(DataConfig(source=source, image_size=16, **flags))
    assert data.train.size == data.test.size == (16, 16)


def test_a_broken_row_is_named(tmp_path):
    source = shards(tmp_path / "parquet", broken=9)
    with pytest.raises(UserError, match=r"^train row 9 \(x.png\): not a readable image"):
        load_data(streamed(source, 8, val_fraction=0.0))


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1] + b"\1"], ids=["empty", "a bit"])
@pytest.mark.parametrize("name", ["train.npy", "test.npy", "index.json"])
def test_damaged_labels_of_a_stream_are_read_anew(folder, name, damage, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    labels = load_data(streamed(folder, 8)).train.labels
    (file,) = (tmp_path / "cache").glob(f"data/*.stream/{name}")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert torch.equal(load_data(streamed(folder, 8)).train.labels, labels)
    assert file.read_bytes() == whole


def test_labels_of_a_stream_are_flushed_to_the_disk_before_they_have_their_name(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    flushed, sync = [], files.sync_file
    monkeypatch.setattr(files, "sync_file", lambda path: flushed.append(path.name) or sync(path))
    load_data(streamed(folder, 8))
    assert flushed[:3] == [".train.npy.partial", ".test.npy.partial", ".index.json.partial"]


def test_a_stream_that_breaks_off_says_where_and_what_to_do(folder):
    train = load_data(streamed(folder, 8, val_fraction=0.0)).train
    for file in Path(folder).glob("data/train-00003*"):
        file.rename(file.with_suffix(".away"))
    try:
        with pytest.raises(UserError, match=r"the stream broke off at train row 21 .*continue with --resume"):
            list(train.batches(torch.arange(40).split(5), torch.device("cpu")))
    finally:
        for file in Path(folder).glob("data/*.away"):
            file.rename(file.with_suffix(".parquet"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--mixup", "1"],
            "--stream: mixes no images, whose partners may be in any shard; give --mixup 0 and --cutmix 0",
        ),
        (["--decode", "workers"], "--stream: leave --decode workers out"),
        (["--shuffle-rows", "0"], "--shuffle-rows 0: give 1 or more"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_any_data_is_loaded(flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse(train_defaults, "", ["--stream", *flags]).check()
