"""Summaries and configurations of runs without the paths of the machine that trained them."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from kd.config.flags import HUB
from kd.data.sources import BUILT_IN, HUB_SETS
from kd.models import LIBRARIES
from kd.models.weights import SUFFIXES
from kd.runs.results import named_paths


def without_paths(summary: dict, config: dict) -> tuple[dict, dict]:
    """Copies of summary.json and config.json that keep only the last component of every path."""
    summary, config = json.loads(json.dumps([summary, config]))
    flags = config["flags"]
    flags.setdefault("run", {})["out"] = None
    names = [(summary, "teacher"), (summary, "control"), (summary, "init"), (config, "teacher"), *named_paths(flags)]
    names += [(member, "folder") for member in summary.get("teachers", [])]
    names += [(part.get("shared_cache", {}), "source") for part in (summary, config)]
    names += [(summary, "probe_data"), (flags["run"], "probe")]
    for part, key in names:
        if part.get(key):
            part[key] = public_name(part[key])
    if _trained_on_folder(config):
        flags["data"]["source"] = Path(flags["data"]["source"]).name
    own = flags["method"].keys() & config.get("identity", {}).keys()
    flags["method"] = _public_values(flags["method"])
    config.get("identity", {}).update({key: flags["method"][key] for key in own})
    return summary, config


def _public_values(value: object) -> object:
    """A method's flags, of which a user's own method may have any, without the paths among them."""
    if isinstance(value, dict):
        return {key: _public_values(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_public_values(part) for part in value]
    return public_name(value) if isinstance(value, str) and os.sep in value else value


def public_text(text: str, names: Sequence[str]) -> str:
    """A message without local paths: each of `names`, however it is written out, and any other absolute path."""
    forms = {form: public_name(name) for name in (*names, os.getcwd()) for form in _written_out(name)}
    forms |= {f"{Path.home()}{os.sep}": f"~{os.sep}"}
    for form in sorted(forms, key=len, reverse=True):
        if os.sep in form.strip(os.sep):
            text = text.replace(form, forms[form])
    return re.sub(r"(?<![\w:/.])~?(/[^\s/'\":;,()]+)+/?", lambda found: str(public_name(found[0])), text)


def _written_out(name: str) -> tuple[str, ...]:
    """The ways in which a message may write a path."""
    expanded = os.path.expanduser(name)
    return name, expanded, os.path.abspath(expanded), os.path.realpath(expanded)


def _trained_on_folder(config: dict) -> bool:
    """Whether the run's data was a local folder."""
    recorded, source = config.get("data", {}).get("folder"), config["flags"]["data"]["source"]
    # Older runs did not record it; losing a Hub id is better than publishing a path.
    return recorded if isinstance(recorded, bool) else source not in (*BUILT_IN, *HUB_SETS)


def public_name(name: str | list) -> str | list:
    """A network's name without local paths.

    Names of libraries and after hub: stay whole, a copy in the Hub client's cache becomes USER/NAME@REVISION. Of
    anything else, also a plain USER/NAME, which may be a folder, the last component stays.
    """
    if isinstance(name, list):
        return [public_name(member) for member in name]
    if name.startswith(HUB):
        return name
    library, _, model = name.partition("/")
    if library in LIBRARIES and model and Path(name).suffix not in SUFFIXES:
        return name
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/([^/]+)/?$", name)
    return "{}/{}@{}".format(*cached.groups()) if cached else Path(name).name
