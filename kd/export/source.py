"""Read the run to export, and copy it without local paths."""

import dataclasses
import shutil
from pathlib import Path
from typing import NamedTuple

from kd.config import DataConfig
from kd.data import Data, load_data
from kd.data.sources import with_set_defaults
from kd.data.workers import WorkerRows
from kd.errors import UserError, require
from kd.export.deployed import Deployed
from kd.report.groups import ALONE, group_runs
from kd.runs.load import load_network
from kd.runs.public import without_paths
from kd.runs.results import (
    WEIGHTS,
    checked_summary,
    collect_runs,
    read_config,
    summary_of,
    weights_file,
)
from kd.utils.files import write_json
from kd.utils.users_own import is_module_function

SCORING_BATCH = 256


class ExportedRun(NamedTuple):
    folder: Path
    network: Deployed
    info: dict  # model.json
    summary: dict  # summary.json, of the exported weights
    config: dict  # config.json
    weights: str = "last"  # or "ema"


def read_source(folder: Path, trust_code: bool, weights: str = "last") -> ExportedRun:
    """Raises UserError if the folder is no finished run or lacks these weights, or its network is untrusted code."""
    trained = load_network(folder, trust_code, weights)
    summary, config = summary_of(checked_summary(folder / "summary.json"), weights), read_config(folder)
    init = summary.get("init")
    require(
        init is None or isinstance(init, str),
        f"{folder / 'summary.json'}: init is {init!r}, not a name; copy the whole run folder again",
    )
    return ExportedRun(folder, Deployed(trained.network, trained.info), trained.info, summary, config, weights)


def read_data(source: ExportedRun, moved_to: str | None, trust_code: bool) -> Data:
    """Load the images that the run was trained on.

    Raises UserError if they are missing or not the same, or come from code that the run names and the user does not.
    """
    flags = source.config["flags"]["data"]
    require(
        trust_code or moved_to is not None or not is_module_function(str(flags.get("source"))),
        f"{source.folder}: reading its data {flags.get('source')} runs its author's code; --trust-code says that you"
        " trust it, --data names other data",
    )
    try:
        config = DataConfig(**flags)
        data = load_data(_moved(config, source.config, moved_to) if moved_to else config)
    except TypeError as error:
        raise UserError(
            f"{source.folder / 'config.json'}: data flags {flags} do not fit this version of kd ({error});"
            " export with the version that trained the run"
        ) from error
    except UserError as error:
        raise UserError(f"{error}; if the run's images have moved, give --data FOLDER") from error
    same = data.fingerprint == source.config["identity"]["data"]
    require(
        same,
        f"--data {moved_to or flags['source']}: has other images or classes than {source.folder} was trained on; give"
        " the run's own data",
    )
    return data


def _moved(config: DataConfig, recorded: dict, moved_to: str) -> DataConfig:
    """The run's data in another place; at the image size of a named set's defaults, which a folder does not have."""
    from_folder = recorded.get("data", {}).get("folder", False)
    size = config.image_size if from_folder else with_set_defaults(config).image_size
    return dataclasses.replace(config, source=moved_to, image_size=size)


def scoring_batch(source: ExportedRun, data: Data) -> int:
    """Images that are read at once: as many as a process of the training did if workers decode them, whose memory may
    hold no more."""
    trained = source.config["flags"].get("fit", {}).get("batch_size", SCORING_BATCH)
    share = max(trained // source.config.get("processes", 1), 1)
    return min(share, SCORING_BATCH) if isinstance(data.test, WorkerRows) else SCORING_BATCH


def copy_run(source: ExportedRun, folder: Path) -> tuple[dict, dict]:
    """Copy what kd.load reads into `folder`; returns the summary and configuration as written there.

    The copy contains no local paths: only the last component of a path is kept.
    """
    shutil.copyfile(weights_file(source.folder, source.weights), folder / WEIGHTS["last"])
    shutil.copyfile(source.folder / "model.json", folder / "model.json")
    summary, config = without_paths(source.summary, source.config)
    write_json(folder / "summary.json", summary)
    write_json(folder / "config.json", config)
    return summary, config


def control_summary(source: ExportedRun) -> dict | None:
    """The summary of the same network trained alone, with the same recipe and seed; None if there is no such run."""
    control = source.summary.get("control")
    if not isinstance(control, str):
        return None
    groups = group_runs(collect_runs([str(source.folder), control])[0], {})
    controls = [control for group in groups for control in group.controls if control.kind == ALONE]
    runs = [run for control in controls for run in control.runs]
    same_seed = (run.summary for run in runs if run.seed == source.summary["seed"])
    return next((summary_of(summary, source.weights) for summary in same_seed), None)
