"""The finished run that an export is made from: its network, its images, and what of it may be shown to others."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from kd.config import DataConfig
from kd.data import Data, load_data
from kd.errors import UserError, require
from kd.files import read_json, write_json
from kd.shipping.deploy import Deployed
from kd.trained import load_network


class Source(NamedTuple):
    folder: Path
    network: Deployed
    info: dict  # model.json
    summary: dict  # summary.json
    record: dict  # config.json


def read_source(folder: Path, trust_code: bool) -> Source:
    """Raises UserError where the folder holds no finished run, or its network is code that is not trusted."""
    trained = load_network(folder, trust_code)
    record = read_json(folder / "config.json")
    try:
        sound = isinstance(record["flags"]["data"]["source"], str) and isinstance(record["flags"]["run"], dict)
        sound = sound and isinstance(record["identity"]["data"], str)
    except (KeyError, TypeError):
        sound = False
    require(sound, f"{folder / 'config.json'} has no flags of a run")
    return Source(folder, Deployed(trained.network, trained.info), trained.info, trained.summary, record)


def read_data(source: Source, moved: str | None) -> Data:
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


def copy_run(source: Source, folder: Path) -> tuple[dict, dict]:
    """Into `folder`, all that kd.load reads; returns summary and configuration as they are written there.

    They name no folder of this machine: where a run lay is nobody else's business, and of no use to them.
    """
    for name in ("model.safetensors", "model.json"):
        shutil.copyfile(source.folder / name, folder / name)
    summary, record = json.loads(json.dumps([source.summary, source.record]))
    flags = record["flags"]
    flags["run"]["out"] = None
    named = [(summary, "teacher"), (summary, "control"), (summary, "init"), (flags.get("compress", {}), "init")]
    named += [(member, "folder") for member in summary.get("teachers", [])]
    source_name = flags["data"]["source"]
    if source_name.startswith((".", "/", "~")) or Path(source_name).is_dir():
        named.append((flags["data"], "source"))
    origin = flags.get("origin") or {}
    if Path(origin.get("source") or "").suffix:  # a file of weights, where torchvision/NAME and the like are no path
        named.append((origin, "source"))
    for holder, key in named:
        if holder.get(key):
            holder[key] = last_name(holder[key])
    write_json(folder / "summary.json", summary)
    write_json(folder / "config.json", record)
    return summary, record


def alone(source: Source) -> dict | None:
    """The summary of the same network trained alone, where that run is still there."""
    path = Path(source.summary.get("control") or "") / "summary.json"
    return read_json(path) if source.summary.get("control") and path.exists() else None


def last_name(path: str | list) -> str | list:
    return [last_name(one) for one in path] if isinstance(path, list) else Path(path).name
