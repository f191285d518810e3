"""Data of the user's own, --data module:function: read once, checked, trusted on the command line only."""

import json
import sys
from pathlib import Path

import pytest

from kd.config import DataConfig
from kd.data import load_data
from kd.errors import UserError, UsersOwnError
from kd.export.__main__ import main
from tests.run_scripts import teach

MODULE = """
from pathlib import Path
import torch
from PIL import Image

COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220)]
BY_NAME = {"red": COLOURS[0], "green": COLOURS[1], "blue": COLOURS[2], "black": (0, 0, 0)}

class Pictures:
    classes = ["red", "green", "blue"]
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, row):
        if row >= self.count: raise IndexError
        return Image.new("RGB", (12 + row % 2 * SIZES, 12), COLOURS[row % 3]), row % 3

class Tensors(Pictures):
    classes = None
    def __getitem__(self, row):
        return torch.full((3, 12, 12), 80 * (row % 3), dtype=torch.uint8), torch.tensor(row % 3)

class Broken(Pictures):
    def __getitem__(self, row):
        if row % 5 == 1: raise OSError("image file is truncated")
        return super().__getitem__(row)

SIZES = 0
def pictures(): return {"train": Pictures(24), "test": Pictures(9)}
def lazy(): return {"train": Lazy(24), "test": Pictures(9)}
def turned(): return {"train": Turned(24), "test": Turned(9)}
def one_class(): return {"train": [(Image.new("RGB", (12, 12)), 0)] * 4, "test": [(Image.new("RGB", (12, 12)), 0)]}
def tensors(): return {"train": Tensors(24), "test": Tensors(9)}
def floats(): return {"train": [(torch.zeros(3, 12, 12), 0)], "test": Pictures(9)}
def random(): return {"train": RandomPictures(24), "test": Pictures(9)}
def larger():
    resized = [(image.resize((16, 14)), label) for image, label in map(Pictures(9).__getitem__, range(9))]
    return {"train": Pictures(24), "test": resized}
def mostly(): return {"train": Seldom(24), "test": Pictures(9)}
def listed(): return [Pictures(24), Pictures(9)]
def empty(): return {"train": Pictures(24), "test": []}
def no_train(): return {"test": Pictures(9)}
def streams(): return {"train": iter([]), "test": iter([])}
def numbers(): return {"train": [(Image.new("RGB", (12, 12)), "red")], "test": Pictures(9)}
def many(): return {"train": Pictures(24), "test": [(Image.new("RGB", (12, 12)), 7)]}
def broken(): return {"train": Broken(24), "test": Broken(9)}
def mostly_broken(): return {"train": SeldomBroken(24), "test": Broken(9)}
def few(): return {"train": Pictures(24), "test": Renamed(9, ["green", "blue", "red"])}
def fewer(): return {"train": Pictures(24), "test": Renamed(9, ["blue", "green"])}
def other(): return {"train": Pictures(24), "test": Renamed(9, ["black", "blue", "green"])}
def marked():
    Path("ran").touch()
    return pictures()

class Lazy(Pictures):
    # Opened, and read only when its pixels are needed, as torchvision's sets without a loader do.
    def __getitem__(self, row):
        if row == 4: return Image.new("F", (12, 12)), 1
        if row != 3: return super().__getitem__(row)
        Image.effect_noise((12, 12), 50).convert("RGB").save("cut.jpg")
        whole = Path("cut.jpg").read_bytes()
        Path("cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
        return Image.open("cut.jpg"), 0

class Turned(Pictures):
    def __getitem__(self, row):
        image = Image.new("RGB", (12, 12), COLOURS[row % 3])
        image.paste((0, 0, 0), (0, 0, 12, 6))  # the upper half
        image.getexif()[0x0112] = 6  # to be turned clockwise
        return image, row % 3

class Renamed(Pictures):
    # Its colours are numbered as it names them.
    def __init__(self, count, classes): self.count, self.classes = count, classes
    def __getitem__(self, row):
        label = row % len(self.classes)
        return Image.new("RGB", (12, 12), BY_NAME[self.classes[label]]), label

class Seldom(Pictures):
    # Every seventh reading is another image; the first two, those of row 0, are alike.
    reads = 0
    def __getitem__(self, row):
        self.reads += 1
        return Image.new("RGB", (12, 12), COLOURS[self.reads % 7 == 0]), row % 3

class SeldomBroken(Seldom):
    def __getitem__(self, row):
        if row == 0: raise OSError("image file is truncated")
        return super().__getitem__(row)

class RandomPictures(Pictures):
    def __getitem__(self, row): return Image.effect_noise((12, 12), 50), row % 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path):
    """A module `mine` in the working folder, as a user has it."""
    (tmp_path / "mine.py").write_text(MODULE)
    yield tmp_path / "mine.py"
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("function", "classes"), [("pictures", ("red", "green", "blue")), ("tensors", ("0", "1", "2"))]
)
def test_images_and_labels_are_those_of_the_users_data(function, classes, capsys):
    data = load_data(DataConfig(source=f"mine:{function}", val_fraction=0.0))
    assert data.classes == classes
    assert data.train.labels.tolist() == [0, 1, 2] * 8
    expected = {"pictures": [[220, 30, 30], [30, 220, 30], [30, 30, 220]], "tensors": [[0] * 3, [80] * 3, [160] * 3]}
    assert data.test.images[:3, :, 5, 5].tolist() == expected[function]
    said = f"data: in memory, read from mine:{function}; 24 training, 9 test images of 3 classes\n"
    assert said in capsys.readouterr().out
    assert load_data(DataConfig(source=f"mine:{function}", val_fraction=0.0)).fingerprint == data.fingerprint


@pytest.mark.parametrize(("function", "shown"), [("few", "green, blue, red"), ("fewer", "blue, green")])
def test_a_split_that_numbers_its_classes_otherwise_is_numbered_by_name(function, shown, capsys):
    data = load_data(DataConfig(source=f"mine:{function}", val_fraction=0.0))
    assert data.classes == ("red", "green", "blue")
    assert data.test.labels.tolist() == data.test.images[:, :, 5, 5].int().argmax(1).tolist()
    said = f"data: train and test name the classes differently (red, green, blue and {shown}): numbered alike, by name"
    assert said in capsys.readouterr().out


def test_the_fingerprint_is_that_of_the_same_images_elsewhere(tmp_path, module):
    data = load_data(DataConfig(source="mine:pictures", val_fraction=0.0))
    module.write_text(MODULE.replace("(220, 30, 30)", "(221, 30, 30)"))
    sys.modules.pop("mine")
    assert load_data(DataConfig(source="mine:pictures", val_fraction=0.0)).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("floats", r"train row 0: gives a float32 tensor of \(3, 12, 12\); give PIL images, .* without ToTensor"),
        ("random", "train row 0: differs when it is read again; leave random transforms out"),
        ("mostly", "train row 3: differs when it is read again; leave random transforms out"),
        ("mostly_broken", "train row 4: differs when it is read again; leave random transforms out"),
        ("listed", r"returned list; it must return \{\"train\": dataset"),
        ("no_train", "no train split; it has test"),
        ("empty", "the test split is empty"),
        ("streams", "its train is list_iterator, without a length"),
        ("numbers", "train row 0: label 'red' is no class number"),
        ("many", "there is the label 7, and 3 class names"),
        ("other", "its test split has the class black, and train has red, green, blue; give both the same class names"),
        ("nothing", "mine has no function nothing"),
        ("broken", r"7 images cannot be read: train row 1: not a readable image \(image file is truncated\).*--skip"),
    ],
)
def test_what_does_not_fit_is_refused(function, words):
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(source=f"mine:{function}"))


def test_images_of_several_sizes_need_one_size(module):
    module.write_text(MODULE.replace("SIZES = 0", "SIZES = 4"))
    with pytest.raises(UserError, match="train row 1 is 16 x 12, others 12 x 12; give --image-size N"):
        load_data(DataConfig(source="mine:pictures"))
    assert load_data(DataConfig(source="mine:pictures", image_size=8)).size == (8, 8)


def test_a_split_of_another_size_needs_one_size():
    with pytest.raises(UserError, match="test row 0 is 16 x 14, others 12 x 12; give --image-size N"):
        load_data(DataConfig(source="mine:larger"))
    data = load_data(DataConfig(source="mine:larger", image_size=8))
    assert data.train.size == data.test.size == (8, 8)


def test_broken_images_are_left_out_and_counted(capsys):
    data = load_data(DataConfig(source="mine:broken", skip_broken=True, val_fraction=0.0))
    assert (len(data.train.labels), len(data.test.labels)) == (19, 7)
    assert data.train.labels.tolist() == [row % 3 for row in range(24) if row % 5 != 1]
    assert "data: left out 7 images that cannot be read: 5 train, 2 test (" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [{"stream": True}, {"decode": "workers"}, {"label": "x"}, {"image": "x"}])
def test_flags_for_other_data_are_refused(flags):
    with pytest.raises(UserError, match=r"leave .* out"):
        load_data(DataConfig(source="mine:pictures", **flags))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "def f():\n    return {}['train']\n",
            r"mine.py, line 2: KeyError: 'train' \(--data mine:f, called as f\(\)\); mend",
        ),
        (
            "1 / 0\n",
            r"mine.py, line 1: ZeroDivisionError: .* \(--data mine:f, while mine was imported\); mend that code",
        ),
    ],
)
def test_a_mistake_in_the_function_or_its_module_is_shown_as_the_users_own(text, words, module):
    module.write_text(text)
    with pytest.raises(UsersOwnError, match=words) as caught:
        load_data(DataConfig(source="mine:f"))
    assert "kd/data" not in caught.value.shown


def test_a_function_that_needs_arguments_is_named(module):
    module.write_text("def f(folder): pass\n")
    with pytest.raises(
        UserError, match=r"mine:f: is called as f\(\), .* f\(folder\) .*; give every parameter a default"
    ):
        load_data(DataConfig(source="mine:f"))


def test_a_module_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--data nowhere:f: cannot import nowhere from "):
        load_data(DataConfig(source="nowhere:f"))


def test_a_run_from_elsewhere_runs_no_code_of_its_data(tmp_path):
    teach("--data", "mine:marked", "--model", "resnet8", "--epochs", "1", "--batch-size", "8", "--out", "run")
    assert Path("ran").exists(), "the command line trusts its own data"
    Path("ran").unlink()
    with pytest.raises(UserError, match=r"reading its data mine:marked runs its author's code; --trust-code"):
        main(["run", "--formats", "safetensors"])
    assert not Path("ran").exists()
    main(["run", "--formats", "safetensors", "--trust-code"])
    (row,) = json.loads(Path("run/export/export.json").read_text())["rows"]
    assert row["top1"] == pytest.approx(json.loads(Path("run/summary.json").read_text())["test_top1"])


def test_lazy_images_that_cannot_be_read_are_listed_and_skipped():
    words = r"train row 3: not a readable image \(.*Truncated.*train row 4: .*fractions, whose white is unknown"
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(source="mine:lazy"))
    data = load_data(DataConfig(source="mine:lazy", skip_broken=True, val_fraction=0.0))
    assert len(data.train.labels) == 22


def test_photographs_are_turned_upright_as_predictions_are():
    image = load_data(DataConfig(source="mine:turned", val_fraction=0.0)).test.images[0]
    assert image[0, 5, 11] == 0, "the upper half is the right one once it is turned"
    assert image[0, 5, 0] == 220


def test_one_class_of_ones_own_is_refused_too():
    with pytest.raises(UserError, match=r"mine:one_class: has one class only \(0\)"):
        load_data(DataConfig(source="mine:one_class"))
