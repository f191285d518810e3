"""Methods by name: those of METHODS, and those from outside (module:Class). No torch here; an outside module has it.

An outside method is a DistillationLoss whose annotation `config: MyFlags` names the dataclass of its flags, which
derives from MethodFlags (docs/extend.md).
"""

import dataclasses
import inspect
import json
import sys
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

from kd.config.flags import CacheConfig, CompressConfig, DataConfig, FitConfig, RunConfig, ViewConfig
from kd.config.jobs import DistillConfig, TrainConfig
from kd.config.methods import METHODS, MethodFlags
from kd.errors import nearest, require
from kd.utils.users_own import import_class, is_users_own

LOSS = "kd.losses.base.DistillationLoss"

PARTS = (DataConfig, ViewConfig, FitConfig, RunConfig, CompressConfig, CacheConfig, DistillConfig, TrainConfig)

# What the flags' class has already: no field may be called so.
RESERVED = {name for name in (*vars(MethodFlags), *MethodFlags.__annotations__) if name != "label_smoothing"}


def is_named(word: str) -> bool:
    """Whether a word of the command line can only mean a method that is not in METHODS."""
    return is_users_own(word) and not Path(word).exists()


@cache  # the same class at every call: flags are compared by type
def named_method(name: str) -> type[MethodFlags]:
    """The class of a method's flags: `name` is of METHODS, or module:Class, which is imported.

    Raises: UserError that names what is missing, UsersOwnError if the module fails.
    """
    if name in METHODS:
        return METHODS[name]
    require(
        is_users_own(name),
        f"{name}: no such method; {nearest(name, METHODS)} A method of your own is named as module:Class",
    )
    loss = import_class(name, f"method {name}")
    _check_loss(name, loss)
    flags = _flags_of(name, loss)
    _check_flags(name, flags)
    # A class of its own: two losses may share one class of flags.
    own = {key: getattr(flags, key) for key in ("__doc__", "__module__", "__qualname__")}
    return type(flags.__name__, (flags,), own | {"loss": name, "name": name})


def _check_loss(name: str, loss: type) -> None:
    """Raise UserError unless the class is a DistillationLoss with all that it needs."""
    bases = {f"{base.__module__}.{base.__qualname__}" for base in loss.__mro__}
    require(LOSS in bases, f"{name}: is no method; derive the class from kd.losses.DistillationLoss")
    missing = sorted(getattr(loss, "__abstractmethods__", ()))
    require(not missing, f"{name}: has no {' and no '.join(missing)}; define it as kd/losses/base.py says")
    signature = inspect.signature(loss.forward)
    try:
        signature.bind(*["self", "student", "teacher", "batch"])
        fits = True
    except TypeError:
        fits = False
    require(fits, f"{name}: defines forward{signature}; write forward(self, student, teacher, batch)")


def _flags_of(name: str, loss: type) -> type[MethodFlags]:
    """The class that the annotation `config` names. Raises UserError unless it is a dataclass of flags."""
    owner = next((base for base in loss.__mro__ if "config" in inspect.get_annotations(base)), None)
    remedy = "write `config: MyFlags` in it, with a dataclass that derives from kd.config.methods.MethodFlags"
    require(owner is not None, f"{name}: does not say which flags it has; {remedy}")
    flags = inspect.get_annotations(owner)["config"]
    if isinstance(flags, str):  # of `from __future__ import annotations`
        flags = getattr(sys.modules[owner.__module__], flags, flags)
    said = getattr(flags, "__name__", repr(flags))
    right = isinstance(flags, type) and issubclass(flags, MethodFlags)
    require(right, f"{name}: its flags, config: {said}, do not derive from kd.config.methods.MethodFlags")
    require("__dataclass_fields__" in vars(flags), f"{name}: {said} is no dataclass; put @dataclass(frozen=True) on it")
    return flags


def _check_flags(name: str, flags: type[MethodFlags]) -> None:
    """Raise UserError for a flag without a default, with another one's name, or of a type that no file can hold."""
    common = common_flags()
    for field in dataclasses.fields(flags):
        flag = f"{name}: --{field.name.replace('_', '-')}"
        require(field.name not in RESERVED, f"{flag}: the flags' class has that name already; call the field otherwise")
        require(field.name not in common, f"{flag}: is a common flag already; call the field otherwise")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        require(default is not MISSING, f"{flag}: has no default; give it one")
        try:
            json.dumps(default)
            fits = True
        except TypeError:
            fits = False
        kind = type(default).__name__
        require(fits, f"{flag}: config.json cannot hold its {kind}; take int, float, bool, str, or a tuple of them")


@cache
def common_flags() -> frozenset[str]:
    """The fields of both scripts' configurations, and the names of their flags."""
    names = set()
    for part in PARTS:
        hints = get_type_hints(part, include_extras=True)
        for field in dataclasses.fields(part):
            hint = hints[field.name]
            settings = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
            names |= {field.name, *(setting.name.replace("-", "_") for setting in settings if setting.name)}
    return frozenset(names)
