"""The finished run that an export is made from: its network, its images, and what of it may be shown to others."""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from kd.config import DataConfig
from kd.data import Data, load_data
from kd.data.sources import BUILT_IN, HUB_SETS
from kd.errors import UserError, require
from kd.export.deployed import Deployed
from kd.models import LIBRARIES
from kd.models.pretrained import PICKLED
from kd.report.groups import ALONE, group_runs
from kd.runs.load import load_network
from kd.runs.results import checked_summary, collect_runs
from kd.utils.files import read_json, write_json

PARTS = ("data", "views", "fit", "method", "compress")  # of the flags: all that shaped the result


WEIGHTS = (*PICKLED, ".safetensors")  # of a file that a teacher was read from


class ExportedRun(NamedTuple):
    folder: Path
    network: Deployed
    info: dict  # model.json
    summary: dict  # summary.json
    record: dict  # config.json


def read_source(folder: Path, trust_code: bool) -> ExportedRun:
    """Raises UserError where the folder holds no finished run, or its network is code that is not trusted."""
    trained = load_network(folder, trust_code)
    summary, record = checked_summary(folder / "summary.json"), read_json(folder / "config.json")
    require(_sound(record), f"{folder / 'config.json'} has no flags of a run; copy the whole run folder again")
    init = summary.get("init")
    require(init is None or isinstance(init, str), f"{folder / 'summary.json'} has init {init!r}")
    return ExportedRun(folder, Deployed(trained.network, trained.info), trained.info, summary, record)


def _sound(record: dict) -> bool:
    """Whether a config.json holds, of what an export reads, what a run writes."""
    flags, identity, optional = record.get("flags"), record.get("identity"), ("versions", "data")
    if not isinstance(flags, dict) or not isinstance(identity, dict):
        return False
    parts = [flags.get("run"), flags.get("data"), *(flags[part] for part in PARTS if part in flags)]
    parts += [flags.get("origin") or {}, *(record.get(part, {}) for part in optional)]
    if not all(isinstance(part, dict) for part in parts):
        return False
    texts = [flags["data"].get("source"), identity.get("data")]
    texts += [holder.get(key) or "" for holder, key in _named(flags)]
    return all(isinstance(text, str) for text in texts)


def _named(flags: dict) -> list[tuple[dict, str]]:
    """Where in a run's flags, its data aside, something is named that may lie on its machine."""
    return [(flags.get("compress", {}), "init"), (flags.get("origin") or {}, "source")]


def read_data(source: ExportedRun, moved: str | None) -> Data:
    """The images that the run was trained on. Raises UserError where they are not there, or are others."""
    flags = source.record["flags"]["data"] | ({"source": moved} if moved else {})
    try:
        data = load_data(DataConfig(**flags))
    except TypeError as error:
        raise UserError(f"{source.folder / 'config.json'}: data {flags} are no flags of this project") from error
    except UserError as error:
        raise UserError(f"{error}; --data FOLDER says where the run's own images lie now") from error
    same = data.fingerprint == source.record["identity"]["data"]
    require(same, f"--data {flags['source']}: holds other images or classes than {source.folder} was trained on")
    return data


def copy_run(source: ExportedRun, folder: Path) -> tuple[dict, dict]:
    """Into `folder`, all that kd.load reads; returns summary and configuration as they are written there.

    They name no folder of this machine: where a run lay is nobody else's business, and of no use to them.
    """
    for name in ("model.safetensors", "model.json"):
        shutil.copyfile(source.folder / name, folder / name)
    summary, record = json.loads(json.dumps([source.summary, source.record]))
    flags = record["flags"]
    flags["run"]["out"] = None
    named = [(summary, "teacher"), (summary, "control"), (summary, "init"), *_named(flags)]
    named += [(member, "folder") for member in summary.get("teachers", [])]
    for holder, key in named:
        if holder.get(key):
            holder[key] = public_name(holder[key])
    if _is_folder(record):
        flags["data"]["source"] = Path(flags["data"]["source"]).name
    write_json(folder / "summary.json", summary)
    write_json(folder / "config.json", record)
    return summary, record


def _is_folder(record: dict) -> bool:
    """Whether the data was a folder of the machine that trained on it."""
    noted, source = record.get("data", {}).get("folder"), record["flags"]["data"]["source"]
    # Runs from before this was noted do not say: rather lose a Hub id than tell a path.
    return noted if isinstance(noted, bool) else source not in (*BUILT_IN, *HUB_SETS)


def public_name(name: str | list) -> str | list:
    """What others may be told of a network that was named: a library's or the Hub's own name, of a path the last part.

    A Hub id is recognised by where the Hub's client keeps what it fetched: models--USER--NAME/snapshots/REVISION.
    """
    if isinstance(name, list):
        return [public_name(one) for one in name]
    library, _, short = name.partition("/")
    if library in LIBRARIES and short and Path(name).suffix not in WEIGHTS:
        return name
    fetched = re.search(r"models--([^/]+)--([^/]+)/snapshots/([^/]+)/?$", name)
    return "{}/{}@{}".format(*fetched.groups()) if fetched else Path(name).name


def alone(source: ExportedRun) -> dict | None:
    """The summary of the same network trained alone, by the same recipe and seed; None where that run is not there."""
    control = source.summary.get("control")
    if not isinstance(control, str):
        return None
    groups = group_runs(collect_runs([str(source.folder), control])[0], {})
    controls = [one for group in groups for one in group.controls if one.kind == ALONE]
    return next((run.summary for one in controls for run in one.runs if run.seed == source.summary["seed"]), None)
