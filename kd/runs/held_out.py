"""Whether a run that another one begins from, or follows, was trained on images that the other one scores."""

from kd.config import DataConfig
from kd.data import Data
from kd.errors import require
from kd.models import is_module_function
from kd.models.pretrained import is_pretrained
from kd.runs.folder import DEFAULTS_OF_NEWER_FLAGS
from kd.runs.results import identity_of
from kd.utils.console import print_once
from kd.utils.hub import local_folder
from kd.utils.processes import from_main


def check_held_out(name: str, asked: str, config: DataConfig, data: Data, begins: bool = False) -> None:
    """Raise UserError if the run `name` was trained on test images of `data`, which `config` has loaded.

    `asked`: the flag and its value; `begins`: whether the weights are trained on, so that validation images that they
    were trained on count, too; a line says so. A run on other data, or without labels, is not looked at.
    """
    theirs = from_main(lambda: _identity(name))
    if theirs.get("data") != data.fingerprint or theirs.get("no_labels"):
        return
    fraction = theirs.get("test_fraction", DEFAULTS_OF_NEWER_FLAGS["test_fraction"])
    require(
        fraction >= config.test_fraction,
        f"{asked}: was trained on images that are tested on here: it held out {fraction:g} of each class, this run"
        f" {config.test_fraction:g}; give --test-fraction {fraction:g}",
    )
    if not begins or data.val is None or data.own_validation:
        return
    before = theirs.get("val_fraction", 0), theirs.get("split_seed")
    if before[0] < config.val_fraction or before[1] != config.split_seed or fraction != config.test_fraction:
        print_once(
            f"{asked}: was trained with --val-fraction {before[0]} --split-seed {before[1]}, and has seen images that"
            " this run validates on: its validation accuracy is too good, its best epoch not to be relied on"
        )


def _identity(name: str) -> dict:
    """The identity of the run `name`; empty if it is none, or has no readable config.json."""
    if is_pretrained(name) or is_module_function(name):
        return {}
    return identity_of(local_folder(name))
