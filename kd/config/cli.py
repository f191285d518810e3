"""From the command line to a checked configuration, and --help.

tyro parses. Its own --help has 240 lines in the order of the dataclasses; ours has the same flags, read from the same
dataclasses and docstrings, in groups with the commonest first.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import os
import shutil
import sys
import textwrap
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import CascadeSubcommandArgs, OmitArgPrefixes, OmitSubcommandPrefixes

from kd.config.flags import SETTLED_BY_DATA
from kd.config.jobs import DistillConfig
from kd.config.methods import METHODS, method_name
from kd.config.presets import PRESETS, default_preset
from kd.errors import exit_code

# The groups of --help, commonest flags first. The dataclasses' own order is that of every config.json.
GROUPS = {
    "data": "data classes image-size val-fraction test-fraction label image skip-broken stored-size decode workers "
    "stream shuffle-rows split-seed imbalance",
    "model": "student model init model-args freeze freeze-epochs",
    "teacher": "teacher teacher-model teacher-seed control fine-tune-teacher trust-code cache-teacher cache-dtype "
    "cache-top-k teacher-init teacher-model-args",
    "training": "preset epochs batch-size lr seed weight-decay momentum nesterov schedule warmup-epochs milestones "
    "label-smoothing balance drop-last clip-norm mixed-precision compile channels-last deterministic sync-batchnorm",
    "augmentation": "crop-padding resized-crop flip mixup cutmix erase colour-jitter views view-seed",
    "run": "out resume auto-resume resume-inexact extend save-every threads test",
    "logging": "log-every diagnose-every wandb wandb-project wandb-group",
    "compression": "weight-bits activation-bits prune sparsity",
}

# Flags without their part's name, and a method's own before or after the others.
FLAT = (OmitArgPrefixes, OmitSubcommandPrefixes, CascadeSubcommandArgs)

INDENT = 24  # columns before a flag's text

MAX_WIDTH = 120  # columns: longer lines are hard to read


class Flag(NamedTuple):
    """A flag as --help shows it."""

    usage: str
    text: str
    default: str


def parse(defaults: Callable, description: str, args: list[str] | None = None):
    """The checked configuration of `args` (the command line if None).

    `defaults` maps a preset's name to its configuration, which gives every flag its default: hence the first pass,
    which reads --preset, or --data, from which it follows. Raises kd.errors.UserError for values out of range; tyro
    itself exits with 2 and a short message on flags that do not parse.
    """
    args = sys.argv[1:] if args is None else args
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?")  # tyro reports a missing value
    first.add_argument("--data", nargs="?")
    given = first.parse_known_args(args)[0]
    preset = given.preset or default_preset(given.data)
    default = defaults(preset if preset in PRESETS else "report")  # tyro reports an unknown one
    if "-h" in args or "--help" in args:
        _print_and_exit(format_help(default, description, args, shutil.get_terminal_size().columns))
    config = tyro.cli(type(default), default=default, args=args, description=description, config=FLAT)
    config.check()
    return config


def script(defaults: Callable, main: Callable, description: str) -> None:
    """Parse, run `main(config)`, and exit."""
    sys.exit(exit_code(lambda: main(parse(defaults, description))))


def format_help(default, description: str, args: list[str], width: int) -> str:
    """The help of a script, or of one method if `args` name it.

    `default` is the preset's configuration. `description` opens the help: what the script does and the usual commands.
    """
    width = min(max(width, 60), MAX_WIDTH)
    script_name = Path(sys.argv[0]).name
    flags = _flags(default)
    if isinstance(default, DistillConfig):
        method = _named_method(args, flags)
        if method:
            return _paragraphs(*_method_help(script_name, method, default.method, width))
        usage, methods = f"usage: {script_name} [FLAG ...] [METHOD] [FLAG ...]", _list_methods(default.method, width)
    else:
        usage, methods = f"usage: {script_name} [FLAG ...]", ()
    grouped = {title: [flags[name] for name in names.split() if name in flags] for title, names in GROUPS.items()}
    groups = (_group(title, found, width) for title, found in grouped.items() if found)
    meaning = f"[...] at the end of a line: the default of --preset {default.preset}. Without one: off, or not given."
    return _paragraphs([description.strip()], [usage, meaning], *groups, *methods)


def _named_method(args: list[str], flags: dict[str, Flag]) -> str | None:
    """The method among the arguments; crd in `--preset crd` is none."""
    with_value = {f"--{name}" for name, flag in flags.items() if " " in flag.usage}
    words = (word for before, word in itertools.pairwise(["", *args]) if before not in with_value)
    return next((word for word in words if word in METHODS), None)


def _method_help(script_name: str, method: str, usual: object, width: int) -> list[list[str]]:
    """Paragraphs on one method; `usual` has the preset's flags of its own method."""
    kind = METHODS[method]
    flags = _flags(usual if type(usual) is kind else kind())
    return [
        [kind.__doc__],
        [f"usage: {script_name} [FLAG ...] {method} [FLAG ...]"],
        _group(f"flags of {method}", flags.values(), width),
        [f"{script_name} --help lists all other flags."],
    ]


