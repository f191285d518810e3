"""Named sets: each is loaded from its address, with its own label column, splits and image size."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from kd.config import DataConfig
from kd.config.defaults import train_defaults
from kd.data import load_data
from kd.data.sources import HUB_SETS, _newest_revision
from kd.errors import UserError

SHA = "c" * 40
FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
COARSE = [f"coarse {number}" for number in range(2)]


def pictures(rows: int, size: tuple[int, int] | None) -> list[Image.Image]:
    """Noise of one size, or of many if `size` is None."""
    draw = np.random.default_rng(rows)
    sizes = [size or (int(draw.integers(150, 400)), int(draw.integers(150, 400))) for _ in range(rows)]
    return [Image.fromarray(draw.integers(0, 255, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]


def stored(splits: dict[str, int], labels: list[str], image: str, size, unlabelled: str = "") -> datasets.DatasetDict:
    """A set of these splits, image column and label columns, as `datasets` would load it."""
    names = {label: COARSE if "coarse" in label else [f"{label} {number}" for number in range(4)] for label in labels}
    features = {image: datasets.Image()} | {label: datasets.ClassLabel(names=names[label]) for label in labels}
    made = {}
    for split, rows in splits.items():
        value = lambda label, row, split=split: -1 if split == unlabelled else row % len(names[label])  # noqa: E731
        columns = {label: [value(label, row) for row in range(rows)] for label in labels}
        table = datasets.Features(features)
        made[split] = datasets.Dataset.from_dict({image: pictures(rows, size), **columns}, features=table)
    return datasets.DatasetDict(made)


# As the sets' pages describe them, a few rows each.
CIFAR = {"train": 40, "test": 8}
PAGES = {
    "cifar10": (CIFAR, ["label"], "img", (32, 32)),
    "cifar100": (CIFAR, ["fine_label", "coarse_label"], "img", (32, 32)),
    "tiny-imagenet": ({"train": 40, "valid": 8}, ["label"], "image", (64, 64)),
    "imagenette": ({"train": 12, "validation": 8}, ["label"], "image", None),
    "food101": ({"train": 12, "validation": 8}, ["label"], "image", None),
    "oxford-pets": ({"train": 12, "test": 8}, ["label", "label_cat_dog"], "image", None),
    "imagenet-1k": ({"train": 12, "validation": 8, "test": 6}, ["label"], "image", None, "test"),
}
SIZES = dict(zip(PAGES, (32, 32, 64, 160, 224, 224, 224), strict=True))


def no_files(*args, **how):
    raise ConnectionError("no network")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that has PAGES; returns the list of its requests."""
    requests = []

    def load(address, revision=None, **how):
        requests.append((address, revision, how))
        name = next(name for name, known in HUB_SETS.items() if known.address == address)
        return stored(*PAGES[name])

    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("datasets.load_dataset_builder", no_files)
    monkeypatch.setattr("kd.data.sources._newest_revision", lambda name, branch: SHA)
    return requests


@pytest.mark.parametrize("name", HUB_SETS)
def test_a_set_runs_by_name(name, hub):
    data = load_data(DataConfig(name))
    (address, revision, how), known = hub[0], HUB_SETS[name]
    assert address == known.address
    assert revision == (known.revision if name == "cifar100" else SHA)
    assert how == ({"data_dir": "160px"} if name == "imagenette" else {})
    assert data.size == (SIZES[name],) * 2
    assert data.classes == tuple(f"{known.label} {number}" for number in range(4))
    reported = 8  # of the test split, or of the validation split if the former is missing or has no labels
    assert len(data.test.labels) == reported
    assert len(data.val.labels) > 0, "held out of the training split"
    assert len(data.train.labels) + len(data.val.labels) == PAGES[name][0]["train"]


def test_flags_override_the_table(hub):
    assert load_data(DataConfig("cifar100", label="coarse_label")).classes == tuple(COARSE)
    assert load_data(DataConfig("food101", image_size=48)).size == (48, 48)


def test_a_gated_set_tells_how_to_get_access(monkeypatch, hub):
    def refused(*args, **how):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'ILSVRC/imagenet-1k' is a gated dataset on the Hub.")

    monkeypatch.setattr("datasets.load_dataset", refused)
    with pytest.raises(UserError, match=r"accept its terms at \S+/ILSVRC/imagenet-1k and log in with `hf auth login`"):
        load_data(DataConfig("imagenet-1k"))
    with pytest.raises(UserError) as caught:
        load_data(DataConfig("food101"))
    assert "terms" not in str(caught.value)
    with pytest.raises(UserError, match=r"did you mean .*imagenette"):
        load_data(DataConfig("imagenete"))


