"""Data: found, decoded once, checked, split by class; and whatever is wrong with it named."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from kd.config import DataConfig
from kd.data import load_data
from kd.errors import UserError
from kd.images import holding
from kd.images.decode import cache_root
from tests.conftest import CIFAR100, needs_cifar100


def picture(seed: int, size=(12, 12), mode="RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """An imagefolder of two classes, ten training and four test images each."""
    for split, count in (("train", 10), ("test", 4)):
        for label, name in enumerate(("ape", "bee")):
            place = tmp_path / "pictures" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                picture(100 * label + number).save(place / f"{number}.png")
    return tmp_path / "pictures"


def parquet(path, rows: dict, features: Features, splits=("train", "test")) -> str:
    dataset = Dataset.from_dict(rows, features=features)
    for split in splits:
        (path / "data").mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(path / "data" / f"{split}-00000-of-00001.parquet")
    return str(path)


FEATURES = Features({"img": ImageFeature(), "label": ClassLabel(names=["ape", "bee"])})


def test_an_imagefolder_keeps_pixels_and_class_names(folder):
    data = load_data(DataConfig(source=str(folder), val_fraction=0.2))
    assert data.classes == ("ape", "bee")
    assert (len(data.train.labels), len(data.val.labels), len(data.test.labels)) == (16, 4, 8)
    pixels = {image.numpy().tobytes() for split in (data.train, data.val) for image in split.images}
    assert pixels == {np.asarray(picture(seed)).transpose(2, 0, 1).tobytes() for seed in (*range(10), *range(100, 110))}


def test_validation_is_split_by_class_and_shares_no_row_with_training():
    data = load_data(DataConfig(source="digits", val_fraction=0.2))
    whole = load_data(DataConfig(source="digits", val_fraction=0.0))
    assert whole.val is None
    assert len(data.train.labels) + len(data.val.labels) == len(whole.train.labels)
    shares = torch.bincount(data.val.labels) / torch.bincount(whole.train.labels)
    assert ((shares - 0.2).abs() < 0.01).all()
    rows = torch.cat([data.train.images, data.val.images]).flatten(1).tolist()
    assert sorted(rows) == sorted(whole.train.images.flatten(1).tolist())


def test_the_split_depends_on_its_own_seed_alone():
    first, second, other = (load_data(DataConfig(source="digits", split_seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.val.images, second.val.images)
    assert not torch.equal(first.val.images, other.val.images)


def test_mean_and_deviation_are_the_training_rows_own():
    data = load_data(DataConfig(source="synthetic"))
    pixels = data.train.images.double() / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3), correction=0), rtol=1e-9)


def test_classes_keeps_the_first_n():
    data = load_data(DataConfig(source="digits", classes=3))
    assert data.classes == ("0", "1", "2")
    assert set(data.train.labels.tolist()) == set(data.test.labels.tolist()) == {0, 1, 2}
    with pytest.raises(UserError, match="--classes 11: digits has 10"):
        load_data(DataConfig(source="digits", classes=11))


def test_the_second_start_decodes_nothing(folder, monkeypatch):
    first = load_data(DataConfig(source=str(folder)))
    monkeypatch.setattr(holding, "decode_split", None)  # would raise if called
    second = load_data(DataConfig(source=str(folder)))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.train.images, second.train.images)
    picture(5).save(folder / "train" / "ape" / "new.png")
    with pytest.raises(TypeError):  # a changed folder is decoded again
        load_data(DataConfig(source=str(folder)))


def test_a_bit_flipped_in_the_decoded_data_is_noticed(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    first = load_data(DataConfig(source=str(folder)))
    (kept,) = cache_root().glob("data/*/train.images.npy")
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    assert load_data(DataConfig(source=str(folder))).fingerprint == first.fingerprint


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    # TIFF keeps every mode; a palette picture is compared after the same conversion.
    path = tmp_path / "x.tiff"
    picture(0, mode=mode).save(path)
    rows = {"img": [str(path)] * 10, "label": [0, 1] * 5}
    data = load_data(DataConfig(source=parquet(tmp_path / "set", rows, FEATURES)))
    wanted = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(data.train.images[0].numpy(), wanted)


def test_images_of_several_sizes_need_one_size(folder):
    picture(1, size=(20, 14)).save(folder / "train" / "bee" / "zz.png")
    with pytest.raises(UserError, match=r"train row 20 is 20 x 14.*--image-size"):
        load_data(DataConfig(source=str(folder)))
    assert load_data(DataConfig(source=str(folder), image_size=10)).size == (10, 10)


def test_label_columns_of_names_and_numbers(tmp_path):
    for values, names in ((["b", "a"] * 5, ("a", "b")), ([0, 2] * 5, ("0", "1", "2"))):
        kind = Value("string" if isinstance(values[0], str) else "int64")
        rows = {"img": [picture(0)] * 10, "label": values}
        source = parquet(tmp_path / str(kind.dtype), rows, Features({"img": ImageFeature(), "label": kind}))
        data = load_data(DataConfig(source=source))
        assert data.classes == names
        assert {names[label] for label in data.test.labels} == {str(value) for value in values}


@pytest.mark.parametrize(
    ("rows", "features", "words"),
    [
        ({"label": [0]}, {"label": ClassLabel(names=["a"])}, "no image column; it has label"),
        ({"img": [picture(0)], "text": ["x"]}, {"img": ImageFeature(), "text": Value("string")}, "no label column"),
        ({"img": [], "label": []}, FEATURES, "corresponds to no data"),
        ({"img": [picture(0), None], "label": [0, 1]}, FEATURES, r"train row 1 .*no readable image"),
        (
            {"img": [{"bytes": b"junk", "path": "x.png"}], "label": [0]},
            FEATURES,
            r"train row 0 \(x.png\) is no readable image",
        ),
        (
            {"img": [picture(0)], "label": [10**12]},
            Features({"img": ImageFeature(), "label": Value("int64")}),
            "has the label 1000000000000; numbers name classes up to 99999",
        ),
        ({"img": [picture(0)], "label": [-1]}, FEATURES, "train row 0: label -1 is none of the 2 classes"),
        ({"img": [picture(0)], "label": [None]}, FEATURES, "train row 0: label None"),
    ],
    ids=["no image", "no label", "empty", "null row", "corrupt row", "no class", "ignored label", "missing label"],
)
def test_what_is_wrong_with_the_data_is_named(tmp_path, monkeypatch, rows, features, words):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    source = parquet(tmp_path / "set", rows, Features(features))
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(source=source))
    assert not list(cache_root().glob("data/*.partial")), "nothing half-written stays behind"


def test_a_missing_label_column_lists_the_columns(folder):
    with pytest.raises(UserError, match=r"--label colour: no such column .* image \(Image\), label \(ClassLabel\)"):
        load_data(DataConfig(source=str(folder), label="colour"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("digitz", "did you mean digits"),
        ("./nowhere", "no such folder"),
        ("nobody/nothing", r"(?s)nobody/nothing could not be loaded from the Hub.*--preset digits"),
        ("cifar100", r"uoft-cs/cifar100 could not be loaded from the Hub"),
    ],
)
def test_sources_that_do_not_exist_or_cannot_be_reached(source, words, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(source=source))


def test_a_folder_without_images(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text("nothing to see")
    with pytest.raises(UserError, match="no image data"):
        load_data(DataConfig(source=str(tmp_path / "texts")))


def test_a_set_with_validation_only_tests_on_it(tmp_path):
    rows = {"img": [picture(n) for n in range(10)], "label": [0, 1] * 5}
    data = load_data(DataConfig(source=parquet(tmp_path / "set", rows, FEATURES, ("train", "validation"))))
    assert len(data.test.labels) == 10
    assert len(data.train.labels) == 8
    with pytest.raises(UserError, match="only a train split"):
        load_data(DataConfig(source=parquet(tmp_path / "one", rows, FEATURES, ("train",))))


def test_a_validation_split_of_the_datas_own_is_used(tmp_path):
    rows = {"img": [picture(n) for n in range(10)], "label": [0, 1] * 5}
    source = parquet(tmp_path / "set", rows, FEATURES, ("train", "validation", "test"))
    data = load_data(DataConfig(source=source))
    assert (len(data.train.labels), len(data.val.labels), len(data.test.labels)) == (10, 10, 10)


@needs_cifar100
def test_the_real_cifar100():
    data = load_data(DataConfig(source=str(CIFAR100)))
    assert (len(data.train.labels), len(data.val.labels), len(data.test.labels)) == (45_000, 5_000, 10_000)
    assert data.classes[:2] == ("apple", "aquarium_fish")
    assert (torch.bincount(data.val.labels) == 50).all()
    np.testing.assert_allclose(data.mean, (0.5071, 0.4867, 0.4408), atol=1e-3)
    np.testing.assert_allclose(data.std, (0.2675, 0.2565, 0.2761), atol=1e-3)