def _list_methods(usual: object, width: int) -> list[list[str]]:
    """Paragraphs on the usual method's flags and on all methods."""
    indent = 4 + max(map(len, METHODS))
    methods = (_entry(name, kind.__doc__, indent, width) for name, kind in METHODS.items())
    return [
        _group(f"flags of {method_name(usual)}, the method if none is given", _flags(usual).values(), width),
        ["methods (METHOD --help lists a method's own flags):", *itertools.chain.from_iterable(methods)],
    ]


def _print_and_exit(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head` reads no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's flush at exit fails
    sys.exit(0)


def _paragraphs(*parts: list[str]) -> str:
    return "\n\n".join("\n".join(lines) for lines in parts)


def _group(title: str, flags: Iterable[Flag], width: int) -> list[str]:
    lines = [f"{title}:"]
    for flag in flags:
        text = f"{flag.text} [{flag.default}]" if flag.default else flag.text
        lines += _entry(flag.usage, text, INDENT, width)
    return lines


def _entry(head: str, text: str, indent: int, width: int) -> list[str]:
    """`head` and the wrapped `text` in two columns; after a long head, `text` starts on the next line if it must."""
    head = f"  {head}".ljust(indent - 2) + "  "
    if len(head + text) <= width:
        return [head + text]
    lines = [" " * indent + line for line in textwrap.wrap(text, width - indent, break_on_hyphens=False)]
    return [head.rstrip(), *lines] if len(head) > indent else [head + lines[0].strip(), *lines[1:]]


def _flags(config) -> dict[str, Flag]:
    """Every flag of a configuration and its parts by name, those of a class before those that it inherits."""
    kind, flags = type(config), {}
    hints, texts = get_type_hints(kind, include_extras=True), _docstrings(kind)
    for field in sorted(dataclasses.fields(kind), key=lambda field: [*texts, field.name].index(field.name)):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flags |= _flags(value)
        else:
            name, usage = _usage(field.name, hints[field.name], value)
            flags[name] = Flag(usage, texts[field.name], _default(field.name, value))
    return flags


def _docstrings(kind: type) -> dict[str, str]:
    """The docstring under each field, as tyro reads them too: Python itself drops them."""
    texts = {}
    for base in kind.__mro__[:-1]:  # without object
        body = ast.parse(inspect.getsource(base)).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts.setdefault(field.target.id, " ".join(ast.literal_eval(text.value).split()))
    return texts


def _usage(field: str, hint: Any, value: object) -> tuple[str, str]:
    """The flag's name, and the flag with what it takes: lr, --lr X."""
    name, metavar = field.replace("_", "-"), None
    if get_origin(hint) is Annotated:
        hint, setting = get_args(hint)
        name, metavar = setting.name or name, setting.metavar
    if hint is bool:  # a flag that is on by default is given to switch it off
        return name, f"--[no-]{name}" if value else f"--{name}"
    return name, f"--{name} {metavar or _metavar(hint)}"


def _metavar(hint: Any) -> str:
    kinds = [kind for kind in get_args(hint) if kind not in (type(None), ...)]
    if get_origin(hint) is Literal:
        return "|".join(map(str, kinds))
    if get_origin(hint) in (Union, types.UnionType):
        return _metavar(kinds[0])
    if get_origin(hint) is tuple:
        return f"{_metavar(kinds[0])} ..."
    return {int: "N", float: "X", str: "NAME"}[hint]


def _default(field: str, value: object) -> str:
    if value is None or value is False:
        return "by the number of images" if field in SETTLED_BY_DATA else ""
    if value is True:
        return "on"
    if isinstance(value, tuple):
        return " ".join(_default(field, part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
