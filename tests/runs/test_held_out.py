"""A run does not score images that the network it begins from, or follows, was trained on."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from PIL import Image

from kd.config import DataConfig
from kd.data import load_data
from kd.data.dataset import load_probe
from kd.errors import UserError
from kd.runs.held_out import check_held_out
from kd.training.probe import _as_held_out
from kd.utils.files import write_json


@pytest.fixture
def pictures() -> str:
    """Two classes of 20 images, without a test split."""
    for number in range(40):
        path = Path("pictures") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (6 * number, 250 - 6 * number, 0)).save(path)
    return "pictures"


def run_on(data: str, **flags) -> str:
    """As much of a run on the data as is looked at."""
    config = DataConfig(data, **flags)
    identity = {"role": "teacher", "model": "resnet8", "classes": None, "teacher": None}
    identity |= {"data": load_data(config).fingerprint, "val_fraction": config.val_fraction}
    identity |= {"split_seed": config.split_seed, "test_fraction": config.test_fraction}
    identity |= {"no_labels": True} if config.no_labels else {}
    Path("run").mkdir()
    write_json(Path("run/config.json"), {"identity": identity, "flags": {"method": {}, "data": {"source": data}}})
    return "run"


def test_a_run_that_held_out_fewer_test_images_is_refused(pictures):
    run = run_on(pictures, test_fraction=0.1)
    config = DataConfig(pictures)
    with pytest.raises(UserError, match=r"--init run: .*it held out 0.1 .* 0.2; give --test-fraction 0.1"):
        check_held_out(run, "--init run", config, load_data(config))
    for fraction in (0.1, 0.05):  # the first images of one order: a part of those that the run held out
        config = DataConfig(pictures, test_fraction=fraction)
        check_held_out(run, "--init run", config, load_data(config))


SPLITS = [({"val_fraction": 0.0}, True), ({"split_seed": 1}, True), ({"test_fraction": 0.3}, True), ({}, False)]


@pytest.mark.parametrize(("flags", "said"), SPLITS)
def test_validation_images_that_a_start_was_trained_on_are_said(pictures, flags, said, capsys):
    run, config = run_on(pictures, **flags), DataConfig(pictures)
    capsys.readouterr()
    data = load_data(config)
    check_held_out(run, "--teacher run", config, data)
    assert "validates on" not in capsys.readouterr().out
    check_held_out(run, "--init run", config, data, begins=True)
    assert said == ("--init run: was trained with" in capsys.readouterr().out)
    check_held_out(run, "--init run", config, dataclasses.replace(data, own_validation=True), begins=True)
    assert "validates on" not in capsys.readouterr().out


def test_other_data_images_without_labels_and_networks_of_libraries_are_not_looked_at(pictures):
    config = DataConfig(pictures)
    data = load_data(config)
    check_held_out("timm/resnet18", "--teacher timm/resnet18", config, data)
    check_held_out(run_on("digits"), "--init run", config, data)
    Path("run").rename("other")
    check_held_out(run_on(pictures, no_labels=True), "--init run", config, data)


def test_a_finished_run_is_probed_on_the_images_that_it_held_out(pictures):
    run = Path(run_on(pictures, test_fraction=0.1))
    flags = DataConfig(pictures)
    labelled = _as_held_out(load_data(flags), run, flags, (8, 8))
    assert labelled.test.sha256 == load_data(DataConfig(pictures, test_fraction=0.1)).test.sha256
    assert _as_held_out(load_data(DataConfig("digits")), run, flags, (8, 8)).size == (8, 8)


def test_a_split_is_the_datas_own_or_held_out(pictures):
    assert not load_data(DataConfig(pictures)).own_validation
    for name in ("val", "test"):
        shutil.copytree(pictures, f"split/{name}")
    shutil.copytree(pictures, "split/train")
    assert load_data(DataConfig("split")).own_validation
    shutil.rmtree("split/test")
    assert not load_data(DataConfig("split")).own_validation


@pytest.mark.parametrize("written", ["pictures", "./pictures", "../{}/pictures"])
def test_a_probe_of_the_same_folder_has_the_runs_splits_however_it_is_written(pictures, written):
    config = DataConfig(pictures, test_fraction=0.1, split_seed=1)
    probed = load_probe(written.format(Path.cwd().name), config, (8, 8))
    trained = load_data(config)
    assert (probed.test.sha256, probed.val.sha256) == (trained.test.sha256, trained.val.sha256)
