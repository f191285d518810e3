"""Images without labels: every image of a folder in any nesting, no column but the images', a split by seed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from kd.config import DataConfig, FitConfig, ViewConfig
from kd.config.jobs import check_together
from kd.data import Data, load_data, show
from kd.errors import NoLabels, UserError
from tests.data.test_dataset import picture
from tests.data.test_own import MODULE
from tests.data.test_stream import all_of, shards
from tests.data.test_workers import images

NESTED = ("", "2023", "2023/paris", "test", "2024/train trip/day 1")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Photographs at four depths, in folders some of which sound like splits."""
    for number in range(40):
        place = tmp_path / "photos" / NESTED[number % len(NESTED)]
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number:02}.png")
    return tmp_path / "photos"


def unlabelled(source, **more) -> Data:
    return load_data(DataConfig(source=str(source), no_labels=True, **more))


def pixels_of(data: Data) -> list[bytes]:
    """All training and validation images, sorted."""
    return sorted(image.numpy().tobytes() for split in (data.train, data.val) for image in all_of(split))


def bare(data: Data) -> bool:
    """Whether nothing in it says what an image shows."""
    labels = torch.cat([data.train.labels, data.val.labels])
    return not data.labelled and data.test is None and data.classes == () and bool((labels == -1).all())


def test_every_image_of_a_folder_in_any_nesting_is_read(photos, capsys):
    data = unlabelled(photos, val_fraction=0.25)
    assert bare(data)
    assert (len(data.train.labels), len(data.val.labels)) == (30, 10)
    assert pixels_of(data) == sorted(np.asarray(picture(n)).transpose(2, 0, 1).tobytes() for n in range(40))
    assert "30 training and 10 validation images without labels" in capsys.readouterr().out


def test_a_folder_called_train_makes_splits_and_the_test_split_is_not_read(tmp_path, capsys):
    folder = Path(images(tmp_path / "set", (("train", 20), ("val", 6), ("test", 9))))
    (folder / "test" / "class 0" / "broken.png").write_bytes(b"junk")
    data = unlabelled(folder, image_size=16)
    assert bare(data)
    assert (len(data.train.labels), len(data.val.labels)) == (20, 6)
    assert "splits that are not used: test" in capsys.readouterr().out


def test_folders_that_are_splits_only_of_labelled_images_are_named(tmp_path, capsys):
    folder = images(tmp_path / "set", (("training_set", 20), ("test_set", 9)))
    data = unlabelled(folder, image_size=16)
    assert len(data.train.labels) + len(data.val.labels) == 29
    assert "test_set, training_set: read as one set; only folders called exactly train, val and test" in (
        capsys.readouterr().out
    )


def test_lists_of_labels_beside_the_images_are_not_read(photos, capsys):
    (photos / "metadata.csv").write_text("file_name,label\nno/such.png,3\n")
    assert bare(unlabelled(photos))
    assert "labels are not read (metadata.csv)" in capsys.readouterr().out


LABELS = {"as they are": [0, 1, 2] * 10, "permuted": [2] * 10 + [0] * 10 + [1] * 10, "nonsense": [None, -7, 9] * 10}


@pytest.mark.parametrize("how", [{}, {"decode": "workers"}, {"stream": True}], ids=["memory", "workers", "stream"])
def test_no_label_changes_anything(tmp_path, how):
    """Poison: what is read of the labels would show, since they are permuted, or no classes at all."""
    found = []
    for labels, values in LABELS.items():
        kind = Value("int64") if labels == "nonsense" else ClassLabel(names=["a", "b", "c"])
        features = Features({"image": ImageFeature(), "label": kind})
        rows = Dataset.from_dict({"image": [picture(n) for n in range(30)], "label": values}, features=features)
        (tmp_path / labels / "data").mkdir(parents=True)
        rows.to_parquet(tmp_path / labels / "data" / "train-00000-of-00001.parquet")
        data = unlabelled(tmp_path / labels, **how)
        assert bare(data)
        assert (len(data.train.labels), len(data.val.labels)) == (27, 3)
        found.append((all_of(data.train).tolist(), all_of(data.val).tolist(), data.mean, data.std))
        if "stream" not in how:  # which is known by its files' sizes and times
            found[-1] = (*found[-1], data.fingerprint)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("source", ["digits", "synthetic"])
def test_a_built_in_set_without_its_labels_is_another_set(source):
    data, labelled = unlabelled(source), load_data(DataConfig(source=source))
    assert bare(data)
    assert data.fingerprint != labelled.fingerprint
    assert len(data.train.labels) + len(data.val.labels) == len(labelled.train.labels) + len(labelled.val.labels)
    assert labelled.labelled


