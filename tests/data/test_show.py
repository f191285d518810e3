"""The picture of what a network sees."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from kd.config.cli import parse
from kd.config.defaults import train_defaults
from kd.data import load_data, show
from kd.data.loader import Batches
from kd.errors import UserError, exit_code
from tests.conftest import ROOT

FLAGS = ["--data", "synthetic", "--policy", "trivial", "--mixup", "1", "--erase", "0.5", "--mix-off-epochs", "1"]


def shown(*args: str) -> list[show.Column]:
    config = parse(show.defaults, "", [*FLAGS, *args, "views.png"])
    data = load_data(config.data)
    return show.columns(config, data, data.train.sample(config.images))


def test_the_views_are_those_of_a_training_run():
    columns = shown("--epochs", "3", "--images", "5", "--seed", "2")
    assert [column.title for column in columns] == ["as scored", "epoch 0", "epoch 1", "epoch 2"]
    job = parse(train_defaults, "", [*FLAGS, "--epochs", "3", "--seed", "2", "--batch-size", "100"]).job()
    data = load_data(job.data)
    batches = Batches(data, job, Accelerator(cpu=True))
    for epoch, column in enumerate(columns[1:]):
        seen = {}
        for batch in batches.epoch(epoch):
            seen |= {int(index): image for index, image in zip(batch.index, batch.image)}
        trained = torch.stack([seen[int(index)] for index in data.train.sample(5)])
        assert torch.equal(column.pixels, show.pixels_of(trained, batches.images))


def test_the_first_column_is_the_stored_image():
    (first, *_), data = shown(), load_data(parse(show.defaults, "", [*FLAGS, "x.png"]).data)
    stored = next(data.train.batches([data.train.sample(6)], torch.device("cpu")))
    assert torch.equal(first.pixels, stored.permute(0, 2, 3, 1))


def test_mixed_images_name_the_other_class_until_mixing_ends():
    columns = shown("--epochs", "3")
    assert all("% picture " in note for column in columns[1:3] for note in column.notes)
    assert set(columns[3].notes) == {""}


def test_views_that_repeat_are_numbered():
    assert [column.title for column in shown("--views", "2", "--epochs", "4")[1:]] == [
        *("epoch 0, view 0", "epoch 1, view 1", "epoch 2, view 0"),
        "epoch 3, view 2",  # not mixed
    ]


def test_the_command_writes_a_picture_that_grows_with_rows_and_columns(capsys):
    sizes = []
    for rows, columns in ((2, 2), (3, 4)):
        show.main([*FLAGS, "--images", str(rows), "--epochs", str(columns), "views.png"])
        with Image.open("views.png") as picture:
            sizes.append(picture.size)
            assert np.asarray(picture.convert("RGB")).std() > 20
    assert sizes[0] < sizes[1]
    assert "views.png: 3 images, 4 epochs" in capsys.readouterr().out


def test_class_names_with_mathematics_or_other_scripts_are_drawn_as_they_are():
    pixels = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    column = show.Column("epoch 0", pixels, (f"50% {show.named('$x_2$ 猫')}",))
    assert Image.open(io.BytesIO(show.draw([column], ["$\\frac$ 猫"], "--data $a$_{"))).size[0] > 50


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "no picture is named"),
        (["views.jpg"], r"views.jpg: is no PNG"),
        (["nowhere/views.png"], "there is no folder nowhere"),
        (["--images", "0", "views.png"], "--images 0: give 1 to 40"),
        (["--epochs", "1", "views.png"], "--mix-off-epochs 1: give fewer than the 1 of --epochs"),
        (["--hue", "2", "views.png"], "--hue 2.0: give"),
    ],
)
def test_row_44_mistakes_end_in_one_line_and_exit_code_2(args, words, capsys):
    assert exit_code(lambda: show.main([*FLAGS, *args]), "") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words.replace("\\", "") in lines[0]


def test_more_images_than_there_are_and_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "views.png").mkdir()
    with pytest.raises(UserError, match=r"views.png: cannot be written"):
        show.main([*FLAGS, "views.png"])
    with pytest.raises(UserError, match="the training split has 20; give fewer"):
        show.main(["--data", "synthetic", "--classes", "2", "--val-fraction", "0.9", "--images", "30", "views.png"])


def test_help_names_its_argument_and_its_flags(capsys):
    for args, words in (([], ["FLAG ...] PICTURE", "--images N", ": policy"]), (["augmentation"], ["--policy none|"])):
        with pytest.raises(SystemExit) as stop:
            parse(show.defaults, show.__doc__, [*args, "--help"])
        assert not stop.value.code
        page = capsys.readouterr().out
        assert all(word in page for word in words)


@pytest.mark.parametrize("run", ["teacher", "student"])
def test_the_config_of_a_run_gives_the_flags_of_its_images(run, tmp_path):
    config = str(ROOT / f"tests/runs/written_by_9b93d35/{run}/config.json")
    flags = json.loads(Path(config).read_text())["flags"]
    asked = parse(show.defaults, "", ["--config", config, "--epochs", "8", "views.png"])
    assert (asked.data.source, asked.views.crop_padding, asked.seed, asked.epochs) == (
        flags["data"]["source"],
        flags["views"]["crop_padding"],
        flags["fit"]["seed"],
        8,
    )
    (tmp_path / "mine.yaml").write_text("temperature: 3\nmethod: kd\nflipp: true\n")
    with pytest.raises(UserError, match="there is no flag flipp: did you mean flip"):
        parse(show.defaults, "", ["--config", str(tmp_path / "mine.yaml"), "views.png"])