def test_revisions_that_an_unreachable_hub_cannot_resolve_are_kept_apart(monkeypatch, tmp_path):
    colours = {"v1": (200, 0, 0), "v2": (0, 200, 0)}

    def load(address, revision, **how):
        rows = {"image": [Image.new("RGB", (8, 8), colours[revision])] * 20, "label": [0, 1] * 10}
        made = datasets.Dataset.from_dict(rows, features=datasets.Features(FEATURES))
        return datasets.DatasetDict({"train": made, "test": made})

    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kd.data.sources._newest_revision", lambda name, branch: None)
    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("datasets.load_dataset_builder", no_files)
    for revision in colours:
        assert load_data(DataConfig(f"me/set@{revision}")).train.images[0, :, 0, 0].tolist() == [*colours[revision]]


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """A Hub that cannot be reached, of whose set me/set `datasets` has the commit SHA."""
    rows = {"image": pictures(20, (8, 8)), "label": [0, 1] * 10}
    datasets.Dataset.from_dict(rows, features=datasets.Features(FEATURES)).to_parquet(tmp_path / "rows.parquet")
    cache, files = tmp_path / "fetched", {split: [str(tmp_path / "rows.parquet")] for split in ("train", "test")}
    builder = Parquet(cache_dir=str(cache), dataset_name="set", config_name="default", hash=SHA, data_files=files)
    builder.download_and_prepare()
    (cache / "me___set").mkdir()
    Path(builder.cache_dir).parent.parent.rename(cache / "me___set" / "default")
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("kd.data.sources._newest_revision", lambda name, branch: None)


@pytest.mark.parametrize("stream", [False, True])
def test_another_commit_that_was_fetched_is_not_taken_for_the_one_asked_for(fetched, stream, capsys):
    assert load_data(DataConfig(f"me/set@{SHA}", stream=stream)).classes == ("a", "b")
    load_data(DataConfig("me/set", stream=stream))
    assert "cannot be reached" not in capsys.readouterr().out
    other = "d" * 40
    with pytest.raises(UserError, match=rf"me/set@{other}: the Hub cannot be reached, and the commit {SHA} was"):
        load_data(DataConfig(f"me/set@{other}", stream=stream))
    load_data(DataConfig("me/set@v2", stream=stream))
    said = f"data: the Hub cannot be reached: the commit {SHA}, fetched before, is read and may not be v2\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("stream", [False, True])
def test_a_newer_commit_that_was_fetched_is_not_taken_for_what_was_decoded_before(fetched, stream, tmp_path):
    """Without the Hub the newest commit is not known: what `datasets` reads is, and must be what is trained on."""
    before = load_data(DataConfig("me/set", stream=stream))
    rows = {"image": pictures(20, (8, 8)), "label": [1, 0] * 10}
    path = tmp_path / "newer.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(FEATURES)).to_parquet(path)
    files = {split: [str(path)] for split in ("train", "test")}
    builder = Parquet(
        cache_dir=str(tmp_path / "newer"), dataset_name="set", config_name="default", hash="d" * 40, data_files=files
    )
    builder.download_and_prepare()
    (version,) = (tmp_path / "fetched/me___set/default").iterdir()
    shutil.move(builder.cache_dir, version)  # read now, as it was fetched last
    after = load_data(DataConfig("me/set", stream=stream))
    assert before.fingerprint != after.fingerprint
    assert after.test.labels.tolist() == [1, 0] * 10


class ReadTimeout(Exception):
    """Like httpx's, which is no OSError and does not mention a connection."""


def test_a_hub_that_times_out_ends_in_one_message(monkeypatch, hub):
    def slow(*args, **how):
        raise ReadTimeout("The read operation timed out")

    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", slow)
    assert _newest_revision("someone/set", None) is None
    monkeypatch.setattr("datasets.load_dataset", slow)
    with pytest.raises(
        UserError, match=r"could not be loaded from the Hub \(ReadTimeout: The read operation timed out"
    ):
        load_data(DataConfig("someone/set"))


def test_help_lists_every_name(capsys):
    from kd.config.cli import parse

    with pytest.raises(SystemExit):
        parse(train_defaults, "", ["--help"])
    words = capsys.readouterr().out
    assert [name for name in HUB_SETS if name not in words.replace("\n", " ")] == []
