"""--label-share: a seeded share of each class's training labels; all else stays as it was."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from kd.config import DataConfig, FitConfig, Job, NoneConfig, RunConfig, ViewConfig
from kd.data import load_data
from kd.data.cache import Arrays
from kd.data.splits import hold_out, keep_labels, long_tail
from kd.errors import UserError
from kd.runs.folder import run_identity
from tests.data.test_imbalance import numbered, rows_of
from tests.data.test_stream import shards

SHARES = (0.01, 0.1, 0.3, 1.0)


def test_shares_nest_and_every_class_keeps_its_share():
    whole = numbered(4, 60)
    kept = {share: keep_labels(whole, share, seed=3) for share in SHARES}
    assert [np.bincount(kept[share].labels).tolist() for share in SHARES] == [[1] * 4, [6] * 4, [18] * 4, [60] * 4]
    rows = [rows_of(kept[share]) for share in SHARES]
    assert rows[0] < rows[1] < rows[2] < rows[3]


def test_which_rows_is_a_function_of_the_split_seed():
    whole = numbered(4, 60)
    one, again, other = (rows_of(keep_labels(whole, 0.1, seed)) for seed in (3, 3, 4))
    assert one == again != other


def test_the_rows_are_not_those_that_the_long_tail_keeps():
    """Else a share of a long-tailed set would be no random share of it."""
    whole = numbered(4, 60)
    kept = rows_of(keep_labels(whole, 0.5, seed=0))
    assert kept != rows_of(long_tail(whole, 0.5, 4, seed=0))
    assert kept != rows_of(hold_out(whole, 0.5, seed=0)[1])


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match=f"--label-share {share}: give a share above 0, up to 1"):
        DataConfig(label_share=share).check()


def test_images_without_labels_are_refused():
    unlabelled = Arrays(np.zeros((4, 3, 2, 2), np.uint8), np.full(4, -1))
    with pytest.raises(UserError, match=r"--label-share 0\.5: the training images have no labels; leave it out"):
        keep_labels(unlabelled, 0.5, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return shards(tmp_path_factory.mktemp("data") / "parquet")


WAYS = {"memory": {"decode": "memory"}, "workers": {"decode": "workers"}, "stream": {"stream": True}}


def pixels(split) -> torch.Tensor:
    index = torch.arange(len(split.labels)).split(9)
    return torch.cat(list(split.batches(index, torch.device("cpu"))))


@pytest.mark.parametrize("way", WAYS)
def test_every_storage_keeps_the_same_rows_and_leaves_the_rest_alone(folder, way, capsys):
    common = {"image_size": 16, "workers": 2, "val_fraction": 0.2}
    whole = load_data(DataConfig(folder, **WAYS[way], **common))
    kept = load_data(DataConfig(folder, **WAYS[way], **common, label_share=0.25))
    in_memory = load_data(DataConfig(folder, **common, label_share=0.25))
    said = "data: --label-share 0.25 leaves 7 of 31 training images, 2 to 3 of each class; validation (9 labelled"
    assert capsys.readouterr().out.count(f"{said} images) and test stay whole\n") == 2
    assert len(kept.train.labels) == 7
    for name in ("train", "val", "test"):
        ours, theirs = getattr(kept, name), getattr(in_memory, name)
        assert torch.equal(ours.labels, theirs.labels), name
        assert torch.equal(pixels(ours), pixels(theirs)), name
    for name in ("val", "test"):
        assert torch.equal(pixels(getattr(kept, name)), pixels(getattr(whole, name))), name
    for name in ("mean", "std", "fingerprint", "classes"):
        assert getattr(kept, name) == getattr(whole, name), name
    assert kept.train.sha256 != whole.train.sha256, "a cached teacher must tell them apart"


def test_workers_hash_the_rows_that_are_left(folder):
    ways = ("memory", "workers")
    one, other = (load_data(DataConfig(folder, decode=way, image_size=16, label_share=0.25)) for way in ways)
    assert one.train.sha256 == other.train.sha256


def test_a_share_is_a_run_of_its_own_and_the_whole_is_the_run_it_was():
    def identity(**flags) -> dict:
        data = DataConfig("synthetic", **flags)
        job = Job("none", "report", "resnet8", NoneConfig(), data, ViewConfig(), FitConfig(), RunConfig())
        return run_identity(job, load_data(data), Accelerator(cpu=True))

    whole, tenth = identity(), identity(label_share=0.1)
    assert "label_share" not in whole
    assert tenth == whole | {"label_share": 0.1}


def test_classes_of_one_size_are_told_by_one_number(capsys):
    load_data(DataConfig("synthetic", label_share=0.1))
    assert "of 900 training images, 9 of each class; validation" in capsys.readouterr().out