def test_validation_is_chosen_by_the_split_seed_alone(photos):
    first, again, other = (unlabelled(photos, val_fraction=0.3, split_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(all_of(first.val), all_of(again.val))
    assert not torch.equal(all_of(first.val), all_of(other.val))
    assert pixels_of(first) == pixels_of(other)
    assert unlabelled(photos, val_fraction=0.0).val is None


def test_memory_workers_and_streams_give_the_same_images(tmp_path):
    folder = shards(tmp_path / "parquet")
    ways = [{}, {"decode": "workers", "workers": 2}, {"stream": True, "shuffle_rows": 8, "workers": 2}]
    memory, *others = (unlabelled(folder, image_size=16, **way) for way in ways)
    for other in others:
        assert torch.equal(all_of(memory.train), all_of(other.train))
        assert torch.equal(all_of(memory.val), all_of(other.val))
        assert (memory.mean, memory.std) == (other.mean, other.std)


def test_a_labelled_and_an_unlabelled_start_share_no_decoded_data(tmp_path):
    folder = images(tmp_path / "set")
    shapes = [(load_data(DataConfig(source=folder, image_size=16, no_labels=flag))) for flag in (False, True, False)]
    assert [data.labelled for data in shapes] == [True, False, True]
    assert shapes[0].fingerprint == shapes[2].fingerprint != shapes[1].fingerprint
    assert set(shapes[2].train.labels.tolist()) == {0, 1, 2}


def test_your_own_code_may_give_images_alone(tmp_path, monkeypatch):
    code = "\ndef alone(): return {'train': [Image.new('RGB', (12, 12), (n, 0, 0)) for n in range(20)]}\n"
    (tmp_path / "unlabelled_pictures.py").write_text(MODULE + code)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = unlabelled("unlabelled_pictures:alone")
    assert bare(data)
    assert len(data.train.labels) == 18
    assert bare(unlabelled("unlabelled_pictures:pictures"))
    with pytest.raises(NoLabels, match=r"train row 0: is an image without a label; .*, or give --no-labels"):
        load_data(DataConfig(source="unlabelled_pictures:alone", test_fraction=0.2))


def test_where_no_labels_are_found_a_line_says_what_to_do(photos, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(12):
        picture(number).save(flat / f"{number}.png")
    column = tmp_path / "column"
    (column / "data").mkdir(parents=True)
    rows = Dataset.from_dict({"image": [picture(n) for n in range(12)]}, features=Features({"image": ImageFeature()}))
    rows.to_parquet(column / "data" / "train-00000-of-00001.parquet")
    (one := tmp_path / "one" / "pictures").mkdir(parents=True)
    shutil.copy(flat / "0.png", one)
    found = {
        flat: "is in no class folder",
        photos: "is deeper than|is in no class folder|is in several splits",
        column: "no label column",
        one.parent: "only one class folder",
    }
    for source, words in found.items():
        with pytest.raises(UserError, match=f"{words}") as caught:
            load_data(DataConfig(source=str(source)))
        if source != photos:  # which have folders named like splits: that is to be mended first
            assert "or give --no-labels, for a method that needs none (kd --alpha 1)" in str(caught.value)
            assert "\n" not in str(caught.value)
    for source in (flat, column):
        assert bare(load_data(DataConfig(source=str(source)), needs_labels=False)), "as the method needs none"
    assert "data: without labels: 0.png is in no class folder" in capsys.readouterr().out


def test_labels_that_are_there_are_read_even_if_the_method_needs_none():
    assert load_data(DataConfig(source="synthetic"), needs_labels=False).labelled


@pytest.mark.parametrize(
    "flags", [{"classes": 3}, {"imbalance": 0.1}, {"label": "fine_label"}, {"test_fraction": 0.3}], ids=str
)
def test_row_44_flags_about_labels_are_refused(flags):
    (name,) = flags
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .*: is about labels, and the images have none"):
        DataConfig(no_labels=True, **flags).check()


def test_row_44_balance_is_refused():
    DataConfig(no_labels=True).check()
    with pytest.raises(UserError, match="--balance sampler: is about classes"):
        check_together(DataConfig(no_labels=True), ViewConfig(), FitConfig(balance="sampler"))


def test_an_empty_validation_split_is_refused(tmp_path):
    (tmp_path / "one").mkdir()
    picture(0).save(tmp_path / "one" / "a.png")
    with pytest.raises(UserError, match="the validation split is empty; give a larger --val-fraction"):
        unlabelled(tmp_path / "one")


def test_pictures_of_mixed_views_name_no_class(photos):
    show.main(["--data", str(photos), "--no-labels", "--mixup", "1", "--images", "3", "--epochs", "1", "views.png"])
    assert Path("views.png").stat().st_size > 0
    assert show.name_of(-1, ()) == "another image"
