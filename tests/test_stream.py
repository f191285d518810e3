"""Streamed data: rows keep their numbers, the order is a pure function, and what memory would give comes out."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from kd import views
from kd.cli import parse
from kd.config import DataConfig, ViewConfig
from kd.data import load_data
from kd.errors import UserError
from kd.images.stream import stream_order
from kd.presets import train_defaults
from kd.run_folder import identity_of
from tests.runs import differences, distil, teach
from tests.test_workers import all_batches, images

FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=["ape", "bee", "cat"])})
ROWS = (40, 10)


def shards(folder: Path, broken: int | None = None) -> str:
    """Parquet: 40 training rows in four files of unlike lengths, ten test rows in two."""
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
    kept, stream = load_data(DataConfig(source=folder, image_size=16)), load_data(streamed(folder, 8))
    for name in ("train", "val", "test"):
        ours, theirs = getattr(kept, name), getattr(stream, name)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.images, all_of(theirs)), name
    assert (kept.mean, kept.std, kept.classes, kept.size) == (stream.mean, stream.std, stream.classes, stream.size)


@pytest.mark.parametrize("window", [1, 5, 16, 1000])
def test_an_order_visits_every_row_once_and_keeps_to_its_shards(window):
    where = np.repeat(np.arange(8), [3, 10, 1, 7, 30, 2, 2, 9])
    order = stream_order(where, window, seed=3, epoch=2)
    assert sorted(order) == list(range(64))
    assert np.array_equal(order, stream_order(where, window, seed=3, epoch=2))
    assert not np.array_equal(order, stream_order(where, window, seed=3, epoch=3))
    assert not np.array_equal(order, stream_order(where, window, seed=4, epoch=2))
    # Whatever is read before a window and whatever after it share no shard but the ones at its ends.
    for start in range(window, 64, window):
        assert len(set(where[order[:start]]) & set(where[order[start:]])) <= 1


def test_a_window_over_everything_is_the_order_of_memory():
    where = np.repeat(np.arange(4), 25)
    assert np.array_equal(stream_order(where, 100, 5, 1), views.order(5, 1, 100).numpy())


@pytest.mark.parametrize("rows", [8, 1000])
def test_batches_hold_the_images_that_their_indices_name(folder, rows):
    kept, stream = load_data(DataConfig(source=folder, image_size=16)), load_data(streamed(folder, rows))
    still = ViewConfig(crop_padding=0, flip=False)
    seen = all_batches(stream, still)
    for batch in seen:
        pixels = kept.train.images[batch.index]
        mean, std = torch.tensor(kept.mean), torch.tensor(kept.std)
        assert torch.equal(batch.image, views.normalize(pixels, mean, std))
        assert torch.equal(batch.label, kept.train.labels[batch.index])
    rest = all_batches(stream, still, first=1)
    assert [batch.index.tolist() for batch in rest] == [batch.index.tolist() for batch in seen[1:]]
    assert all(torch.equal(one.image, other.image) for one, other in zip(rest, seen[1:], strict=True))


def test_each_shard_is_opened_once_an_epoch(folder, monkeypatch):
    train = load_data(streamed(folder, 8, val_fraction=0.0)).train
    opened, kind = [], type(train.images.stream)
    real = kind.shard
    monkeypatch.setattr(
        kind, "shard", lambda self, num_shards, index: opened.append(index) or real(self, num_shards, index)
    )
    list(train.batches(train.order(0, 0).split(5), torch.device("cpu")))
    assert sorted(opened) == [0, 1, 2, 3]


def test_with_a_window_over_everything_the_weights_are_those_of_memory(folder, tmp_path):
    flags = ["--data", folder, "--image-size", "16", "--batch-size", "12", "--workers", "2", "--epochs", "1"]
    teach(*flags, "--out", str(tmp_path / "memory"))
    teach(*flags, "--stream", "--shuffle-rows", "1000", "--out", str(tmp_path / "stream"))
    assert not differences(tmp_path / "memory", tmp_path / "stream")


def test_only_a_streams_window_is_a_part_of_its_runs_identity():
    data, accelerator = load_data(DataConfig(source="synthetic")), Accelerator(cpu=True)

    def identity(*flags: str) -> dict:
        return identity_of(parse(train_defaults, "", [*flags]).job(), data, accelerator, None)

    assert identity("--shuffle-rows", "8") == identity()
    assert identity("--stream", "--shuffle-rows", "8") != identity("--stream")


@pytest.mark.slow
def test_a_cached_teacher_answers_a_streamed_student(folder):
    flags = ["--data", folder, "--image-size", "16", "--batch-size", "12", "--epochs", "1", "--views", "1"]
    flags += ["--stream", "--shuffle-rows", "8", "--workers", "2"]
    distil(*flags, "--out", "live")
    distil(*flags, "--cache-teacher", "--cache-dtype", "float32", "--out", "cached")
    assert not differences(Path("live"), Path("cached"))


def test_an_imagefolder_streams_too(tmp_path):
    source = images(tmp_path / "pictures")
    kept, stream = load_data(DataConfig(source=source, image_size=16)), load_data(streamed(source, 8))
    assert torch.equal(kept.train.images, all_of(stream.train))
    assert torch.equal(kept.test.labels, stream.test.labels)


def test_a_broken_row_is_named(tmp_path):
    source = shards(tmp_path / "parquet", broken=9)
    with pytest.raises(UserError, match=r"^train row 9 \(x.png\) is no readable image"):
        load_data(streamed(source, 8, val_fraction=0.0))


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
        (["--mixup", "1"], "--stream: leave --mixup and --cutmix out"),
        (["--decode", "workers"], "--stream: leave --decode workers out"),
        (["--shuffle-rows", "0"], "--shuffle-rows 0: give 1 or more"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_any_data_is_loaded(flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse(train_defaults, "", ["--stream", *flags]).check()
