"""Columns, classes and rows are the source's own; what is left out is counted, what is unclear is refused."""

import json
import shutil
import unicodedata
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from kd.config import DataConfig
from kd.data import load_data
from kd.data.columns import check_class_names
from kd.errors import UserError
from kd.report.build import write_report
from tests.run_scripts import teach

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
HOW = [{}, {"decode": "workers", "workers": 0}, {"stream": True}]


def picture(colour: str, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-25, 26, (12, 12, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def colour_of(image) -> str:
    """The colour of an image 3 x h x w."""
    return list(COLOURS)[int(torch.as_tensor(image).double().mean((1, 2)).argmax())]


def save(path: Path, colour: str, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(colour, seed).save(path)


def folder(root: Path, splits=(("train", 8), ("test", 4)), names=tuple(COLOURS)) -> Path:
    """An imagefolder of one class for each colour."""
    for split, count in splits:
        for name, colour in zip(names, COLOURS):
            for number in range(count):
                save(root / split / name / f"{number}.png", colour, number)
    return root


def parquet(path: Path, names: list[str] | None, kind=None, counts: int = 4, columns: dict | None = None) -> None:
    """A parquet file of these classes' colours; the labels are numbers of `names`, or values of `kind`."""
    values = [name for name in names for _ in range(counts)]
    pictures = [picture(name, number) for number, name in enumerate(values)]
    labels = [names.index(name) for name in values]
    rows = {"image": pictures, "label": labels} | {name: make(values) for name, (_, make) in (columns or {}).items()}
    features = {"image": ImageFeature(), "label": kind or ClassLabel(names=names)}
    features |= {name: of for name, (of, _) in (columns or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=Features(features)).to_parquet(path)


def labelled_by_colour(data) -> bool:
    """Whether every label of test and training images names the image's colour."""
    pairs = []
    for split in (data.train, data.test):
        (images,) = split.batches([torch.arange(len(split.labels))], torch.device("cpu"))
        pairs += zip(images, split.labels)
    return all(colour_of(image) == data.classes[label] for image, label in pairs)


# Columns


def test_class_names_in_another_order_are_matched_by_name(tmp_path, capsys):
    parquet(tmp_path / "set" / "train.parquet", ["red", "green", "blue"])
    parquet(tmp_path / "set" / "test.parquet", ["blue", "green", "red"])
    for how in HOW[:2]:
        for _ in range(2):  # read, and found again on disk
            data = load_data(DataConfig(source=str(tmp_path / "set"), val_fraction=0.0, **how))
            assert data.classes == ("red", "green", "blue")
            assert labelled_by_colour(data)
            output = capsys.readouterr().out
            assert "name the classes of label differently (red, green, blue and blue, green, red): numbered" in output
    with pytest.raises(UserError, match=r"train.parquet and test.parquet name the classes of label differently .*anew"):
        load_data(DataConfig(source=str(tmp_path / "set"), stream=True))


def test_class_names_may_differ_from_file_to_file_of_a_split(tmp_path):
    parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", ["red", "green"])
    parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", ["green", "blue", "red"])
    parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", ["blue", "green"])
    data = load_data(DataConfig(source=str(tmp_path / "set"), val_fraction=0.0))
    assert data.classes == ("red", "green", "blue")
    assert labelled_by_colour(data)
    assert (len(data.train.labels), len(data.test.labels)) == (20, 8)


def test_sets_that_datasets_saved_are_read(tmp_path, capsys):
    for split, names in (("train", ["red", "green"]), ("test", ["green", "red"])):
        parquet(tmp_path / f"{split}.parquet", names)
        rows = datasets.Dataset.from_parquet(str(tmp_path / f"{split}.parquet"))
        rows.save_to_disk(str(tmp_path / "set" / split))
    data = load_data(DataConfig(source=str(tmp_path / "set"), val_fraction=0.0))
    assert labelled_by_colour(data)
    assert "train/data-00000-of-00001.arrow and test/data-00000-of-00001.arrow name the" in capsys.readouterr().out


@pytest.mark.parametrize("parent", ["one", "other"])  # `datasets` takes folders of one name with a card for the same
def test_a_dataset_card_names_the_splits(tmp_path, parent):
    root = folder(tmp_path / parent / "set", (("a", 8), ("b", 4)))
    lines = ["configs:", "- config_name: default", "  data_files:", "  - split: train", "    path: a/*/*"]
    (root / "README.md").write_text("\n".join(["---", *lines, "  - split: test", "    path: b/*/*", "---"]))
    data = load_data(DataConfig(source=str(root), val_fraction=0.0))
    assert (len(data.train.labels), len(data.test.labels)) == (24, 12)


def test_a_file_without_class_names_is_said(tmp_path, capsys):
    parquet(tmp_path / "set" / "train.parquet", ["red", "green"])
    parquet(tmp_path / "set" / "test.parquet", ["red", "green"], Value("int64"))
    load_data(DataConfig(source=str(tmp_path / "set")))
    assert "column label has no class names in test.parquet; its numbers count as" in capsys.readouterr().out


MASK = {"mask": (ImageFeature(), lambda names: [Image.new("RGB", (12, 12))] * len(names))}


@pytest.mark.parametrize("how", HOW)
def test_the_image_column_is_the_one_called_image_or_the_one_asked_for(tmp_path, how, capsys):
    for split in ("train", "test"):
        parquet(tmp_path / "set" / f"{split}.parquet", ["red", "green", "blue"], columns=MASK)
    source = str(tmp_path / "set")
    assert labelled_by_colour(load_data(DataConfig(source=source, val_fraction=0.0, **how)))
    assert "columns image and label; 12 training" in capsys.readouterr().out
    masks = load_data(DataConfig(source=source, image="mask", val_fraction=0.0, **how))
    assert masks.mean == (0, 0, 0)
    assert "columns mask and label; 12 training" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--image photo: no such image column in \S+; it has image \(Image\)"):
        load_data(DataConfig(source=source, image="photo", **how))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"img": MASK["mask"]}, r"several image columns \(image, img\); choose one with --image"),
        ({"labels": (Value("int64"), lambda names: [0, 1] * (len(names) // 2))}, None),
        ({"target": (ClassLabel(names=["a", "b"]), lambda names: [0, 1] * (len(names) // 2))},
         r"several label columns \(label, target\); choose one with --label"),
    ],
    ids=["two images", "one typed", "two labels"],
)  # fmt: skip
def test_of_several_columns_one_is_clear_or_none_is_taken(tmp_path, columns, words):
    for split in ("train", "test"):
        parquet(tmp_path / "set" / f"{split}.parquet", ["red", "green"], columns=columns)
    if words is None:
        assert load_data(DataConfig(source=str(tmp_path / "set"))).classes == ("red", "green")
    else:
        with pytest.raises(UserError, match=words):
            load_data(DataConfig(source=str(tmp_path / "set")))


def test_two_plain_columns_that_could_be_labels_are_refused(tmp_path):
    other = {"class": (Value("string"), list)}
    for split in ("train", "test"):
        parquet(tmp_path / "set" / f"{split}.parquet", ["red", "green"], Value("int64"), columns=other)
    with pytest.raises(UserError, match=r"several label columns \(label, class\); choose one with --label"):
        load_data(DataConfig(source=str(tmp_path / "set")))
    assert load_data(DataConfig(source=str(tmp_path / "set"), label="class")).classes == ("green", "red")


def test_splits_that_are_not_used_are_named(tmp_path, capsys):
    for split in ("train", "test", "extra"):
        parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet", ["red", "green"])
    load_data(DataConfig(source=str(tmp_path / "set")))
    assert "data: splits that are not used: extra\n" in capsys.readouterr().out


# Classes


@pytest.mark.parametrize("how", HOW)
def test_integer_labels_are_the_classes_that_occur(tmp_path, how, capsys):
    labels = {"number": (Value("int64"), lambda names: [{"red": 1, "green": 2, "blue": 5}[name] for name in names])}
    for split in ("train", "test"):
        parquet(tmp_path / "set" / f"{split}.parquet", ["red", "green", "blue"], columns=labels)
    data = load_data(DataConfig(source=str(tmp_path / "set"), label="number", val_fraction=0.0, **how))
    assert data.classes == ("1", "2", "5")
    assert data.test.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (
        "the 3 classes are the numbers that occur in column number (1, 2, 5), not all up to 5\n"
        in capsys.readouterr().out
    )


def described(root: Path, split: str, rows: dict[str, str], form: str = "csv", colour=None) -> None:
    """Images in one folder, and their labels in metadata."""
    lines = []
    for number, (name, label) in enumerate(rows.items()):
        save(root / split / name, colour(label) if colour else list(COLOURS)[number % 3], number)
        lines.append(json.dumps({"file_name": name, "label": label}) if form == "jsonl" else f"{name},{label}")
    header = ["file_name,label"] if form == "csv" else []
    (root / split / f"metadata.{form}").write_text("\n".join(header + lines))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_labels_in_metadata_keep_their_names(tmp_path, form, how):
    names = ("001", "002", "010")
    for split in ("train", "test"):
        described(tmp_path / "set", split, {f"{n}.png": names[n % 3] for n in range(12)}, form)
    data = load_data(DataConfig(source=str(tmp_path / "set"), val_fraction=0.0, **how))
    assert data.classes == names
    assert data.test.labels.tolist() == [0, 1, 2] * 4


def listed(root: Path, split: str, colours: list[str], names: list[str], part: str = "") -> None:
    """Images of these colours, and a parquet file in the same folder with their labels as numbers of `names`."""
    for number, colour in enumerate(colours):
        save(root / split / part / f"{number}.png", colour, number)
    rows = {"file_name": [f"{number}.png" for number in range(len(colours))], "label": list(map(names.index, colours))}
    kinds = Features({"file_name": Value("string"), "label": ClassLabel(names=names)})
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(root / split / part / "metadata.parquet")


@pytest.mark.parametrize("how", HOW)
def test_classes_of_metadata_are_matched_by_name(tmp_path, how):
    listed(tmp_path / "set", "train", ["red", "green"] * 4, ["red", "green", "blue"], "one")
    listed(tmp_path / "set", "train", ["blue", "red"] * 4, ["blue", "red"], "other")
    listed(tmp_path / "set", "test", ["green", "blue"] * 3, ["green", "blue"])
    data = load_data(DataConfig(source=str(tmp_path / "set"), val_fraction=0.0, **how))
    assert data.classes == ("blue", "green", "red")
    assert labelled_by_colour(data)


@pytest.mark.parametrize(
    ("label", "words"),
    [(-1, "test row 1: label None is not one of the 2 classes"), (2, "label has the label 2, and 2 class names")],
)
def test_a_number_in_metadata_that_is_no_class_is_named(tmp_path, label, words):
    for split in ("train", "test"):
        listed(tmp_path / "set", split, ["red", "green"] * 4, ["red", "green"])
    path = tmp_path / "set" / "test" / "metadata.parquet"
    table = pq.read_table(path)
    labels = pa.array([0, label, *[0] * 6], pa.int64())
    pq.write_table(table.set_column(1, table.schema.field("label"), labels), path)
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(source=str(tmp_path / "set")))


def test_a_class_may_be_called_na(tmp_path):
    for split in ("train", "test"):
        described(tmp_path / "set", split, {f"{n}.png": ("NA", "null", "1.0")[n % 3] for n in range(6)})
    assert load_data(DataConfig(source=str(tmp_path / "set"))).classes == ("1.0", "NA", "null")


@pytest.mark.parametrize("how", HOW)
def test_class_folders_may_begin_with_underscores(tmp_path, how):
    folder(tmp_path / "set", names=("__red", "_green", "blue"))
    (tmp_path / "set" / "train" / "__pycache__").mkdir()
    data = load_data(DataConfig(source=str(tmp_path / "set"), val_fraction=0.0, **how))
    assert data.classes == ("__red", "_green", "blue")
    assert len(data.train.labels) == 24


def test_hidden_images_are_counted(tmp_path, capsys):
    folder(tmp_path / "set")
    save(tmp_path / "set" / "train" / ".net" / "0.png", "red")
    save(tmp_path / "set" / "test" / "red" / "._0.png", "red")
    data = load_data(DataConfig(source=str(tmp_path / "set")))
    assert data.classes == ("blue", "green", "red")
    assert "left out 2 images whose own or folder's name marks them as hidden" in capsys.readouterr().out


@pytest.mark.parametrize(
    "pair",
    [(unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")), ("Red", "red"), ("red", "red ")],
    ids=["form", "case", "space"],
)
def test_class_names_that_look_alike_are_refused_with_their_code_points(tmp_path, pair):
    folder(tmp_path / "set", (("train", 8),), (pair[0], "green", "blue"))
    folder(tmp_path / "set", (("test", 4),), (pair[1], "green", "blue"))
    with pytest.raises(UserError, match="class names that differ in Unicode form, case or spaces only") as caught:
        load_data(DataConfig(source=str(tmp_path / "set")))
    for name in pair:
        assert " ".join(f"U+{ord(character):04X}" for character in name) in str(caught.value)


def test_letters_of_handwriting_stay_apart():
    check_class_names(("A", "a", "\u00e9", "E\u0301"), "letters")
    with pytest.raises(UserError, match="U\\+00E9"):
        check_class_names(("\u00e9", "e\u0301"), "letters")


def test_classes_of_one_split_only_are_named(tmp_path, capsys):
    folder(tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "test" / "red")
    (tmp_path / "set" / "train" / "hollow").mkdir()
    load_data(DataConfig(source=str(tmp_path / "set")))
    output = capsys.readouterr().out
    assert "data: classes without a test image: 1 (red)\n" in output
    assert "data: left out 1 empty class folder (train/hollow)\n" in output


def test_named_classes_without_an_image_are_counted(tmp_path, capsys):
    for split in ("train", "test"):
        parquet(tmp_path / "set" / f"{split}.parquet", ["red", "green"], ClassLabel(names=["r", "g", "b", "c"]))
    load_data(DataConfig(source=str(tmp_path / "set")))
    assert "data: classes without an image: 2 (b, c)\n" in capsys.readouterr().out


# Rows


@pytest.mark.parametrize("how", HOW)
def test_images_that_metadata_does_not_name_are_counted_at_every_start(tmp_path, how, capsys):
    for split in ("train", "test"):
        described(tmp_path / "set", split, {f"{n}.png": "ab"[n % 2] for n in range(8)})
    for number in range(8, 16):
        save(tmp_path / "set" / "train" / f"{number}.png", "red")
    for _ in range(2):
        data = load_data(DataConfig(source=str(tmp_path / "set"), val_fraction=0.0, **how))
        assert len(data.train.labels) == 8
        assert (
            "data: train: train/metadata.csv names 8 of 16 images; left out 8 (train/10.png" in capsys.readouterr().out
        )


def write(folder: Path, text: str) -> None:
    (folder / "train" / "metadata.csv").write_text(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "train" / "0.png").unlink(), r"train/metadata.csv names 1 images .*\(row 1: 0.png\); correct"),
        (lambda f: (f / "test" / "metadata.csv").unlink(), "test split has 8 images and no metadata file like train"),
        (lambda f: write(f, "id;label\n0.png;a"), "no column file_name; it has id;label"),
        (lambda f: write(f, "file_name,label\n0.png"), "row 1 has 1 values, the header 2"),
        (lambda f: write(f, "file_name,label\n../test/0.png,a\n"), "not below its folder"),
        (lambda f: write(f, "file_name,label\n0.png,\n1.png,a\n"), "one for each row"),
    ],
    ids=["missing", "one split", "other columns", "short row", "outside", "no label"],
)  # fmt: skip
def test_metadata_that_does_not_fit_is_refused(tmp_path, change, words):
    for split in ("train", "test"):
        described(tmp_path / "set", split, {f"{n}.png": "ab"[n % 2] for n in range(8)})
    change(tmp_path / "set")
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(source=str(tmp_path / "set")))


def test_images_outside_of_the_splits_are_counted(tmp_path, capsys):
    save(folder(tmp_path / "set") / "more" / "red" / "0.png", "red")
    load_data(DataConfig(source=str(tmp_path / "set")))
    assert "left out 1 image outside of the splits' folders (more/red/0.png)\n" in capsys.readouterr().out


def test_a_split_of_several_folders_says_so(tmp_path, capsys):
    folder(tmp_path / "set", (("train", 8), ("train_small", 2), ("test", 4)))
    load_data(DataConfig(source=str(tmp_path / "set")))
    assert "the train split is made of 2 folders: train, train_small\n" in capsys.readouterr().out


def test_a_folder_named_like_two_splits_is_refused(tmp_path):
    folder(tmp_path / "set", (("train-test", 8), ("test", 4)))
    with pytest.raises(UserError, match=r"the folder train-test is named like several splits \(train, test\); rename"):
        load_data(DataConfig(source=str(tmp_path / "set")))


# Test splits


def test_a_folder_of_classes_holds_out_a_test_split_by_class(tmp_path, capsys):
    folder(tmp_path / "set" / "flowers", (("", 10),))
    source = str(tmp_path / "set")
    data = load_data(DataConfig(source=source))
    assert (
        "data: only a train split: 0.2 of each class is held out for testing (--test-fraction)\n"
        in capsys.readouterr().out
    )
    assert torch.bincount(data.test.labels).tolist() == [2, 2, 2]
    assert (len(data.train.labels), len(data.val.labels)) == (21, 3)
    assert labelled_by_colour(data)
    same = load_data(DataConfig(source=source, split_seed=5))
    assert torch.equal(same.test.images, data.test.images), "the test images do not depend on --split-seed"
    assert torch.equal(load_data(DataConfig(source=source, stream=True)).test.labels, data.test.labels)
    assert len(load_data(DataConfig(source=source, test_fraction=0.5)).test.labels) == 15
    with pytest.raises(UserError, match="only a train split; give a test split, or --test-fraction to hold one out"):
        load_data(DataConfig(source=source, test_fraction=0.0))


def test_a_test_fraction_is_not_ignored(tmp_path):
    with pytest.raises(UserError, match=r"--test-fraction 0.3: \S+ has a test split of its own; leave it out"):
        load_data(DataConfig(source=str(folder(tmp_path / "set")), test_fraction=0.3))


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test")])
def test_a_validation_split_that_is_reported_says_so(tmp_path, splits, capsys):
    folder(tmp_path / "set", ((splits[0], 8), (splits[1], 4)))
    teach("--data", str(tmp_path / "set"), "--epochs", "1", "--batch-size", "8", "--out", "run")
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["test_split"] == ("validation" if splits[1] == "val" else "test")
    write_report(["run"], Path("report"))
    told = "test is its validation split" in Path("report/report.md").read_text()
    assert told == (splits[1] == "val")
    said = "no test split: the validation split is scored at the end in its place" in capsys.readouterr().out
    assert said == (splits[1] == "val")


def test_one_image_a_class_says_what_to_do(tmp_path):
    source = str(folder(tmp_path / "set", (("train", 1), ("test", 1))))
    with pytest.raises(UserError, match=r"the validation split is empty; .*give --val-fraction 0 to train without"):
        load_data(DataConfig(source=source))
    assert load_data(DataConfig(source=source, val_fraction=0.0)).val is None


# Names


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["images", "tables"])
@pytest.mark.parametrize("name", ["my [v2] data", "what?", "50% *new* #1 {a,b}"])
def test_a_path_is_no_pattern(tmp_path, name, kind, how):
    if kind == "images":
        folder(tmp_path / name)
    else:
        for split in ("train", "test"):
            parquet(tmp_path / name / "data" / f"{split}-00000-of-00001.parquet", list(COLOURS))
    assert labelled_by_colour(load_data(DataConfig(source=str(tmp_path / name), val_fraction=0.0, **how)))


@pytest.mark.parametrize("how", HOW)
def test_class_folders_may_have_brackets(tmp_path, how):
    folder(tmp_path / "set", names=("[red]", "green*", "blue?"))
    assert load_data(DataConfig(source=str(tmp_path / "set"), **how)).classes == ("[red]", "blue?", "green*")


@pytest.mark.parametrize("place", [b"train/red/caf\xe9.png", b"train/caf\xe9/0.png"])
def test_a_name_that_is_not_utf8_is_named(tmp_path, place):
    root = folder(tmp_path / "set")
    path = bytes(root) + b"/" + place
    Path(path.decode(errors="surrogateescape")).parent.mkdir(exist_ok=True)
    shutil.copy(root / "train" / "red" / "0.png", path)
    with pytest.raises(UserError, match=r"1 file with a name that is not UTF-8 \(train/.*caf.*; rename it"):
        load_data(DataConfig(source=str(root)))


def test_a_note_may_have_any_name(tmp_path):
    root = folder(tmp_path / "set")
    Path((bytes(root) + b"/train/caf\xe9.txt").decode(errors="surrogateescape")).write_text("x")
    assert len(load_data(DataConfig(source=str(root))).test.labels) == 12


# What is not read


def zipped(path: Path, source: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(source.rglob("*.png")):
            archive.write(file, file.relative_to(source))


def test_archives_are_named_with_what_they_hold(tmp_path, capsys):
    root = folder(tmp_path / "set")
    zipped(root / "train" / "more.zip", root / "test")
    load_data(DataConfig(source=str(root)))
    assert "left out train/more.zip with 12 images; unpack it if they belong here\n" in capsys.readouterr().out
    (root / "train" / "more.zip").unlink()
    for split in ("train", "test"):
        zipped(root / f"{split}.zip", root / split)
        shutil.rmtree(root / split)
    with pytest.raises(UserError, match=r"test.zip holds 12 images .* unpack it: unzip test.zip -d test"):
        load_data(DataConfig(source=str(root)))


def test_a_list_beside_a_flat_folder_tells_of_metadata(tmp_path):
    for number in range(4):
        save(tmp_path / "set" / "train" / f"{number}.png", "red")
    (tmp_path / "set" / "train.csv").write_text("id,category\n0.png,red\n")
    with pytest.raises(
        UserError,
        match=r"train.csv \(id,category\) is not read; .* train/metadata.csv, columns file_name \(0.png\) and label",
    ):
        load_data(DataConfig(source=str(tmp_path / "set")))
    shutil.move(tmp_path / "set" / "train", tmp_path / "set" / "pictures")
    with pytest.raises(UserError, match=r"only one class folder \(pictures\); .*train.csv \(id,category\) is not read"):
        load_data(DataConfig(source=str(tmp_path / "set")))


def test_splits_in_capitals_are_told_how_to_be_written(tmp_path):
    folder(tmp_path / "set", (("Train", 3), ("Test", 3)))
    with pytest.raises(UserError, match="the folder Test, Train is no split's: write test, train in lower case"):
        load_data(DataConfig(source=str(tmp_path / "set")))


def test_what_was_found_is_shown(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("id,label\n0,red\n")
    with pytest.raises(UserError, match=r"no image column; it has id \(Value\), label \(Value\)"):
        load_data(DataConfig(source=str(tmp_path / "set")))
    (tmp_path / "set" / "train.csv").unlink()
    (tmp_path / "set" / "a.heic").write_text("x")
    with pytest.raises(UserError, match=r"no readable image data \(it has 1 file: 1 .heic; "):
        load_data(DataConfig(source=str(tmp_path / "set")))


# Images that cannot be read


def break_images(root: Path, names: list[str]) -> None:
    for name in names:
        path = root / name
        path.write_bytes(path.read_bytes()[:60])


BROKEN = [*(f"train/red/{number}.png" for number in range(7)), *(f"test/blue/{number}.png" for number in range(4))]


@pytest.mark.parametrize("how", HOW)
def test_broken_images_are_listed_before_training(tmp_path, how):
    break_images(folder(tmp_path / "set", (("train", 8), ("test", 5))), BROKEN)
    with pytest.raises(UserError, match=r"images cannot be read: .*leave them out with --skip-broken") as caught:
        load_data(DataConfig(source=str(tmp_path / "set"), image_size=8, **how))
    if "stream" in how:
        assert str(caught.value).startswith("5 images cannot be read: test row 0 ("), "held out of training"
    else:
        assert str(caught.value).startswith("11 images cannot be read: train row ")
        assert "; and 1 more; repair" in str(caught.value)


def test_broken_images_are_left_out_and_counted(tmp_path, capsys):
    root = folder(tmp_path / "set", (("train", 8), ("test", 5)))
    whole = load_data(DataConfig(source=str(root)))
    break_images(root, BROKEN)
    found = []
    for how in HOW:
        for _ in range(2):
            data = load_data(DataConfig(source=str(root), skip_broken=True, **how))
            assert "data: left out 11 images that cannot be read: 7 train, 4 test (" in capsys.readouterr().out
        assert (len(data.train.labels) + len(data.val.labels), len(data.test.labels)) == (17, 11)
        assert labelled_by_colour(data)
        found.append(data)
    assert found[0].fingerprint == found[1].fingerprint != whole.fingerprint
    assert found[0].mean == found[1].mean == found[2].mean


def test_the_first_image_may_be_broken(tmp_path):
    break_images(folder(tmp_path / "set"), ["train/blue/0.png"])
    for how in HOW:
        with pytest.raises(UserError, match=r"train row 0 \(\S+/train/blue/0.png\): not a readable image"):
            load_data(DataConfig(source=str(tmp_path / "set"), val_fraction=0.0, **how))
        assert load_data(DataConfig(source=str(tmp_path / "set"), skip_broken=True, **how)).size == (12, 12)
