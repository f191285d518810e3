"""From the command line, and the file of --config, to a checked configuration; tyro parses."""

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from tyro.conf import CascadeSubcommandArgs, OmitArgPrefixes, OmitSubcommandPrefixes, subcommand

from kd.config.defaults import default_preset
from kd.config.files import as_arguments, as_yaml, read_flags
from kd.config.flags import is_cache
from kd.config.help import Flag, flag_values, format_help, list_flags, typed_method, without_method
from kd.config.jobs import DistillConfig, TrainConfig
from kd.config.methods import METHODS, KDConfig, Method, MethodFlags, method_name
from kd.config.named import named_method, with_usual
from kd.config.presets import PRESETS
from kd.config.unused import check_used
from kd.errors import exit_code, require, reworded

CACHE_TEACHER = "--cache-teacher"

# Flags without their part's name, and a method's own before or after the others.
FLAT = (OmitArgPrefixes, OmitSubcommandPrefixes, CascadeSubcommandArgs)


def parse(defaults: Callable, description: str, args: list[str] | None = None):
    """The checked configuration of `args` (the command line if None).

    `defaults` maps a preset's name to its configuration, which gives every flag its default: hence the first pass,
    which reads --preset, or --data and the method, from which it follows. The flags in the file of --config become
    defaults too.
    Raises kd.errors.UserError for values out of range; tyro itself exits with 2 and a short message on flags that do
    not parse.
    """
    given, args = _first_pass(with_cache_from(sys.argv[1:] if args is None else args))
    file = read_flags(Path(given.config)) if given.config else {}
    preset = given.preset or file.get("preset")
    preset = preset or default_preset(given.data or file.get("data"), _method_of(defaults("report"), args, file))
    default = defaults(preset if preset in PRESETS else "report")  # tyro reports an unknown one
    if file:
        default = _with_file(default, file | {"preset": preset}, Path(given.config), args)
    if "-h" in args or "--help" in args:
        _print_and_exit(format_help(default, description, args, shutil.get_terminal_size((100, 24)).columns))
    if isinstance(default, DistillConfig):
        name = typed_method(args, list_flags(default))
        if name and name not in METHODS:
            default = _with_method(named_method(name), default)
    config = tyro.cli(type(default), default=default, args=args, description=description, config=FLAT)
    config.check()
    if isinstance(config, TrainConfig | DistillConfig):
        check_used(config, typed_flags(args))
    if given.print_config:
        _print_and_exit(as_yaml(flag_values(config)).rstrip())
    return config


def _method_of(default, args: list[str], file: dict[str, Any]) -> str | None:
    """The method's name among the arguments, else in the file; None if it is left out."""
    if not isinstance(default, DistillConfig):
        return None
    return typed_method(args, list_flags(default)) or file.get("method")


def with_cache_from(args: list[str]) -> list[str]:
    """The arguments with `--cache-teacher SOURCE` as the two flags that it stands for.

    SOURCE begins with hub: or has a slash, which no method has; so `--cache-teacher kd` stays a flag and a method.
    `--no-cache-teacher` stands for two as well: a file's cache of somebody else's is not used either.
    """
    words: list[str] = []
    for word in args:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        flag = name == CACHE_TEACHER
        if name == "--no-cache-teacher":
            words += [name, "--cache-from", "None"]  # of a file or a preset
        elif flag and equals:
            words += [CACHE_TEACHER, "--cache-from", value]
        elif words and words[-1] == CACHE_TEACHER and is_cache(word):
            words += ["--cache-from", word]
        else:
            words.append(CACHE_TEACHER if flag else word)
    return words


def typed_flags(args: list[str]) -> list[str]:
    """The names after -- among arguments, with dashes; --no-nesterov gives no-nesterov."""
    words = [word.partition("=")[0].removeprefix("--") for word in args if word.startswith("--")]
    return [word.replace("_", "-") for word in words]


def _first_pass(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What the defaults depend on, and the arguments for tyro: all but --config and --print-config."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", nargs="?", const="")
    files.add_argument("--print-config", action="store_true")
    given, rest = files.parse_known_args(args)
    require(given.config != "", "--config: name a YAML, or a run's config.json")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")  # tyro reports a missing value
    first.add_argument("--data", nargs="?")
    return first.parse_known_args(rest, given)[0], rest


def file_of(args: list[str]) -> dict[str, Any]:
    """The flags in the file of --config among arguments; empty without one."""
    given, _ = _first_pass(args)
    return read_flags(Path(given.config)) if given.config else {}


def _with_file(default, file: dict[str, Any], path: Path, args: list[str]):
    """`default` with the flags of --config; its method's own are left out if `args` name another method."""
    flags, words = list_flags(default), []
    if not isinstance(default, TrainConfig | DistillConfig):  # kd.data.show needs a few of a run's flags
        file = _without_those_of_scripts(file, flags)
    for network, name in (("model", "train_teacher.py"), ("student", "distill_student.py")):
        require(network in flags or network not in file, f"--config {path}: has the flags of {name}; give it to that")
    if isinstance(default, DistillConfig):
        written, named = file.pop("method", None), typed_method(args, flags)
        method = str(written or named or method_name(default.method))  # without one, its flags are of the typed one
        with reworded(lambda text: f"--config {path}: {text}"):
            kind = named_method(method)
        flags = without_method(flags, default)
        own = list_flags(with_usual(kind, default.method))
        chosen = {name: value for name, value in file.items() if name in own}
        file = {name: value for name, value in file.items() if name not in own}
        if named in (None, method):
            words = [method, *as_arguments(chosen, own, path)]
            default = default if method in METHODS else _with_method(kind, default)
    words = [*as_arguments(file, flags, path), *words]
    return tyro.cli(type(default), default=default, args=words, config=FLAT)


def _without_those_of_scripts(file: dict[str, Any], flags: dict[str, Flag]) -> dict[str, Any]:
    """The flags of a file but for those that a script has and this program, with `flags`, has not."""
    scripts = flag_names(TrainConfig()) | flag_names(DistillConfig(), str(file.get("method", ""))) | {"method"}
    return {name: value for name, value in file.items() if name in flags or name.replace("-", "_") not in scripts}


def _with_method(kind: type[MethodFlags], default: DistillConfig) -> DistillConfig:
    """`default` as an instance of a class with one more subcommand, a method that is not in METHODS."""
    usual = with_usual(kind, default.method)
    method = Union[Method, Annotated[kind, subcommand(kind.name, default=usual)]]  # noqa: UP007
    fields = [("method", method, dataclasses.field(default_factory=KDConfig))]
    wider = dataclasses.make_dataclass("DistillConfig", fields, bases=(DistillConfig,), frozen=True)
    return wider(**{field.name: getattr(default, field.name) for field in dataclasses.fields(default)})


def flag_names(default, method: str = "") -> set[str]:
    """The names of a script's flags with underscores, those of `method` among them (if empty, of the usual method).

    Raises UserError if there is no such method.
    """
    names = set(list_flags(default))
    if method:
        kind = named_method(method)
        names = names - set(list_flags(default.method)) | set(list_flags(with_usual(kind, default.method)))
    return {name.replace("-", "_") for name in names}


def script(defaults: Callable, main: Callable, description: str) -> None:
    """Parse, run `main(config)`, and exit."""
    remedy = "the last checkpoint is intact; continue with --resume"
    sys.exit(exit_code(lambda: main(parse(defaults, description)), remedy))


def _print_and_exit(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head` reads no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's flush at exit fails
    sys.exit(0)
