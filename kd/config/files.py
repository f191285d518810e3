"""Flags in files: --config reads a YAML or a run's own config.json, --print-config writes the YAML. No torch here.

A file holds flags by name, as on the command line, and `method`. They become arguments, which are parsed as if somebody
had typed them, so that a wrong value gets the same message in both places.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from kd.errors import UserError, nearest, require

# Of a run's own config.json: another seed must not take its folder, nor its place on the Hub.
NOT_REPEATED = ("out", "resume", "auto_resume", "resume_inexact", "extend", "push_to", "push_every")


def read_flags(path: Path) -> dict[str, Any]:
    """The flags in a file, by name with dashes, `method` among them. Raises UserError for a file that has none."""
    try:
        content = yaml.safe_load(path.read_text())  # JSON is YAML
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); name a YAML, or a run's config.json"
        raise UserError(f"--config {path}: {problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path}: is no YAML ({reason}); write one flag a line, as in `epochs: 3`") from error
    valid = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    require(valid, f"--config {path}: holds no flags; write one a line, as in `epochs: 3`")
    flags = _flags_of_a_run(content) if {"flags", "identity"} <= content.keys() else content
    flags = {name.removeprefix("--").replace("_", "-"): value for name, value in flags.items()}
    for name in ("preset", "data", "method"):  # read before the others, whose defaults depend on them
        value = flags.get(name)
        require(
            value is None or (isinstance(value, str | int | float) and not isinstance(value, bool)),
            f"--config {path}: {name} is {value!r}; give one word",
        )
        flags |= {} if value is None else {name: str(value)}
    if isinstance(source := flags.get("cache-teacher"), str):  # as in `--cache-teacher hub:USER/NAME`
        flags |= {"cache-teacher": True, "cache-from": source}
    return flags


def _flags_of_a_run(config: dict) -> dict[str, Any]:
    """The flags with which the run of a config.json is trained again, without its folder."""
    job = config["flags"]
    parts = {part: job[part] for part in ("data", "views", "fit", "run", "cache", "compress", "start") if part in job}
    flags = {name: value for part in parts.values() for name, value in part.items() if name not in NOT_REPEATED}
    flags |= {"data": flags.pop("source"), "views": flags.pop("count"), "preset": job["preset"]}
    origin, start = job.get("origin"), job.get("compress", {}).get("init")
    if origin and not start:  # of a teacher from elsewhere, on which a new last layer was trained
        source = origin.get("source")
        raise UserError(
            f"--config: is of a new last layer on {source}; distill_student.py --teacher {source} --fine-tune-teacher"
            " trains it"
        )
    if job["role"] == "teacher":
        flags = {name: value for name, value in flags.items() if name not in parts.get("cache", {})}
        return flags | job["method"] | {"model": job["model"]}
    teacher = {"teacher": config["teacher"]} | config.get("teacher_flags", {}) if config.get("teacher") else {}
    return flags | job["method"] | teacher | {"student": job["model"], "method": job["role"]}


def as_arguments(flags: dict[str, Any], known: dict[str, Any], path: Path) -> list[str]:
    """Flags of a file as arguments; `known` has the script's flags by name, each with `takes_value`.

    Raises UserError for a flag that the script does not have.
    """
    arguments = []
    for name, value in flags.items():
        require(name in known, f"--config {path}: there is no flag {name}: {nearest(name, known)}")
        if not known[name].takes_value:
            require(isinstance(value, bool), f"--config {path}: {name} is {value!r}; give true or false")
        else:
            quoted = "a word such as no needs quotes"
            require(not isinstance(value, bool), f"--config {path}: {name} is {value!r}; {quoted}")
        require(not isinstance(value, dict), f"--config {path}: {name} holds flags of its own; write each by itself")
        arguments += as_words(name, value)
    return arguments


def as_words(flag: str, value: object) -> list[str]:
    """A flag as on the command line: on or off for a bool, several values for a list."""
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list | tuple):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}={value}"]


def as_yaml(flags: dict[str, Any]) -> str:
    """Flags as --config reads them."""
    plain = json.loads(json.dumps(flags))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False, width=100)
