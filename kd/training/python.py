"""The scripts called from Python (kd.train, kd.distill): as often as wanted in one process, which is then as before."""

import contextlib
import importlib.util
import io
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from kd.config import METHODS, DistillConfig, TrainConfig
from kd.config.cli import flag_names, parse
from kd.config.defaults import distill_defaults, train_defaults
from kd.config.files import as_words
from kd.errors import Preempted, UserError, nearest, remedy_for, require
from kd.utils.console import clip
from kd.utils.system import script_path

# By script: its configuration's class, and the defaults of a preset.
SCRIPTS = {"train_teacher": (TrainConfig, train_defaults), "distill_student": (DistillConfig, distill_defaults)}

BOX = "╭╮╰╯│─"  # around tyro's messages


def run_script(name: str, config: TrainConfig | DistillConfig | None, flags: dict) -> Path:
    """Run a script's `main` with a configuration, or with flags by name; returns the run folder.

    Raises: UserError for what ends the script with a message; Preempted for a stop that was saved.
    """
    kind, defaults = SCRIPTS[name]
    require(config is None or not flags, "give a configuration, or flags, not both")
    require(config is None or isinstance(config, kind), f"{type(config).__name__}: give a kd.config.{kind.__name__}")
    if config is None:
        config = read_flags(defaults, flags)
    else:
        config.check()
    with own_process():
        try:
            return import_script(name).main(config)
        except Preempted as stop:
            raise Preempted(stop.signal_number, str(stop).replace("--resume", "resume=True")) from None
        except (RuntimeError, MemoryError, OSError) as error:
            remedy = remedy_for(error)
            if remedy is None:
                raise
            raise UserError(remedy) from error


def read_flags(defaults: Callable, flags: dict):
    """The checked configuration of flags by name: {"preset": "digits", "method": "dkd", "beta": 2.0}.

    True and False switch a flag on and off, a list gives several values, None leaves it out. Raises UserError.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    require(given.get("method") != "", "method: has no value; name one, or leave it out")
    method = [str(given.pop("method"))] if "method" in given and defaults is distill_defaults else []
    names = flag_names(defaults("report"), *method)
    for name, value in given.items():
        require(name in names, f"{name}: {_elsewhere(name, method) or f'no such flag; {nearest(name, names)}'}")
        empty = isinstance(value, list | tuple) and not value
        require(not empty, f"{name}: has no value; give one or more, or None to leave it out")
    words = [word for name, value in given.items() for word in as_words(name.replace("_", "-"), value)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(defaults, "", [*method, *words])
    except SystemExit:
        text = said.getvalue().translate(dict.fromkeys(map(ord, BOX), " "))
        raise UserError(clip(text, 300)) from None


def _elsewhere(name: str, method: list[str]) -> str:
    """Which other methods have this flag; empty if none has."""
    owners = [owner for owner, kind in METHODS.items() if name in kind.__dataclass_fields__]
    return f"is no flag of {method[0]}, but of {', '.join(owners)}" if owners and method else ""


def import_script(name: str) -> ModuleType:
    """A script as a module. One script imports another by its name, from wherever Python was started."""
    for needed in dict.fromkeys(("train_teacher", name)):
        path = script_path(f"{needed}.py")
        there = sys.modules.get(needed)
        if there is not None and Path(there.__file__ or "").resolve() == path:
            continue
        spec = importlib.util.spec_from_file_location(needed, path)
        module = sys.modules[needed] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[needed]
            raise
    return sys.modules[name]


@contextmanager
def own_process() -> Iterator[None]:
    """Run what is a script as if in a process of its own, and leave this one as it was.

    That is: Accelerate's state, the process group, the W&B run, environment, threads, torch's settings and generators.
    """
    states = [
        (kind._shared_state, dict(kind._shared_state)) for kind in (AcceleratorState, GradientState, PartialState)
    ]
    grouped, tracked, environment = torch.distributed.is_initialized(), _wandb_run(), dict(os.environ)
    restore = _settings()
    for shared, _ in states:
        shared.clear()
    try:
        yield
    finally:
        if _wandb_run() is not tracked:
            sys.modules["wandb"].finish(exit_code=1)  # of a run that ended by an exception
        if torch.distributed.is_initialized() and not grouped:
            torch.distributed.destroy_process_group()
        for shared, before in states:
            shared.clear()
            shared.update(before)
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update({key: value for key, value in environment.items() if os.environ.get(key) != value})
        restore()


def _wandb_run():
    """The W&B run of this process, if there is one."""
    return sys.modules["wandb"].run if "wandb" in sys.modules else None


def _settings() -> Callable[[], None]:
    """The function that gives threads, torch's settings and all random generators the state that they have now."""
    generators, arrays, numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only, cudnn = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn
    benchmark, tf32 = cudnn.benchmark, cudnn.allow_tf32

    def restore() -> None:
        random.setstate(generators)
        np.random.set_state(arrays)
        torch.set_rng_state(numbers)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        cudnn.benchmark, cudnn.allow_tf32 = benchmark, tf32

    return restore
