"""Data is found, decoded once, checked and split by class; every fault is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image

from kd.config import DataConfig
from kd.config.defaults import train_defaults
from kd.data import Split, load_data
from kd.data.cache import cache_root
from kd.data.folder import COMMON
from kd.data.rows import MappedRows, copy_rows
from kd.data.statistics import iter_blocks
from kd.data.storage import fits_memory
from kd.errors import UserError
from kd.utils.system import limit_files, memory_limit
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
    monkeypatch.setattr("kd.data.storage.decode_split", None)  # would raise if called
    second = load_data(DataConfig(source=str(folder)))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.train.images, second.train.images)
    picture(5).save(folder / "train" / "ape" / "new.png")
    with pytest.raises(TypeError):  # a changed folder is decoded again
        load_data(DataConfig(source=str(folder)))


def test_a_bit_flipped_in_the_decoded_data_is_noticed(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    first = load_data(DataConfig(source=str(folder)))
    before = first.train.images.clone()
    (path,) = cache_root().glob("data/*/train.images.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = load_data(DataConfig(source=str(folder)))
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.train.images, before)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    # TIFF stores every mode.
    path = tmp_path / "x.tiff"
    picture(0, mode=mode).save(path)
    rows = {"img": [str(path)] * 10, "label": [0, 1] * 5}
    data = load_data(DataConfig(source=parquet(tmp_path / "set", rows, FEATURES)))
    expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(data.train.images[0].numpy(), expected)


def test_images_of_several_sizes_need_one_size(folder):
    picture(1, size=(20, 14)).save(folder / "train" / "bee" / "zz.png")
    with pytest.raises(UserError, match=r"train row 20: is 20 x 14, others 12 x 12; give --image-size"):
        load_data(DataConfig(source=str(folder)))
    assert load_data(DataConfig(source=str(folder), image_size=10)).size == (10, 10)


def test_label_columns_of_names_and_numbers(tmp_path):
    for values, names in ((["b", "a"] * 5, ("a", "b")), ([0, 2] * 5, ("0", "2"))):
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
        ({"img": [], "label": []}, FEATURES, "the train split is empty"),
        ({"img": [picture(0), None], "label": [0, 1]}, FEATURES, r"train row 1 .*: not a readable image"),
        (
            {"img": [{"bytes": b"junk", "path": "x.png"}], "label": [0]},
            FEATURES,
            r"train row 0 \(x.png\): not a readable image",
        ),
        (
            {"img": [picture(0)], "label": [10**12]},
            Features({"img": ImageFeature(), "label": Value("int64")}),
            "there is the label 1000000000000, above 99999; number classes from 0",
        ),
        ({"img": [picture(0)], "label": [-1]}, FEATURES, "train row 0: label -1 is not one of the 2 classes"),
        ({"img": [picture(0)], "label": [None]}, FEATURES, "train row 0: label None"),
    ],
    ids=["no image", "no label", "empty", "null row", "corrupt row", "no class", "ignored label", "missing label"],
)
def test_row_29_row_30_row_31_what_is_wrong_with_the_data_is_named(tmp_path, monkeypatch, rows, features, words):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    source = parquet(tmp_path / "set", rows, Features(features))
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(source=source))
    assert not list(cache_root().glob("data/*.partial")), "no partial folder is left"


def test_row_31_a_missing_label_column_lists_the_columns(folder):
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
def test_row_43_sources_that_do_not_exist_or_cannot_be_reached(source, words, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(source=source))


def test_a_folder_without_images(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text("nothing to see")
    with pytest.raises(UserError, match="no readable image data"):
        load_data(DataConfig(source=str(tmp_path / "texts")))


def test_a_set_with_validation_only_tests_on_it(tmp_path):
    rows = {"img": [picture(n) for n in range(10)], "label": [0, 1] * 5}
    data = load_data(DataConfig(source=parquet(tmp_path / "set", rows, FEATURES, ("train", "validation"))))
    assert len(data.test.labels) == 10
    assert len(data.train.labels) == 8
    assert data.test_split == "validation"


def of_three_splits(path) -> str:
    rows = {"img": [picture(n) for n in range(10)], "label": [0, 1] * 5}
    return parquet(path, rows, FEATURES, ("train", "validation", "test"))


def test_a_validation_split_of_the_datas_own_is_used(tmp_path):
    data = load_data(DataConfig(source=of_three_splits(tmp_path / "set")))
    assert (len(data.train.labels), len(data.val.labels), len(data.test.labels)) == (10, 10, 10)


@pytest.mark.parametrize("flags", [{}, {"no_labels": True}])
def test_a_validation_fraction_is_not_ignored_beside_a_validation_split(tmp_path, flags, capsys):
    source = of_three_splits(tmp_path / "set")
    with pytest.raises(UserError, match=r"--val-fraction 0.3: \S+ has a validation split of its own; leave it out, or"):
        load_data(DataConfig(source=source, val_fraction=0.3, **flags))
    data = load_data(DataConfig(source=source, val_fraction=0.0, **flags))
    assert (len(data.train.labels), data.val) == (10, None)
    assert "data: the validation split is left out, as --val-fraction 0 says\n" in capsys.readouterr().out


def test_a_presets_validation_fraction_may_stand_beside_a_validation_split(tmp_path, capsys):
    fraction = train_defaults("digits").data.val_fraction
    data = load_data(DataConfig(source=of_three_splits(tmp_path / "set"), val_fraction=fraction))
    assert (len(data.train.labels), len(data.val.labels)) == (10, 10)
    said = f"data: a validation split of its own, so --val-fraction {fraction} has no effect\n"
    assert said in capsys.readouterr().out


def test_a_validation_split_that_is_reported_is_kept(tmp_path):
    rows = {"img": [picture(n) for n in range(10)], "label": [0, 1] * 5}
    source = parquet(tmp_path / "set", rows, FEATURES, ("train", "validation"))
    for fraction, count in ((0.0, 10), (0.4, 6)):
        data = load_data(DataConfig(source=source, val_fraction=fraction))
        assert (len(data.train.labels), len(data.test.labels)) == (count, 10)


def move(folder, *pairs: tuple[str, str]) -> None:
    for old, new in pairs:
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: move(f, ("train/ape/0.png", "train/ape/2020/0.png")),
         "ape/2020/0.png is deeper .* its class would be 2020"),
        (lambda f: picture(0).save(f / "train" / "stray.png"), "train/stray.png is in no class folder"),
        (lambda f: [file.rename(file.with_suffix(".heic")) for file in f.glob("train/ape/*")],
         r"train/ape has no images \(.heic\); convert"),
        (lambda f: move(f, ("test/ape", "test/training shoes"), ("train/ape", "train/training shoes")),
         r"test/training shoes/0.png is in several splits by its folders' names \(test, training shoes\); rename"),
        (lambda f: move(f, ("train/ape", "train/training shoes")),
         r"is in several splits .* \(train, training shoes\)"),
        (lambda f: [shutil.rmtree(f / split / "bee") for split in ("train", "test")],
         r"only one class folder \(ape\)"),
        (lambda f: (f / "test" / "bee" / "4.png").symlink_to("nowhere.png"), "bee/4.png: is a broken link; repair"),
        (lambda f: (move(f, ("train/bee", "../bees")), (f / "train" / "bee").symlink_to(f.parent / "bees")),
         "train/bee: is a link to a folder, which is not followed; put the folder itself there"),
        (lambda f: (f.rename(f.parent / "all"), f.mkdir(), (f / "train").symlink_to(f.parent / "all" / "train")),
         "pictures/train: is a link to a folder"),
    ],
    ids=["deep", "stray", "all heic", "two splits", "twice", "one class", "dangling", "linked class", "all linked"],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_files_that_datasets_would_mislabel_are_refused(folder, change, words, stream):
    change(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_data(DataConfig(source=str(folder), stream=stream))
    assert "\n" not in str(caught.value)


def test_a_class_may_be_called_as_its_own_split_is(folder):
    """If no other split has files of that class, which `datasets` would put into both splits."""
    move(folder, ("train/ape", "train/train"))
    for number in range(3):
        picture(number).save(folder / "test" / "ape" / f"more {number}.png")
    data = load_data(DataConfig(source=str(folder), val_fraction=0.0))
    assert data.classes == ("ape", "bee", "train")
    assert (len(data.train.labels), len(data.test.labels)) == (20, 11)


def test_skipped_files_are_counted_at_every_start(folder, capsys):
    for number in range(3):
        (folder / "train" / "ape" / f"{number}.png").rename(folder / "train" / "ape" / f"{number}.HEIC")
    (folder / "test" / "bee" / "notes.txt").write_text("x")
    (folder / "README.md").write_text("not below a split")
    for _ in range(2):
        data = load_data(DataConfig(source=str(folder), val_fraction=0.2))
        output = capsys.readouterr().out
        assert "data: skipped 4 of 29 files, not images (.heic, .txt)\n" in output
        assert "; 14 training, 3 validation, 8 test images of 2 classes\n" in output
    assert data.storage.startswith("in memory, decoded once (")


def test_hidden_files_are_ignored(folder, capsys):
    (folder / "train" / "ape" / ".#lock").symlink_to("user@host.1234")
    (folder / "train" / ".thumbnails").mkdir()
    picture(0).save(folder / "train" / ".thumbnails" / "0.png")
    (folder / "__MACOSX").mkdir()
    (folder / ".linked").symlink_to(folder / "train")
    assert len(load_data(DataConfig(source=str(folder), val_fraction=0.0)).train.labels) == 20
    assert "skipped" not in capsys.readouterr().out


def test_common_endings_are_images_to_datasets():
    assert set(COMMON) <= set(ImageFolder.EXTENSIONS)


def test_links_to_files_are_followed(folder):
    (folder / "train" / "ape" / "0.png").rename(folder.parent / "elsewhere.png")
    (folder / "train" / "ape" / "0.png").symlink_to(folder.parent / "elsewhere.png")
    assert len(load_data(DataConfig(source=str(folder), val_fraction=0.0)).train.labels) == 20


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_images_described_by_a_file_may_lie_anywhere(tmp_path, form):
    for split in ("train", "test"):
        place = tmp_path / "set" / split / "by year" / "2020"
        place.mkdir(parents=True)
        rows = [(f"by year/2020/{number}.png", "ab"[number % 2]) for number in range(6)]
        for number, (name, _) in enumerate(rows):
            picture(number).save(tmp_path / "set" / split / name)
        lines = [json.dumps({"file_name": name, "label": label}) for name, label in rows]
        if form == "csv":
            lines = ["file_name,label", *(",".join(row) for row in rows)]
        (tmp_path / "set" / split / f"metadata.{form}").write_text("\n".join(lines))
    assert load_data(DataConfig(source=str(tmp_path / "set"), val_fraction=0.0)).classes == ("a", "b")


def test_a_test_class_without_training_images_is_named(folder, capsys):
    shutil.copytree(folder / "test" / "bee", folder / "test" / "cow")
    load_data(DataConfig(source=str(folder)))
    assert "data: classes of the test split without a training image: 1 (cow)\n" in capsys.readouterr().out


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("label", ["image", "boxes"])
def test_a_label_column_holds_numbers_or_names(tmp_path, label, stream):
    rows = {"image": [picture(n) for n in range(4)], "label": [0, 1, 0, 1], "boxes": [[1, 2]] * 4}
    kinds = Features({"image": ImageFeature(), "label": Value("int64"), "boxes": List(Value("int64"))})
    source = parquet(tmp_path / "set", rows, kinds)
    with pytest.raises(UserError, match=rf"--label {label}: needs numbers or names, not \w+; \S+ has image \(Image\)"):
        load_data(DataConfig(source=source, label=label, stream=stream))


@pytest.mark.parametrize("stream", [False, True])
def test_a_missing_name_is_an_error_of_one_line(tmp_path, stream):
    rows = {"img": [picture(n) for n in range(4)], "label": ["a", "b", None, "a"]}
    source = parquet(tmp_path / "set", rows, Features({"img": ImageFeature(), "label": Value("string")}))
    with pytest.raises(UserError, match="--label label: needs whole numbers or names, one for each row"):
        load_data(DataConfig(source=source, stream=stream))


def test_an_unknown_users_home_is_named():
    with pytest.raises(UserError, match="--data ~nobodyx/foo: no such file or folder"):
        load_data(DataConfig(source="~nobodyx/foo"))


def test_a_folder_takes_precedence_over_a_set_of_the_same_name(folder, capsys):
    folder.rename("food101")
    data = load_data(DataConfig(source="food101"))
    assert (data.classes, data.size) == (("ape", "bee"), (12, 12))
    assert "data: the folder food101, not the set of that name\n" in capsys.readouterr().out
    Path("food101").rename("digits")
    assert len(load_data(DataConfig(source="digits")).classes) == 10
    assert "data: the built-in set digits, not the folder, which ./digits names\n" in capsys.readouterr().out


def test_statistics_count_few_bytes_at_a_time(monkeypatch):
    images = np.zeros((10, 3, 8, 8), np.uint8)
    monkeypatch.setattr("kd.data.statistics.BLOCK_BYTES", 3 * images[0].nbytes)
    assert [len(block) for block in iter_blocks(images, np.arange(10))] == [3, 3, 3, 1]
    monkeypatch.setattr("kd.data.statistics.BLOCK_BYTES", 1)
    assert [len(block) for block in iter_blocks(images, np.arange(4))] == [1] * 4


def test_held_out_rows_are_not_copied(folder):
    """Training and validation rows share one memory map, also between the processes of a run."""
    data = load_data(DataConfig(source=str(folder)))
    assert data.train.stored.data_ptr() == data.val.stored.data_ptr()
    (batch,) = data.train.batches([torch.tensor([7, 0, 3])], torch.device("cpu"))
    assert torch.equal(batch, data.train.images[[7, 0, 3]])
    assert data.train.sha256 == Split(data.train.images, data.train.labels).sha256
    assert data.train.on(torch.device("cpu")) is data.train
    assert isinstance(data.test, Split), "a split of all rows needs no row numbers"


def test_the_containers_memory_limit_decides_what_fits(tmp_path, monkeypatch):
    limits = [tmp_path / name for name in ("group", "parent", "absent")]
    limits[0].write_text("max\n")
    limits[1].write_text("1000000\n")
    monkeypatch.setattr("kd.utils.system.limit_files", lambda: limits)
    assert memory_limit() == 1_000_000
    assert fits_memory(500_000, DataConfig())[0]
    fits, why = fits_memory(500_001, DataConfig())
    assert (fits, why.split(" memory")[0]) == (False, "their 0.5 MB do not fit half of 1 MB of")


def test_the_limits_of_every_group_above_are_read():
    files = limit_files()
    assert Path("/sys/fs/cgroup/memory.max") in files
    assert all(file.is_relative_to("/sys/fs/cgroup") for file in files)


@pytest.mark.slow
@needs_cifar100
def test_the_real_cifar100():
    data = load_data(DataConfig(source=str(CIFAR100)))
    assert (len(data.train.labels), len(data.val.labels), len(data.test.labels)) == (45_000, 5_000, 10_000)
    assert data.classes[:2] == ("apple", "aquarium_fish")
    assert (torch.bincount(data.val.labels) == 50).all()
    np.testing.assert_allclose(data.mean, (0.5071, 0.4867, 0.4408), atol=1e-3)
    np.testing.assert_allclose(data.std, (0.2675, 0.2565, 0.2761), atol=1e-3)


@pytest.mark.parametrize("content", ['{"counts": [[1, 2], [3, 4]]}', '{"counts": [[1]', '{"other": 1}', "digit"])
def test_levels_are_counted_once_and_again_if_what_was_kept_is_damaged(tmp_path, monkeypatch, content):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    first = load_data(DataConfig("synthetic"))
    (path,) = cache_root().glob("data/*/levels-*.json")
    kept = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("kd.data.storage.count_levels", None)
        again = load_data(DataConfig("synthetic"))
    assert (again.mean, again.std) == (first.mean, first.std)
    digit = next(place for place, letter in enumerate(kept) if letter in "12345678")
    path.write_text(kept[:digit] + "9" + kept[digit + 1 :] if content == "digit" else content)
    again = load_data(DataConfig("synthetic"))
    assert (again.mean, again.std) == (first.mean, first.std)
    assert path.read_text() == kept
    load_data(DataConfig("synthetic", split_seed=1))
    assert len(list(cache_root().glob("data/*/levels-*.json"))) == 2, "other rows have their own"


def test_mapped_rows_that_do_not_fit_a_gpu_are_not_copied(monkeypatch):
    rows = MappedRows(torch.zeros(50, 3, 4, 4, dtype=torch.uint8), torch.arange(40), torch.zeros(40, dtype=torch.long))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, 2**36))
    monkeypatch.setattr(MappedRows, "images", property(lambda self: pytest.fail("copied in the host's memory")))
    placed = rows.on(torch.device("cuda"))
    assert placed.stored.data_ptr() == rows.stored.data_ptr()


def test_mapped_rows_that_fit_a_device_are_copied_in_parts(monkeypatch):
    monkeypatch.setattr("kd.data.rows.BLOCK", 7)
    stored = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(copy_rows(stored, torch.arange(0, 40, 2), torch.device("cpu")), stored[0:40:2])
    rows = MappedRows(stored, torch.arange(40), torch.zeros(40, dtype=torch.long))
    monkeypatch.setattr(MappedRows, "images", property(lambda self: pytest.fail("copied at once")))
    assert rows.on(torch.device("meta")).images.shape == (40, 3, 4, 4)


@pytest.mark.parametrize("how", [{}, {"decode": "workers", "workers": 0}, {"stream": True}], ids=str)
def test_a_test_split_without_labels_is_left_out_and_validation_scores(tmp_path, how, capsys):
    source = of_three_splits(tmp_path / "set")
    rows = {"img": [picture(n) for n in range(10)], "label": [-1] * 10}
    Dataset.from_dict(rows, features=FEATURES).to_parquet(f"{source}/data/test-00000-of-00001.parquet")
    data = load_data(DataConfig(source=source, **how))
    assert (data.test_split, len(data.test.labels)) == ("validation", 10)
    assert "data: the test split has no labels and is left out\n" in capsys.readouterr().out
    rows["label"] = [-1] + [0] * 9
    Dataset.from_dict(rows, features=FEATURES).to_parquet(f"{source}/data/test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"test row 0: label (-1|None) is not one of the 2 classes"):
        load_data(DataConfig(source=source, **how))


def test_one_class_is_no_classification(tmp_path):
    rows = {"img": [picture(n) for n in range(10)], "label": ["ape"] * 10}
    source = parquet(tmp_path / "set", rows, Features({"img": ImageFeature(), "label": Value("string")}))
    with pytest.raises(UserError, match=r"has one class only \(ape\); two or more are needed"):
        load_data(DataConfig(source=source))
    data = load_data(DataConfig(source=source, no_labels=True))
    assert not data.labelled


def test_a_class_that_is_called_train_is_told_from_the_split(tmp_path):
    for name in ("bus", "car", "train"):
        (tmp_path / "vehicles" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "vehicles" / name / "0.png")
    source, words = DataConfig(str(tmp_path / "vehicles"), val_fraction=0.0), "if train is a class, as bus, car"
    for number in (1, 2):
        for name in ("bus", "car", "train"):
            picture(number).save(tmp_path / "vehicles" / name / f"{number}.png")
    with pytest.raises(UserError, match=f"in no class folder; move .*; {words} may be, call it trains, say"):
        load_data(source)
    (tmp_path / "vehicles" / "train").rename(tmp_path / "vehicles" / "trains")
    assert load_data(source).classes == ("bus", "car", "trains")
