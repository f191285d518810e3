"""From the command line to a configuration, and from an error to an exit code."""

import argparse
import sys
from collections.abc import Callable

import tyro
from tyro.conf import CascadeSubcommandArgs, OmitArgPrefixes, OmitSubcommandPrefixes

from kd.config.presets import PRESETS
from kd.errors import exit_code


def parse(defaults: Callable, description: str, args: list[str] | None = None):
    """The checked configuration that `args` (the command line if None) ask for.

    `defaults` maps a preset's name to its configuration, which gives every flag its default: hence the first pass,
    which reads --preset alone. Raises kd.errors.UserError for values out of range; tyro itself exits with 2 and a
    short message on flags that do not parse.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="report")
    preset = first.parse_known_args(args)[0].preset
    default = defaults(preset if preset in PRESETS else "report")  # tyro says what is wrong with an unknown one
    flat = (OmitArgPrefixes, OmitSubcommandPrefixes, CascadeSubcommandArgs)
    config = tyro.cli(type(default), default=default, args=args, description=description, config=flat)
    config.check()
    return config


def script(defaults: Callable, main: Callable, description: str) -> None:
    """Parse, run `main(config)`, and exit."""
    sys.exit(exit_code(lambda: main(parse(defaults, description))))
