"""Code of the user's own: a `module:function` is imported from the working folder and called. No torch here."""

import difflib
import importlib
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from kd.errors import OUR_FOLDER, USERS_FILES, UserError, nearest, require, users_own_error


def is_module_function(name: str) -> bool:
    """Whether `name` is a module:function, code that is imported and run."""
    return re.fullmatch(r"[\w.]+:\w+", name) is not None


def import_function(name: str, what: str) -> Callable:
    """The function that `name`, a module:function, means; `what` says in messages what names it.

    Raises: UserError if there is none, UsersOwnError if its module fails.
    """
    module, function = _import_module(name, what), name.partition(":")[2]
    help = _similar(function, module, callable)
    require(callable(getattr(module, function, None)), f"{what}: {module.__name__} has no function {function}{help}")
    return getattr(module, function)


def import_class(name: str, what: str) -> type:
    """The class that `name`, a module:Class, means; raises as `import_function` does."""
    module, kind = _import_module(name, what), name.partition(":")[2]
    found = getattr(module, kind, None)
    help = _similar(kind, module, lambda value: isinstance(value, type))
    require(found is not None, f"{what}: {module.__name__} has no class {kind}{help}")
    require(isinstance(found, type), f"{what}: is a {type(found).__name__}, no class{help}")
    return found


def _similar(name: str, module: ModuleType, wanted: Callable[[object], bool]) -> str:
    """The end of a message: what the module itself defines, is `wanted`, and has a similar name; or all of that."""
    defined = vars(module).items()
    own = [key for key, value in defined if wanted(value) and getattr(value, "__module__", None) == module.__name__]
    return f"; {nearest(name, own)}" if own else ""


def _import_module(name: str, what: str) -> ModuleType:
    module_name = name.partition(":")[0]
    if str(Path.cwd()) not in sys.path:  # `python -m` would have it there
        sys.path.insert(0, str(Path.cwd()))
    before = set(sys.modules)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        if missing:
            similar = difflib.get_close_matches(module_name, [path.stem for path in Path.cwd().glob("*.py")])
            help = f"; did you mean {' or '.join(similar)}?" if similar else ""
            raise UserError(f"{what}: cannot import {module_name} from {Path.cwd()} ({error}){help}") from error
        _note_files(error)
        raise users_own_error(error, f"{what}, while {module_name} was imported") from error
    USERS_FILES.update(filter(None, (_file_of(key) for key in {module_name, *_new_beside(module_name, before)})))
    return module


def call_function(function: Callable, name: str, what: str, **arguments):
    """What `function`, named `name`, returns.

    Raises: UserError if it takes other arguments, UsersOwnError if it fails.
    """
    called = f"{name.partition(':')[2]}({', '.join(f'{key}={value}' for key, value in arguments.items())})"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin, which has none
        signature = None
    try:
        if signature is not None:
            signature.bind(**arguments)
    except TypeError as error:
        given = f"give it the parameter {', '.join(arguments)} and a default for every other"
        raise UserError(
            f"{what}: is called as {called}, and is defined as {name.partition(':')[2]}{signature} ({error});"
            f" {given if arguments else 'give every parameter a default'}"
        ) from error
    try:
        return function(**arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise users_own_error(error, f"{what}, called as {called}") from error


def _new_beside(module_name: str, before: set[str]) -> set[str]:
    """Modules imported since `before` that belong to the user's module: of its package, or in its folder."""
    home, package = _file_of(module_name), module_name.partition(".")[0]
    folder = str(Path(home).parent) if home else None
    return {
        name
        for name in set(sys.modules) - before
        if name.partition(".")[0] == package or (_file_of(name) and str(Path(_file_of(name)).parent) == folder)
    }


def _file_of(module_name: str) -> str | None:
    return getattr(sys.modules.get(module_name), "__file__", None)


def _note_files(error: BaseException) -> None:
    """Take the files that a failed import ran through for the user's own, except libraries and ours."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    libraries = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))
    USERS_FILES.update(file for file in files if not file.startswith((OUR_FOLDER, "<", *libraries)))
